"""Which words of a text that grows are certain: two readings agree on them, they ended a while ago, they were heard."""

from collections.abc import Sequence
from dataclasses import replace

from rwkv_speech.decoding.results import Word

# A word that the CTC head finds less probable than this waits so many times as long: it may be a guess of the language
# model, which finishes a sentence that it has heard half of.
_SURE, _UNSURE_WAIT = 0.5, 3


class Agreement:
    """The committed words of the piece of audio that is being spoken; they only grow.

    A word is committed when it ended `hold` seconds before the end of the audio at least, the reading before found it
    in the same place, and all words before it are committed. Source: LocalAgreement-2 of whisper_streaming (Macháček
    et al. 2023, arXiv:2307.14743), to which the word's end and its probability are added.
    """

    def __init__(self, hold: float) -> None:
        self._hold = hold
        self.committed: list[Word] = []
        self._before: list[str] = []  # the words of the last reading

    def add(self, words: Sequence[Word], now: float) -> list[Word]:
        """The newly committed of the `words` of a reading of the audio up to the second `now`.

        The first words are those that are committed, whatever they are now called and placed.
        """
        names, done = [word.word for word in words], len(self.committed)
        end = done
        while end < min(len(names), len(self._before)) and names[end] == self._before[end]:
            wait = self._hold if words[end].probability >= _SURE else _UNSURE_WAIT * self._hold
            if words[end].end > now - wait:
                break
            end += 1
        self._before = names
        self.committed += words[done:end]
        return list(words[done:end])

    def end_piece(self, end: float = float("inf")) -> list[Word]:
        """The committed words whose middle lies before the second `end`; the others are the next piece's first."""
        ended = [word for word in self.committed if (word.start + word.end) / 2 < end]
        self.committed, self._before = self.committed[len(ended) :], []
        if self.committed:
            first = self.committed[0]
            self.committed[0] = replace(first, word=first.word.lstrip())  # a text begins with it
        return ended
