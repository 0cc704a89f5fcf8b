"""Draft and verify: a likely text is read in one pass, and kept as far as the model would have written it."""

# T tokens of a pass · V vocabulary

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.decoding.strategy import Hypothesis, Strategy, Track
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.state import State
from rwkv_speech.tokenizer import WorldTokenizer

# After so many passes in which nothing of the draft was right the rest is written token by token.
_PATIENCE = 3
# How far, in bytes, a draft may run ahead of the text or lag behind it.
_SLACK = 48


class Verifier:
    """Writes the text of a track from a draft in few passes, and as greedy decoding would.

    A token of the draft is kept while it is the one that greedy decoding takes. Where it is not, that one is taken, and
    the draft goes on from where it fits the text so far best, with the tokens that the model would rather have seen in
    it. A pass reads from the last state that holds nothing but what was kept. Starts from the logits (1, V) and the
    state of the prefill.
    """

    def __init__(
        self, model: SpeechLM, strategy: Strategy, track: Track, draft: str, logits: Tensor, state: State
    ) -> None:
        self._lm, self._strategy, self.track = model.lm, strategy, track
        self._draft = Draft(draft, model.tokenizer)
        self._unread: list[int] = []  # chosen, and not yet in the state
        self._failed = 0
        self.ended: Hypothesis | None = None
        self.logits, self.state = logits, state
        self._keep(logits)

    @property
    def drafts(self) -> bool:
        """Whether the next pass reads a draft; else the text is to go on token by token, from `logits` and `state`."""
        return bool(self._draft.tokens) and self._failed < _PATIENCE

    def advance(self) -> None:
        """One pass over what is unread and, while it is of use, the draft."""
        draft = self._draft.tokens if self.drafts else []
        tokens = torch.tensor([*self._unread, *draft], device=self.logits.device)
        state = State(*(x.clone() for x in self.state))
        logits = self._lm.step(tokens, state, slots=torch.zeros_like(tokens))[len(self._unread) - 1 :]
        if not draft:
            self.logits, self.state, self._unread = logits, state, []
        elif self._keep(logits):
            self.state, self._unread = state, self._unread[-1:]

    def _keep(self, logits: Tensor) -> bool:
        """Take a token from each of the logits (T, V) while the draft's are the same; whether all of them were."""
        draft = self._draft.tokens
        choices = self._strategy.verify(logits, self.track, draft)
        for row, choice in enumerate(choices):
            self.ended = self._strategy.take(self.track, choice)
            if self.ended:
                return False
            self._unread.append(choice.token)
            if row == len(draft) or choice.token != draft[row]:
                self._failed = self._failed + 1 if row == 0 else 0
                self._draft.go_on(self.track.ids, [choice.token for choice in choices])
                return row == len(draft)
        self._draft.drop(len(logits))
        return True


class Draft:
    """The `tokens` of a text that may follow, and how they go on after another text than theirs."""

    def __init__(self, text: str, tokenizer: WorldTokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokenizer.encode(text.encode("utf-8", "replace").decode())
        self._whole = tokenizer.decode_bytes(self.tokens)
        self._start = 0  # of the tokens, in the whole
        # Where text and draft were the same before: their last places are where the next comparison begins.
        self._met: deque[tuple[int, int]] = deque([(0, 0)], maxlen=3)

    def drop(self, count: int) -> None:
        """Leave out the first tokens, which the text has."""
        self._start += len(self._tokenizer.decode_bytes(self.tokens[:count]))
        self.tokens = self.tokens[count:]

    def go_on(self, ids: Sequence[int], likely: Sequence[int]) -> None:
        """Go on after the text `ids`; `likely` are the tokens that the model would have written in place of each."""
        text = self._tokenizer.decode_bytes(ids)
        text_from, draft_from = self._met[0]
        place = draft_from + fit(text[text_from:], self._whole[draft_from:])
        self._met.append((len(text), place))
        tokens, start, at = self.tokens, self._start, 0
        while at < len(tokens) and start < place:
            start += len(self._tokenizer.decode_bytes(tokens[at : at + 1]))
            at += 1
        if start == place:
            self.tokens = self._corrected(tokens[at:], likely[at:])
        else:
            self.tokens = self._tokenizer.encode(self._whole[place:].decode("utf-8", "replace"))
        self._whole = self._whole[:place] + self._tokenizer.decode_bytes(self.tokens)
        self._start = place

    def _corrected(self, tokens: Sequence[int], likely: Sequence[int]) -> list[int]:
        """The tokens, but for words that the model would rather have spelt another way."""
        found, at, of = list[int](), 0, self._tokenizer.decode_bytes
        while at < len(tokens):
            end = at + 1  # of the word
            while end < len(tokens) and of(tokens[end : end + 1])[:1].isalnum():
                end += 1
            word, better = tokens[at:end], likely[at : at + 1]
            close = len(of(word)) // 2
            if better and better[0] != word[0] and distances(of(better), of(word))[-1] <= close:
                word = better
            found += word
            at = end
        return found


def fit(text: bytes, draft: bytes) -> int:
    """How many bytes of the draft the text stands for: those that have the smallest edit distance from it.

    Of several beginnings of the draft it is one that ends with a word, and of these the longest.
    """
    same = next((i for i, (a, b) in enumerate(zip(text, draft, strict=False)) if a != b), min(len(text), len(draft)))
    draft = draft[: len(text) + _SLACK]
    rest = draft[same:]
    costs = [2 * d + (rest[i : i + 1] not in (b"", b" ")) for i, d in enumerate(distances(text[same:], rest).tolist())]
    place = len(draft) - min(range(len(costs)), key=costs[::-1].__getitem__)
    while place < len(draft) and draft[place] & 0xC0 == 0x80:  # within a character
        place += 1
    return place


def distances(text: bytes, draft: bytes) -> NDArray[np.int64]:
    """The edit distance of a text from each beginning of a draft, the empty one first (Levenshtein 1966)."""
    letters, places = np.frombuffer(draft, np.uint8), np.arange(len(draft) + 1)
    row = places
    for byte in text:
        kept = row + 1  # a byte that the draft has not
        kept[1:] = np.minimum(kept[1:], row[:-1] + (letters != byte))
        # Bytes of the draft that are left out: each costs one more than the place before.
        row = np.minimum.accumulate(kept - places) + places
    return row
