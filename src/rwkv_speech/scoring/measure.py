"""What a task's results are measured by: the one interface of all measures."""

# U utterances · K numbers that are added up · R sums of them

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from rwkv_speech.scoring.bootstrap import Floats, Interval, Numbers


class Measure(ABC):
    """What was counted of each of a task's utterances.

    Its main number, of this `name`, is the error itself where `is_error`, else what is left of 1; `unit` stands behind
    it. `head` names the columns of `cells`.
    """

    is_error: ClassVar[bool] = False
    unit: ClassVar[str] = " %"
    head: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def name(self) -> str:
        """What the main number is called."""

    @property
    @abstractmethod
    def counts(self) -> Numbers:
        """What is added up over utterances, (U, K)."""

    @abstractmethod
    def rates(self, sums: Numbers) -> Floats:
        """The errors that sums of counts (R, K) stand for, (R,): 0 where all is right."""

    @abstractmethod
    def part(self, mask: NDArray[np.bool_]) -> Self:
        """The same of the utterances for which `mask` (U,) is true."""

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """All numbers, for JSON."""

    @abstractmethod
    def lines(self, interval: Interval) -> list[str]:
        """What eval.py prints, the main number with its interval first."""

    @abstractmethod
    def cells(self) -> tuple[str, ...]:
        """The row of a table."""

    @property
    def error(self) -> float:
        """That of all utterances, by which checkpoints are chosen."""
        return float(self.rates(self.counts.sum(0)[None])[0])

    @property
    def errors(self) -> Floats:
        """Each utterance's own, (U,)."""
        return self.rates(self.counts)

    @property
    def costs(self) -> Floats:
        """What makes one utterance worse than another, (U,)."""
        return self.errors

    def cost(self, difference: float) -> str:
        """A difference of costs as people are shown it."""
        return f"{100 * difference:+.0f} %"

    def verdicts(self) -> list[str]:
        """What is said of each utterance, (U,)."""
        return [f"{self.name} {self.shown(error)}" for error in self.errors]

    @property
    def defined(self) -> bool:
        """Whether there is anything to measure."""
        return True

    def shown(self, error: float) -> str:
        """The main number as people are shown it."""
        return f"{100 * (error if self.is_error else 1 - error):.2f}{self.unit}"

    def main(self, interval: Interval) -> str:
        """Name, main number and its interval."""
        return f"{self.name} {self.shown(self.error)} ± {100 * interval.ci95:.2f}{self.unit}"

    def report(self) -> str:
        """Name and main number."""
        return f"{self.name} {self.shown(self.error)}" if self.defined else f"{self.name} -"


def percent(fraction: float) -> str:
    """A rate as people are shown it."""
    return f"{100 * fraction:.2f} %"
