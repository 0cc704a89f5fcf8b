"""How far a rate may be off by the choice of the utterances: bootstrap intervals, of one system and of two.

After Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (ICASSP 2004), in the
form of Kaldi's compute-wer-bootci: mean and 1.96 standard deviations of the rate of resampled corpora.
"""

# U units that are resampled: speakers or utterances · K numbers of each that are added up · R replications

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64] | Floats
Rates = Callable[[Numbers], Floats]  # (R, K) -> (R,)

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
    """Two systems on the same utterances: the interval of B's rate less A's, and the shares of replications won."""

    difference: Interval
    a_wins: float
    b_wins: float


def interval(counts: Numbers, rates: Rates, speakers: Sequence[str | None], seed: int = 0) -> Interval:
    """The interval of the rate of utterances with these counts (U, K), which `rates` makes of sums (R, K).

    Speakers are resampled with all their utterances where each is known, else utterances.
    """
    units, name = _units(counts, speakers)
    return _interval(rates(_resampled(units, seed)), name, len(units))


def paired(a: Numbers, b: Numbers, rates: Rates, speakers: Sequence[str | None], seed: int = 0) -> Paired:
    """Compare the counts of two systems, each (U, K), on the same utterances, which are resampled as in `interval`."""
    units, name = _units(np.concatenate([a, b], 1), speakers)
    sums_a, sums_b = np.split(_resampled(units, seed), 2, axis=1)
    difference = rates(sums_b) - rates(sums_a)
    return Paired(
        _interval(difference, name, len(units)), float((difference > 0).mean()), float((difference < 0).mean())
    )


def _interval(rates: Floats, units: str, num_units: int) -> Interval:
    return Interval(float(rates.mean()), _NORMAL_95 * float(rates.std()), units, num_units)


def _units(counts: Numbers, speakers: Sequence[str | None]) -> tuple[Numbers, str]:
    """What is resampled, (U, K), and its name."""
    if None in speakers or len(set(speakers)) < 2:
        return counts, "utterances"
    _, numbers = np.unique(np.array(speakers, dtype=object), return_inverse=True)
    sums = np.zeros((numbers.max() + 1, counts.shape[1]), counts.dtype)
    np.add.at(sums, numbers, counts)
    return sums, "speakers"


def _resampled(units: Numbers, seed: int) -> Floats:
    """The sums over U units drawn with replacement, REPLICATIONS times, (R, K).

    Units of the same counts are of one kind: how often each kind is drawn is multinomial, which takes as much time for
    a million utterances as for thousands.
    """
    kinds, times = np.unique(units, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // len(kinds))
    sums = [
        generator.multinomial(len(units), times / len(units), size=min(rows, REPLICATIONS - start))
        @ kinds.astype(float)
        for start in range(0, REPLICATIONS, rows)
    ]
    return np.concatenate(sums)
