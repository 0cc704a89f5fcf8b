"""How far confidences can be trusted: calibration error, whether they tell wrong words from right ones, and a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jiwer
import numpy as np

from rwkv_speech.decoding.timestamps import split_words
from rwkv_speech.text import normalise_score

BINS = 15


@dataclass(frozen=True)
class Bin:
    """The words whose confidence lies in one of the equal parts of 0 to 1."""

    words: int
    confidence: float  # their mean
    right: float  # the share of them that is right


@dataclass(frozen=True)
class Reliability:
    """The confidences of `words` words, of which some are `wrong`.

    `ece`: the expected calibration error, over 15 bins (Guo et al. 2017, arXiv:1706.04599). `auc`: how often a right
    word has the higher confidence of a right and a wrong one, ties counting half; None where all are right or all
    wrong. `nce`: the part of the uncertainty that confidences take away from the mere share of right words, at most 1
    (normalised cross-entropy, NIST; Siu and Gish 1999); None likewise.
    """

    words: int
    wrong: int
    ece: float
    auc: float | None
    nce: float | None
    bins: tuple[Bin, ...]

    def report(self) -> str:
        """One line of it."""
        known = [f"ECE {self.ece:.3f}"]
        known += [f"{name} {value:.3f}" for name, value in (("AUC", self.auc), ("NCE", self.nce)) if value is not None]
        return f"{', '.join(known)} ({self.words} words, {self.wrong} wrong)"

    def table(self) -> str:
        """A line for each part of 0 to 1 that holds words."""
        rows = [f"{x.confidence:10.3f}  {x.right:5.3f}  {x.words:6}" for x in self.bins if x.words]
        return "\n".join(["confidence  right   words", *rows])


def reliability(confidences: Sequence[float], right: Sequence[bool]) -> Reliability:
    """Of words with their confidences, 0 to 1, and whether each is right; raises ValueError for none at all."""
    p, is_right = np.asarray(confidences, np.float64), np.asarray(right, bool)
    if not len(p):
        raise ValueError("no words")
    places = np.minimum((p * BINS).astype(int), BINS - 1)
    inside = [places == place for place in range(BINS)]
    bins = tuple(
        Bin(int(x.sum()), float(p[x].mean()), float(is_right[x].mean())) if x.any() else Bin(0, 0, 0) for x in inside
    )
    ece = sum(part.words * abs(part.confidence - part.right) for part in bins) / len(p)
    both = 0 < is_right.sum() < len(p)
    return Reliability(
        len(p), int((~is_right).sum()), float(ece), _auc(p, is_right) if both else None,
        _nce(p, is_right) if both else None, bins,
    )  # fmt: skip


def _auc(p: np.ndarray, is_right: np.ndarray) -> float:
    """By the ranks of the right ones: Mann and Whitney's U."""
    _, places, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    num_right = is_right.sum()
    above = ranks[is_right].sum() - num_right * (num_right + 1) / 2
    return float(above / (num_right * (len(p) - num_right)))


def _nce(p: np.ndarray, is_right: np.ndarray) -> float:
    def entropy(of: np.ndarray) -> float:
        inside = of.clip(1e-6, 1 - 1e-6)
        return float(-np.where(is_right, np.log(inside), np.log1p(-inside)).sum())

    return 1 - entropy(p) / entropy(np.full_like(p, is_right.mean()))


def right_words(words: Sequence[str], reference: str) -> list[bool | None]:
    """Whether each word is right, aligned with the reference's as for scores; None for one that scores leave out."""
    pieces = [normalise_score(word).split() for word in words]
    hyp = [piece for parts in pieces for piece in parts]
    ref = [piece for word in split_words(reference) for piece in normalise_score(word).split()]
    is_equal = [False] * len(hyp)
    for chunk in jiwer.process_words([" ".join(ref)], [" ".join(hyp)]).alignments[0]:
        if chunk.type == "equal":
            is_equal[chunk.hyp_start_idx : chunk.hyp_end_idx] = [True] * (chunk.hyp_end_idx - chunk.hyp_start_idx)
    bounds = pairwise(np.cumsum([0, *map(len, pieces)]).tolist())
    return [all(is_equal[a:b]) if b > a else None for a, b in bounds]
