"""Closed sets, as emotions or languages: accuracy, F1, recall and the confusion of classes."""

# U utterances · C classes

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.bootstrap import Floats, Interval, Numbers
from rwkv_speech.scoring.measure import Measure, percent
from rwkv_speech.text import normalise_score

NO_CLASS = "no class"


@dataclass(frozen=True)
class Classes(Measure):
    """The names of C classes, and of each row the number of the right one (U,) and of that found (U,), C for none."""

    names: tuple[str, ...]
    right: NDArray[np.int64]
    found: NDArray[np.int64]

    head: ClassVar[tuple[str, ...]] = ("accuracy", "weighted F1", "mean recall")

    @classmethod
    def of(cls, rows: Sequence[Row], form: str) -> "Classes":
        """Of result rows, whatever the form: the classes are the references, without case and punctuation."""
        refs, hyps = ([normalise_score(getattr(row, name)) for row in rows] for name in ("ref", "hyp"))
        places = {name: place for place, name in enumerate(sorted(set(refs)))}
        also = [set(map(normalise_score, row.answers)) for row in rows]
        found = [
            places[ref] if hyp in others else places.get(hyp, len(places))
            for ref, hyp, others in zip(refs, hyps, also, strict=True)
        ]
        return cls(tuple(places), np.array([places[ref] for ref in refs]), np.array(found))

    @property
    def name(self) -> str:
        """The share of right ones."""
        return "accuracy"

    @property
    def counts(self) -> Numbers:
        """Wrong ones, and all."""
        return np.stack([self.right != self.found, np.ones(len(self.right), bool)], 1).astype(np.int64)

    def rates(self, sums: Numbers) -> Floats:
        """1 - accuracy."""
        return sums[:, 0] / np.maximum(1, sums[:, 1])

    def verdicts(self) -> list[str]:
        """Right or wrong."""
        return ["right" if right else "wrong" for right in self.right == self.found]

    def part(self, mask: NDArray[np.bool_]) -> "Classes":
        """Of some utterances."""
        return Classes(self.names, self.right[mask], self.found[mask])

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """How often a class (row) was taken for which (column), the last for none: (C, C + 1)."""
        counts = np.zeros((len(self.names), len(self.names) + 1), np.int64)
        np.add.at(counts, (self.right, self.found), 1)
        return counts

    @property
    def weighted_f1(self) -> float:
        """The mean of the classes' F1, each as heavy as it is frequent."""
        hits, right, found = np.diag(self.confusion), self.confusion.sum(1), self.confusion.sum(0)[:-1]
        return float((2 * hits / np.maximum(1, right + found) * right).sum() / right.sum())

    @property
    def mean_recall(self) -> float:
        """The mean of the classes' recall, each as heavy as the others: unweighted accuracy."""
        right = self.confusion.sum(1)
        return float((np.diag(self.confusion)[right > 0] / right[right > 0]).mean())

    @property
    def majority(self) -> tuple[str, float]:
        """The most frequent class, and its share: what one gets without listening."""
        right = self.confusion.sum(1)
        return self.names[int(right.argmax())], float(right.max() / right.sum())

    @property
    def no_class(self) -> int:
        """How many texts are the name of no class."""
        return int(self.confusion[:, -1].sum())

    def numbers(self) -> dict[str, Any]:
        """Fractions of 1, and the confusion of classes in the order of their names."""
        name, share = self.majority
        return {
            "accuracy": 1 - self.error,
            "weighted_f1": self.weighted_f1,
            "mean_recall": self.mean_recall,
            "majority_class": name,
            "majority_accuracy": share,
            "no_class": self.no_class,
            "classes": list(self.names),
            "confusion": self.confusion.tolist(),
        }

    def lines(self, interval: Interval) -> list[str]:
        """All rates, and what the commonest class would get."""
        name, share = self.majority
        lines = [
            f"{self.main(interval)}   weighted F1 {percent(self.weighted_f1)}   "
            f"mean recall of {len(self.names)} classes {percent(self.mean_recall)}",
            f"always {name!r:.60}: accuracy {percent(share)}",
        ]
        return lines + ([f"{self.no_class:,} texts name no class"] if self.no_class else [])

    def cells(self) -> tuple[str, ...]:
        """As `head` says."""
        return self.shown(self.error), percent(self.weighted_f1), percent(self.mean_recall)
