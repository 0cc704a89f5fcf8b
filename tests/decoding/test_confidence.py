"""Confidence of words: what the evidence is made of, and that the fit is the one of maximum likelihood."""

import math

import numpy as np
import pytest
import torch

from rwkv_speech.decoding.confidence import Calibration, Evidence, evidence, fit, probability, tokens_of_words
from rwkv_speech.models.ctc import align

K = 5  # blank, "a", "b", "c", "d"


def said(labels: list[int], sure: float = 0.97) -> np.ndarray:
    """Log-probabilities (F, K) that say these labels, a blank between them, two frames each."""
    path = [0, *[x for label in labels for x in (label, label, 0)]]
    table = np.full((len(path), K), (1 - sure) / (K - 1), np.float32)
    table[np.arange(len(path)), path] = sure
    return np.log(table)


def of_word(log_probs: np.ndarray, text: list[int], word: slice) -> Evidence:
    frames = align(log_probs, text)
    return evidence(
        [-0.5, -0.25], [0.1, 0.7], log_probs, np.array(text[word]), None if frames is None else frames[word]
    )


def test_evidence_of_a_word_that_both_hear():
    found = of_word(said([1, 2, 3, 4]), [1, 2, 3, 4], slice(1, 3))
    assert found == Evidence(logprob=-0.75, entropy=0.7, margin=0.0, worst=0.0)


def test_evidence_of_a_word_that_the_head_hears_otherwise():
    heard = said([1, 2, 3, 4])
    one_letter = of_word(heard, [1, 2, 1, 4], slice(1, 3))  # "ba" for "bc"
    both_letters = of_word(heard, [1, 4, 1, 4], slice(1, 3))  # "da" for "bc"
    right = of_word(heard, [1, 4, 1, 4], slice(3, 4))
    assert both_letters.margin < one_letter.margin < 0 and both_letters.worst < -3 and one_letter.worst < -3
    assert right.margin == right.worst == 0  # its neighbour's errors are not its own
    assert of_word(heard, [1, K, K, 4], slice(1, 3)).margin == 0  # characters without a label may be anything


def test_evidence_margin_is_the_score_of_the_path_against_the_best():
    draw = np.random.default_rng(0)
    for _ in range(30):
        log_probs = torch.log_softmax(torch.from_numpy(draw.normal(0, 1, (14, K))), 1).numpy().astype(np.float32)
        text = draw.integers(1, K, 5).tolist()
        frames = align(log_probs, text)
        assert frames is not None
        first, last = frames[1, 0], frames[3, 1]
        label_of = {frame: text[i] for i in range(1, 4) for frame in range(frames[i, 0], frames[i, 1] + 1)}
        scores = [log_probs[frame, label_of.get(frame, 0)] - log_probs[frame].max() for frame in range(first, last + 1)]
        found = of_word(log_probs, text, slice(1, 4))
        assert found.margin == pytest.approx(max(sum(scores) / 3, -10), abs=1e-4)
        of_characters = [score for frame, score in enumerate(scores, start=first) if frame in label_of]
        assert found.worst == pytest.approx(max(min(of_characters), -10), abs=1e-4)


def test_evidence_is_bounded_and_without_room_there_is_none():
    log_probs = said([1])
    assert of_word(log_probs, [1, 2, 3, 4, 1, 2], slice(0, 2)) == Evidence(-0.75, 0.7, -10.0, -10.0)
    assert evidence([-90.0], [], log_probs, np.zeros(0, np.int64), None) == Evidence(-10.0, 10.0, -10.0, -10.0)


@pytest.mark.parametrize(
    ("words", "tokens", "expected"),
    [
        (["the", " weather"], [b"the", b" weather"], [[0], [1]]),
        (["a", " Grünwald,", " b"], [b"a", " Grü".encode(), b"nwald", b",", b" ", b"b"], [[0], [1, 2, 3], [4, 5]]),
        (["か", "ら", "東"], ["から".encode(), b"\xe6", b"\x9d", b"\xb1"], [[0], [0], [1, 2, 3]]),
        (["a"], [b"a", b" "], [[0]]),
        (["\ufffd", " b"], [b"\xff", b" b"], [[0, 1], [1]]),
        ([], [], []),
    ],
)
def test_tokens_of_words(words: list[str], tokens: list[bytes], expected: list[list[int]]):
    assert tokens_of_words(words, tokens) == expected


def drawn(count: int, truth: Calibration, seed: int) -> tuple[list[Evidence], list[bool]]:
    draw = np.random.default_rng(seed)
    found = [
        Evidence(-draw.exponential(0.5), draw.exponential(0.3), -draw.exponential(0.4), -draw.exponential(0.6))
        for _ in range(count)
    ]
    return found, [draw.random() < truth.probability(x) for x in found]


TRUTH = Calibration(bias=3.0, logprob=1.5, entropy=-0.8, margin=2.5, worst=0.5)


def test_fit_is_the_maximum_of_the_likelihood():
    found, right = drawn(400, TRUTH, seed=1)
    values, target = torch.tensor(found, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    scaled = (values - values.mean(0)) / values.std(0, correction=0)
    weights = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        odds = weights[0] + scaled @ weights[1:]
        total = torch.nn.functional.binary_cross_entropy_with_logits(odds, target, reduction="sum")
        total = total + 0.5 * 1e-3 * len(found) * (weights[1:] ** 2).sum()
        total.backward()
        return total

    optimizer.step(loss)
    expected = torch.sigmoid(weights[0] + scaled @ weights[1:]).tolist()
    calibration = fit(found, right)
    assert [calibration.probability(x) for x in found] == pytest.approx(expected, abs=1e-4)


def test_fit_finds_what_words_were_drawn_by():
    calibration = fit(*drawn(20_000, TRUTH, seed=2))
    others, _ = drawn(200, TRUTH, seed=3)
    assert [calibration.probability(x) for x in others] == pytest.approx(
        [TRUTH.probability(x) for x in others], abs=0.06
    )


def test_fit_of_words_that_can_be_told_apart_stays_finite():
    sure, unsure = Evidence(0.0, 0.0, 0.0, 0.0), Evidence(-5.0, 2.0, -4.0, -6.0)
    calibration = fit([sure] * 30 + [unsure] * 30, [True] * 30 + [False] * 30)
    assert 0 < calibration.probability(unsure) < 0.1 < 0.9 < calibration.probability(sure) < 1


def test_probability_without_a_calibration_is_the_language_models():
    found = Evidence(-0.75, 0.7, -3.0, -4.0)
    assert probability(found, None) == math.exp(-0.75)
    assert probability(found, TRUTH) == TRUTH.probability(found)
