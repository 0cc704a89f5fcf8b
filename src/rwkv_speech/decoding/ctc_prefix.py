"""How well the CTC head hears a prefix, the beginning of a text, so that a beam search can weigh it with each token.

Source: joint CTC/attention decoding in one pass, Hori et al. 2017 (arXiv:1706.02737); here the head's labels are
characters and the search's are tokens, each of which appends as many characters as it completes.
"""

# F frames · K labels of the CTC head · V vocabulary · n texts

import codecs
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_speech.models.ctc import BLANK, CtcSpec
from rwkv_speech.tokenizer import WorldTokenizer

# By how much more than the head's best path the rest of a text is expected to cost: the language model's part, and that
# no text is the head's best path. Of 1 and 4 the latter gave fewer errors, on a weak language model.
FORESIGHT = 4.0


class Spelling:
    """The labels that the tokens of a vocabulary append to a text."""

    def __init__(self, spec: CtcSpec, tokenizer: WorldTokenizer, vocab: int) -> None:
        self.star, self.end = spec.star, tokenizer.eos_id
        self._spec, self._tokenizer = spec, tokenizer
        self._known = dict[tuple[bytes, int], tuple[tuple[int, ...], bytes]]()
        # (V,) The first label of each token; the blank where there is none, or not yet a whole one.
        self.first = torch.tensor([(*self.read(b"", token)[0], BLANK)[0] for token in range(vocab)])

    def read(self, rest: bytes, token: int) -> tuple[tuple[int, ...], bytes]:
        """The labels behind the bytes `rest` of a character that is not whole, and the bytes that stay over.

        A token that stands for nothing, and is not the end, is a star.
        """
        key = rest, token
        if key not in self._known:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            found = self._tokenizer.decode_bytes([token])
            labels = self._spec.encode(decoder.decode(rest + found, final=token == self.end))
            if not found and token != self.end:
                labels = [self.star]
            self._known[key] = tuple(labels), decoder.getstate()[0]
        return self._known[key]


class Prefix(NamedTuple):
    """The beginning of a text as the head hears it: `total` is the log-probability of all texts that begin so, with
    what the rest is expected to cost.

    `paths` (2, F + 1) is that of the text itself in the first 0 ... F frames, on paths that end in its last label and
    on those that end in a blank. `rest` holds the bytes of a character that is not whole yet.
    """

    total: float
    last: int  # label; the blank, if there is none yet
    paths: Tensor
    rest: bytes = b""

    def ended(self) -> "Prefix":
        """The same where nothing follows."""
        return self._replace(total=float(self.paths[:, -1].logsumexp(0)))


class PrefixScorer:
    """Follows the texts of one piece of audio through its log-probabilities `ctc` (F, K).

    Texts of as many tokens may have come to different frames. So the frames that are left count, too, `foresight` times
    what the head's best path through them costs: else what puts off a passage that is hard to hear would seem better
    than what has got over it. A text with a character that is no label, as no text that the head learned from has it,
    is impossible. The total of a text that has ended is its own log-probability.
    """

    def __init__(self, ctc: Tensor, spelling: Spelling, foresight: float = FORESIGHT) -> None:
        self._spelling = spelling
        self._emit = F.pad(ctc.double().cpu(), (0, 0, 1, 0))  # (F + 1, K): nothing in frame 0
        self._sums = self._emit.cumsum(0)
        best = self._emit.amax(1)
        rest = foresight * (best.sum() - best.cumsum(0))  # (F + 1,)
        self._losses = self._emit[1:] + rest[1:, None]  # (F, K) of each label in each frame, with what comes behind it
        nothing = torch.full_like(self._sums[:, BLANK], -torch.inf)
        self.start = Prefix(float(rest[0]), BLANK, torch.stack((nothing, self._sums[:, BLANK])))
        self._impossible = self.start._replace(total=-math.inf)

    def hopes(self, texts: Sequence[Prefix]) -> Tensor:
        """What each token would add to the total of each of n texts, by its first label alone: (n, V) float32.

        Without foresight no token adds more.
        """
        totals = torch.tensor([text.total for text in texts], dtype=torch.float64)
        paths = torch.stack([text.paths for text in texts])  # (n, 2, F + 1)
        found = (paths.logsumexp(1)[:, :-1, None] + self._losses).logsumexp(1)  # (n, K)
        again = torch.tensor([text.last for text in texts])
        found[range(len(texts)), again] = (paths[:, 1, :-1] + self._losses[:, again].T).logsumexp(1)
        found[:, BLANK] = totals
        gains = F.pad(found - totals[:, None], (0, 1), value=-torch.inf)  # the star is impossible
        gains[[i for i, text in enumerate(texts) if text.rest]] = 0.0
        return gains[:, self._spelling.first].float()

    def after(self, texts: Sequence[Prefix], tokens: Sequence[Sequence[int]]) -> list[list[Prefix]]:
        """Each of the n texts with each of its tokens behind it; an impossible one has the total -inf."""
        read = [[self._spelling.read(text.rest, x) for x in row] for text, row in zip(texts, tokens, strict=True)]
        wanted = [(i, labels) for i, row in enumerate(read) for labels, _ in row if self._spelling.star not in labels]
        known: dict[tuple[int, tuple[int, ...]], Prefix] = {(i, ()): text for i, text in enumerate(texts)}
        for length in range(1, 1 + max((len(labels) for _, labels in wanted), default=0)):
            # Tokens that begin alike share their beginning.
            new = list(dict.fromkeys((i, labels[:length]) for i, labels in wanted if len(labels) >= length))
            before = [known[i, labels[:-1]] for i, labels in new]
            known |= zip(new, self._extended(before, [labels[-1] for _, labels in new]), strict=True)
        return [
            [self._found(known.get((i, labels)), token, rest) for token, (labels, rest) in zip(*row, strict=True)]
            for i, row in enumerate(zip(tokens, read, strict=True))
        ]

    def _found(self, text: Prefix | None, token: int, rest: bytes) -> Prefix:
        if text is None:
            return self._impossible
        return text.ended() if token == self._spelling.end else text._replace(rest=rest)

    def _extended(self, texts: Sequence[Prefix], labels: Sequence[int]) -> list[Prefix]:
        """The texts with a label more each, all at once.

        The paths that are in a label at t are p(t) = (p(t - 1) + q(t - 1)) e(t), where q are those that enter it next;
        that is a cumulative sum of q / (e(1) ... e(t)).
        """
        paths = torch.stack([text.paths for text in texts])  # (n, 2, F + 1)
        again = torch.tensor([text.last == label for text, label in zip(texts, labels, strict=True)])
        entering = torch.where(again[:, None], paths[:, 1], torch.logaddexp(paths[:, 0], paths[:, 1]))
        at = torch.tensor(labels)
        totals = (entering[:, :-1] + self._losses[:, at].T).logsumexp(-1).tolist()
        spoken = _staying(entering, self._sums[:, at].T)
        silent = _staying(spoken, self._sums[:, BLANK].expand_as(spoken))
        return [Prefix(*found) for found in zip(totals, labels, torch.stack((spoken, silent), 1), strict=True)]


def _staying(entering: Tensor, sums: Tensor) -> Tensor:
    """Log-probabilities (n, F + 1) of being in a label that adds up to `sums`, entered a frame after `entering`."""
    found = (entering - sums)[:, :-1].logcumsumexp(-1) + sums[:, 1:]
    return F.pad(found, (1, 0), value=-torch.inf)
