"""Questions: exact match and token F1 as SQuAD defines them, over the best of the right answers.

Rajpurkar et al., "Know What You Don't Know" (ACL 2018), https://rajpurkar.github.io/SQuAD-explorer: the rules of its
evaluation script. Beyond English, punctuation of all scripts is dropped, and scripts without blanks are split.
"""

# U utterances

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.bootstrap import Floats, Interval, Numbers
from rwkv_speech.scoring.measure import Measure, percent
from rwkv_speech.text import UNSPACED

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation and the articles a, an and the, single blanks."""
    kept = (x for x in text.lower() if x not in string.punctuation and not unicodedata.category(x).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", "".join(kept)).split())


def token_f1(answer: str, right: str) -> float:
    """F1 of the tokens of two normalised answers; an empty one is as good as its equal alone."""
    found, wanted = (UNSPACED.sub(r" \g<0> ", text).split() for text in (answer, right))
    if not (found and wanted):
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


@dataclass(frozen=True)
class Answers(Measure):
    """Of each row its normalised right answers, whether its own is one of them (U,), and its F1 (U,)."""

    right: Sequence[tuple[str, ...]]
    exact: NDArray[np.bool_]
    f1: Floats

    head: ClassVar[tuple[str, ...]] = ("F1", "exact match")

    @classmethod
    def of(cls, rows: Sequence[Row], form: str) -> "Answers":
        """Of result rows, whose references stand for the right answers where they have none; whatever the form."""
        right = [tuple(map(normalise_answer, row.answers or [row.ref])) for row in rows]
        hyps = [normalise_answer(row.hyp) for row in rows]
        exact = [hyp in answers for hyp, answers in zip(hyps, right, strict=True)]
        f1 = [max(token_f1(hyp, x) for x in answers) for hyp, answers in zip(hyps, right, strict=True)]
        return cls(right, np.array(exact, bool), np.array(f1, float))

    @property
    def name(self) -> str:
        """The mean over questions."""
        return "F1"

    @property
    def counts(self) -> Numbers:
        """What is missing to 1, and one question."""
        return np.stack([1 - self.f1, np.ones(len(self.f1))], 1)

    def rates(self, sums: Numbers) -> Floats:
        """1 - F1."""
        return sums[:, 0] / np.maximum(1, sums[:, 1])

    def part(self, mask: NDArray[np.bool_]) -> "Answers":
        """Of some utterances."""
        right = [answers for answers, wanted in zip(self.right, mask, strict=True) if wanted]
        return Answers(right, self.exact[mask], self.f1[mask])

    @property
    def exact_match(self) -> float:
        """The share of answers that are right as they stand."""
        return float(self.exact.mean())

    @cached_property
    def majority(self) -> tuple[str, float]:
        """The answer that is right most often, and how often: what one gets without listening."""
        times = Counter(answer for answers in self.right for answer in set(answers))
        answer, count = min(times.items(), key=lambda item: (-item[1], item[0]))
        return answer, count / len(self.right)

    def numbers(self) -> dict[str, Any]:
        """Fractions of 1."""
        answer, share = self.majority
        return {
            "f1": 1 - self.error,
            "exact_match": self.exact_match,
            "majority_answer": answer,
            "majority_exact_match": share,
        }

    def lines(self, interval: Interval) -> list[str]:
        """Both scores, and what the commonest answer would get."""
        answer, share = self.majority
        return [
            f"{self.main(interval)}   exact match {percent(self.exact_match)}",
            f"always answering {answer!r:.60}: exact match {percent(share)}",
        ]

    def report(self) -> str:
        """Both scores."""
        return f"{super().report()} exact match {percent(self.exact_match)}"

    def cells(self) -> tuple[str, ...]:
        """As `head` says."""
        return self.shown(self.error), percent(self.exact_match)
