"""Speech recognition: word error rate, or that of characters where words are not spaced."""

# U utterances

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.bootstrap import Floats, Interval, Numbers
from rwkv_speech.scoring.measure import Measure, percent
from rwkv_speech.scoring.metrics import Counts, Scores, Tally, tally_rows
from rwkv_speech.text import UNSPACED


@dataclass(frozen=True)
class ErrorRates(Measure):
    """What was counted of words and characters; `unspaced` where most letters are of scripts without blanks."""

    tally: Tally
    unspaced: bool = False

    is_error: ClassVar[bool] = True
    head: ClassVar[tuple[str, ...]] = ("words", "WER", "substituted", "inserted", "deleted", "CER")

    @classmethod
    def of(cls, rows: Sequence[Row], form: str) -> "ErrorRates":
        """Of result rows, in a form of text.NORMALIZERS."""
        return cls(tally_rows(rows, form), mostly_unspaced(row.ref for row in rows))

    @property
    def name(self) -> str:
        """CER where words are not spaced."""
        return "CER" if self.unspaced else "WER"

    @property
    def counts(self) -> Numbers:
        """Edits, and units of the references."""
        counted = self.tally.characters if self.unspaced else self.tally.words
        return np.stack([counted[:, 1:].sum(1), counted[:, [0, 1, 3]].sum(1)], 1)

    def rates(self, sums: Numbers) -> Floats:
        """Edits as a fraction of the references' units; of 1 where they have none."""
        return sums[:, 0] / np.maximum(1, sums[:, 1])

    @property
    def costs(self) -> Floats:
        """Wrong, additional and missing words, or characters."""
        return self.counts[:, 0].astype(float)

    def cost(self, difference: float) -> str:
        """So many words, or characters."""
        return f"{difference:+.0f} {'characters' if self.unspaced else 'words'}"

    def verdicts(self) -> list[str]:
        """The rate, where there is one, and the number of errors."""
        counted = zip(self.errors, *self.counts.T.tolist(), strict=True)
        return [
            f"{f'{self.name} {100 * error:.0f} %, ' if size else ''}{wrong} {'error' if wrong == 1 else 'errors'}"
            for error, wrong, size in counted
        ]

    def part(self, mask: NDArray[np.bool_]) -> "ErrorRates":
        """Of some utterances."""
        return ErrorRates(self.tally.where(mask), self.unspaced)

    @property
    def scores(self) -> Scores:
        """The sums over all utterances."""
        return self.tally.scores()

    @property
    def defined(self) -> bool:
        """Whether the references have a word."""
        return self.scores.words.ref_length > 0

    def numbers(self) -> dict[str, Any]:
        """Rates and counts; a rate is null where the references have no word."""
        scores = self.scores
        return {
            "wer": _rate(scores.words),
            "cer": _rate(scores.characters),
            "mean_utterance_wer": scores.mean_utterance_wer,
            "words": {**asdict(scores.words), "ref_length": scores.words.ref_length},
            "characters": {**asdict(scores.characters), "ref_length": scores.characters.ref_length},
        }

    def lines(self, interval: Interval) -> list[str]:
        """Both rates with their edits, that which counts first."""
        s = self.scores
        if not self.defined:
            return [f"WER is not defined: the references have no words; {s.words.insertions:,} were recognised"]
        counted = {"WER": s.words, "CER": s.characters}
        main, other = ("CER", "WER") if self.unspaced else ("WER", "CER")
        return [
            f"{self.main(interval)}   {edits(counted[main])}",
            f"{other} {percent(counted[other].rate)}   {edits(counted[other])}",
            f"mean of per-utterance WER {percent(s.mean_utterance_wer)}   (to compare with older reports)",
        ]

    def cells(self) -> tuple[str, ...]:
        """As `head` says."""
        s, words = self.scores, self.scores.words
        edited = (f"{n:,}" for n in (words.substitutions, words.insertions, words.deletions))
        return f"{words.ref_length:,}", percent(s.wer), *edited, percent(s.cer)


def mostly_unspaced(texts: Any) -> bool:
    """Whether more than half of the letters are of scripts that are written without blanks between words."""
    letters = "".join(filter(str.isalnum, "".join(texts)))
    return 2 * sum(1 for _ in UNSPACED.finditer(letters)) > len(letters)


def edits(counts: Counts) -> str:
    """What was wrong, in words."""
    return f"(substitutions {counts.substitutions:,}, insertions {counts.insertions:,}, deletions {counts.deletions:,})"


def _rate(counts: Counts) -> float | None:
    return counts.rate if counts.ref_length else None
