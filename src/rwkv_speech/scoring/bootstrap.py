"""How far a WER may be off by the choice of the utterances: bootstrap intervals, of one system and of two.

After Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (ICASSP 2004), in the
form of Kaldi's compute-wer-bootci: mean and 1.96 standard deviations of the WER of resampled corpora.
"""

# U units that are resampled: speakers or utterances · K kinds of them · R replications

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rwkv_speech.scoring.metrics import Longs

REPLICATIONS = 10_000
_NORMAL_95 = 1.96
_AT_ONCE = 1_000_000  # numbers that are drawn at once: 8 MB


@dataclass(frozen=True)
class Interval:
    """Mean and 95 % confidence interval of a rate, as fractions; `units` are what was resampled, and how many."""

    mean: float
    ci95: float
    units: str
    num_units: int

    @property
    def ends(self) -> tuple[float, float]:
        """The interval's lower and upper end."""
        return self.mean - self.ci95, self.mean + self.ci95


@dataclass(frozen=True)
class Paired:
    """Two systems on the same utterances: the interval of B's WER less A's, and the shares of replications won."""

    difference: Interval
    a_wins: float
    b_wins: float


def interval(edits: Longs, ref_words: Longs, speakers: Sequence[str | None], seed: int = 0) -> Interval:
    """The interval of the WER of utterances with so many edits and reference words, both (U,).

    Speakers are resampled with all their utterances where each is known, else utterances.
    """
    units, name = _units(np.stack([edits, ref_words], 1), speakers)
    drawn = _resampled(units, seed)
    return _interval(drawn[:, 0] / np.maximum(1, drawn[:, 1]), name, len(units))


def paired(a: Longs, b: Longs, ref_words: Longs, speakers: Sequence[str | None], seed: int = 0) -> Paired:
    """Compare the edits of two systems, each (U,), on the same utterances, which are resampled as in `interval`."""
    units, name = _units(np.stack([a, b, ref_words], 1), speakers)
    edits_a, edits_b, words = _resampled(units, seed).T
    difference = (edits_b - edits_a) / np.maximum(1, words)
    return Paired(
        _interval(difference, name, len(units)), float((difference > 0).mean()), float((difference < 0).mean())
    )


def _interval(rates: NDArray[np.float64], units: str, num_units: int) -> Interval:
    return Interval(float(rates.mean()), _NORMAL_95 * float(rates.std()), units, num_units)


def _units(counts: Longs, speakers: Sequence[str | None]) -> tuple[Longs, str]:
    """What is resampled, (U, ...), and its name."""
    if None in speakers or len(set(speakers)) < 2:
        return counts, "utterances"
    _, numbers = np.unique(np.array(speakers, dtype=object), return_inverse=True)
    sums = np.zeros((numbers.max() + 1, counts.shape[1]), np.int64)
    np.add.at(sums, numbers, counts)
    return sums, "speakers"


def _resampled(units: Longs, seed: int) -> Longs:
    """The sums over U units drawn with replacement, REPLICATIONS times, (R, ...).

    Units of the same counts are of one kind: how often each kind is drawn is multinomial, which takes as much time for
    a million utterances as for thousands.
    """
    kinds, times = np.unique(units, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // len(kinds))
    sums = [
        generator.multinomial(len(units), times / len(units), size=min(rows, REPLICATIONS - start)) @ kinds
        for start in range(0, REPLICATIONS, rows)
    ]
    return np.concatenate(sums)
