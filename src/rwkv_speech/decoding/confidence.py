"""How sure a recognised word is: from what the language model thought of it, and from whether the CTC head agrees.

The highest probability alone is over-confident; entropies and a second opinion are what tells wrong words. What they
are worth is fitted on validation data and kept in the checkpoint. Entropies: Laptev and Ginsburg 2022,
arXiv:2212.08703.
"""

# F frames · K labels of the CTC head, of which 0 is the blank · U characters of a word · n words

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_speech.models.ctc import BLANK

# Beyond these a word is wrong anyhow; without a bound a few words would decide what is fitted.
_LEAST_LOGPROB, _MOST_ENTROPY = -10.0, 10.0
_RIDGE = 1e-3  # per word: keeps the weights finite where the two kinds can be told apart without an error


class Evidence(NamedTuple):
    """What speaks for a word, the higher the better but for `entropy`."""

    logprob: float  # of its tokens together, by the language model
    entropy: float  # the highest of its tokens, nats
    margin: float  # per character: log-probability of its best path less that of the CTC head's own in the same frames
    likeness: float  # of its characters and those that the CTC head itself finds in its frames, 0 to 1


def evidence(
    logprobs: Sequence[float],
    entropies: Sequence[float],
    log_probs: NDArray[np.float32],
    labels: Sequence[int],
    frames: NDArray[np.int64] | None,
) -> Evidence:
    """Of a word from its tokens' log-probabilities and entropies, and the CTC head's log-probabilities (F, K).

    `labels` are those of its U characters, `frames` (U, 2) the first and the last frame of each, None if there is no
    room for them.
    """
    logprob = max(sum(logprobs), _LEAST_LOGPROB)
    entropy = min(max(entropies, default=_MOST_ENTROPY), _MOST_ENTROPY)
    if frames is None or not len(labels):
        return Evidence(logprob, entropy, _LEAST_LOGPROB, 0.0)
    first, last = int(frames[0, 0]), int(frames[-1, 1])
    path = np.full(last + 1 - first, BLANK)
    for label, (start, end) in zip(labels, frames - first, strict=True):
        path[start : end + 1] = label
    there = log_probs[first : last + 1]
    best = there.argmax(1)
    path = np.where(path == there.shape[1], best, path)  # a character without a label is whatever is heard
    places = np.arange(len(path))
    margin = float((there[places, path] - there[places, best]).sum()) / len(labels)
    around = log_probs[max(0, first - 1) : last + 2].argmax(1)
    heard = around[np.flatnonzero(np.diff(around, prepend=BLANK) != 0)]
    likeness = SequenceMatcher(None, [x for x in heard.tolist() if x != BLANK], list(labels), autojunk=False).ratio()
    return Evidence(logprob, entropy, max(margin, _LEAST_LOGPROB), likeness)


@dataclass(frozen=True)
class Calibration:
    """What each part of the evidence is worth: the logarithm of the odds that the word is right is their sum."""

    bias: float
    logprob: float
    entropy: float
    margin: float
    likeness: float

    def probability(self, found: Evidence) -> float:
        """That a word is right."""
        odds = self.bias + self.logprob * found.logprob + self.entropy * found.entropy
        odds += self.margin * found.margin + self.likeness * found.likeness
        return 1 / (1 + math.exp(-min(max(odds, -30.0), 30.0)))


def probability(found: Evidence, calibration: Calibration | None) -> float:
    """That a word is right; without a calibration the language model's probability of its tokens."""
    return math.exp(found.logprob) if calibration is None else calibration.probability(found)


def fit(found: Sequence[Evidence], right: Sequence[bool]) -> Calibration:
    """A logistic regression of whether a word is right, by Newton's method; needs words of both kinds."""
    values, target = np.array(found, np.float64), np.array(right, np.float64)
    mean, spread = values.mean(0), values.std(0) + 1e-9
    x = np.c_[np.ones(len(values)), (values - mean) / spread]
    ridge = np.diag([0.0, *[_RIDGE * len(x)] * values.shape[1]])
    weights = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ weights))
        gradient = x.T @ (p - target) + ridge @ weights
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + ridge + 1e-9 * np.eye(len(weights)), gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    slopes = weights[1:] / spread
    return Calibration(float(weights[0] - slopes @ mean), *map(float, slopes))
