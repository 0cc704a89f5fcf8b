"""How sure a recognised word is: from what the language model thought of it, and from whether the CTC head agrees.

The highest probability alone is over-confident; entropies and a second opinion are what tells wrong words. What they
are worth is fitted on validation data and kept in the checkpoint. Entropies: Laptev and Ginsburg 2022,
arXiv:2212.08703.
"""

# F frames · K labels of the CTC head, of which 0 is the blank · U characters of a word · n words

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.decoding.strategy import Hypothesis
from rwkv_speech.decoding.timestamps import Heard, Judge
from rwkv_speech.models.ctc import BLANK
from rwkv_speech.models.speech_lm import SpeechLM

# Beyond these a word is wrong anyhow; without a bound a few words would decide what is fitted.
_LEAST_LOGPROB, _MOST_ENTROPY = -10.0, 10.0
_RIDGE = 1e-3  # per word: keeps the weights finite where the two kinds can be told apart without an error


class Evidence(NamedTuple):
    """What speaks for a word, the higher the better but for `entropy`."""

    logprob: float  # of its tokens together, by the language model
    entropy: float  # the highest of its tokens, nats
    margin: float  # per character: log-probability of its best path less that of the CTC head's own in the same frames
    worst: float  # the same of the one frame of a character that agrees least


def evidence(
    logprobs: Sequence[float],
    entropies: Sequence[float],
    log_probs: NDArray[np.float32],
    labels: NDArray[np.int64],
    frames: NDArray[np.int64] | None,
) -> Evidence:
    """Of a word from its tokens' log-probabilities and entropies, and the CTC head's log-probabilities (F, K).

    `labels` are those of its U characters, `frames` (U, 2) the first and the last frame of each, None if there is no
    room for them.
    """
    logprob = max(sum(logprobs), _LEAST_LOGPROB)
    entropy = min(max(entropies, default=_MOST_ENTROPY), _MOST_ENTROPY)
    if frames is None or not len(labels):
        return Evidence(logprob, entropy, _LEAST_LOGPROB, _LEAST_LOGPROB)
    first, last = int(frames[0, 0]), int(frames[-1, 1])
    path = np.full(last + 1 - first, BLANK)
    for label, (start, end) in zip(labels, frames - first, strict=True):
        path[start : end + 1] = label
    there = log_probs[first : last + 1]
    best = there.argmax(1)
    is_character = path != BLANK
    path = np.where(path == there.shape[1], best, path)  # a character without a label is whatever is heard
    places = np.arange(len(path))
    behind = (there[places, path] - there[places, best]).astype(np.float64)
    margin, worst = behind.sum() / len(labels), behind[is_character].min()
    return Evidence(logprob, entropy, float(max(margin, _LEAST_LOGPROB)), float(max(worst, _LEAST_LOGPROB)))


def tokens_of_words(words: Sequence[str], tokens: Sequence[bytes]) -> list[list[int]]:
    """The places of the tokens of which each word has bytes; both are those of one text."""
    ends = np.cumsum([0, *(len(token) for token in tokens)])
    bounds = np.cumsum([0, *(len(word.encode("utf-8", "replace")) for word in words)])
    firsts = np.searchsorted(ends, bounds[:-1], "right") - 1
    lasts = np.searchsorted(ends, bounds[1:], "left")
    # Bytes that are no text are shown as three: what then lies beyond the last token belongs to it.
    return [list(range(min(a, len(tokens) - 1), min(b, len(tokens)))) for a, b in zip(firsts, lasts, strict=True)]


def judge(model: SpeechLM, text: Hypothesis, ctc: Tensor) -> Judge:
    """Says how sure each word of a text is, from the (F, K) of its frames, by the calibration that the model has."""
    calibration = None if model.confidence is None else Calibration(**model.confidence)
    tokens = [model.tokenizer.decode_bytes([token]) for token in text.ids]

    def probabilities(found: Sequence[Heard]) -> list[float]:
        return [probability(x, calibration) for x in evidence_of_words(found, text, tokens, ctc.numpy())]

    return probabilities


def evidence_of_words(
    found: Sequence[Heard], text: Hypothesis, tokens: Sequence[bytes], log_probs: NDArray[np.float32]
) -> list[Evidence]:
    """Of the words of a text, `tokens` being the bytes of each of its tokens."""
    places = tokens_of_words([heard.word for heard in found], tokens)
    return [
        evidence(
            [text.logprobs[i] for i in own], [text.entropies[i] for i in own], log_probs, heard.labels, heard.frames
        )
        for heard, own in zip(found, places, strict=True)
    ]


@dataclass(frozen=True)
class Calibration:
    """What each part of the evidence is worth: the logarithm of the odds that the word is right is their sum."""

    bias: float
    logprob: float
    entropy: float
    margin: float
    worst: float

    def probability(self, found: Evidence) -> float:
        """That a word is right."""
        odds = self.bias + self.logprob * found.logprob + self.entropy * found.entropy
        odds += self.margin * found.margin + self.worst * found.worst
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
