"""Draft and verify: a likely text is read in one pass, and kept as far as the model would have written it."""

# T tokens of a pass · V vocabulary

import numpy as np
import torch
from torch import Tensor

from rwkv_speech.decoding.strategy import Hypothesis, Strategy, Track
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.state import State
from rwkv_speech.tokenizer import WorldTokenizer

# After so many passes in which nothing of the draft was right the rest is written token by token.
_PATIENCE = 3


class Verifier:
    """Writes the text of a track from a draft in few passes, and as greedy decoding would.

    A token of the draft is kept while it is the one that greedy decoding takes. Where it is not, that one is taken, and
    the draft goes on from where it fits the text so far best. A pass reads from the last state that holds nothing but
    what was kept. Starts from the logits (1, V) and the state of the prefill.
    """

    def __init__(
        self, model: SpeechLM, strategy: Strategy, track: Track, draft: str, logits: Tensor, state: State
    ) -> None:
        self._lm, self._strategy, self.track = model.lm, strategy, track
        self._rest = Rest(draft, model.tokenizer)
        self._draft = self._rest.after(b"")
        self._unread: list[int] = []  # chosen, and not yet in the state
        self._failed = 0
        self.ended: Hypothesis | None = None
        self.logits, self.state = logits, state
        self._keep(logits)

    @property
    def drafts(self) -> bool:
        """Whether the next pass reads a draft; else the text is to go on token by token, from `logits` and `state`."""
        return bool(self._draft) and self._failed < _PATIENCE

    def advance(self) -> None:
        """One pass over what is unread and, while it is of use, the draft."""
        draft = self._draft if self.drafts else []
        tokens = torch.tensor([*self._unread, *draft], device=self.logits.device)
        state = State(*(x.clone() for x in self.state))
        logits = self._lm.step(tokens, state, slots=torch.zeros_like(tokens))[len(self._unread) - 1 :]
        if not draft:
            self.logits, self.state, self._unread = logits, state, []
        elif self._keep(logits):
            self.state, self._unread = state, self._unread[-1:]

    def _keep(self, logits: Tensor) -> bool:
        """Take a token from each of the logits (T, V) while the draft's are the same; whether all of them were."""
        draft = self._draft
        for row, choice in enumerate(self._strategy.verify(logits, self.track, draft)):
            self.ended = self._strategy.take(self.track, choice)
            if self.ended:
                return False
            self._unread.append(choice.token)
            if row == len(draft) or choice.token != draft[row]:
                self._failed = self._failed + 1 if row == 0 else 0
                self._draft = self._rest.after(self._rest.tokenizer.decode_bytes(self.track.ids))
                return row == len(draft)
        self._draft = draft[len(logits) :]
        return True


class Rest:
    """What of a draft is left after a text that differs from it.

    The text fits best to that beginning of the draft from which it has the smallest edit distance: of several one that
    ends with a word, and of these the longest. A row of the table of distances is kept; each byte of the text adds one.
    """

    def __init__(self, draft: str, tokenizer: WorldTokenizer) -> None:
        self.tokenizer = tokenizer
        self._draft = draft.encode("utf-8", "replace")
        self._bytes = np.frombuffer(self._draft, np.uint8)
        self._places = np.arange(len(self._draft) + 1)
        self._inside = np.append(self._bytes != ord(" "), False)  # a word, or at its first letter
        self._distances = self._places
        self._read = 0

    def after(self, text: bytes) -> list[int]:
        """The tokens of the rest; `text` goes on from that of the call before."""
        for byte in text[self._read :]:
            kept = self._distances + 1  # a byte that the draft has not
            kept[1:] = np.minimum(kept[1:], self._distances[:-1] + (self._bytes != byte))
            # Bytes of the draft that are left out: each costs one more than the place before.
            self._distances = np.minimum.accumulate(kept - self._places) + self._places
        self._read = len(text)
        costs = 2 * self._distances + self._inside
        place = len(self._draft) - int(costs[::-1].argmin())
        while place < len(self._draft) and self._draft[place] & 0xC0 == 0x80:  # within a character
            place += 1
        return self.tokenizer.encode(self._draft[place:].decode("utf-8", "replace"))
