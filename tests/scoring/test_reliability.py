"""Measures of confidence, compared with torchmetrics and with what they are defined as."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from rwkv_speech.scoring.reliability import BINS, reliability, right_words


def drawn(seed: int, sharpness: float) -> tuple[list[float], list[bool]]:
    """Confidences, many of them equal, and words that are right as often as they say, or more or less often."""
    rng = np.random.default_rng(seed)
    p = rng.beta(4, 1, 700).round(2)
    return p.tolist(), (rng.random(700) < p**sharpness).tolist()


@pytest.mark.parametrize(("seed", "sharpness"), [(0, 1), (1, 1), (2, 0.3), (3, 4)])
def test_reliability_equals_torchmetrics(seed: int, sharpness: float):
    p, right = drawn(seed, sharpness)
    found = reliability(p, right)
    there, labels = torch.tensor(p, dtype=torch.float64), torch.tensor(right).long()
    assert found.auc == pytest.approx(float(binary_auroc(there, labels)), abs=1e-6)
    # Its bins have their upper ends inside, ours the lower: a value on an edge would be in another bin.
    inside = [(x + 0.001, y) for x, y in zip(p, right, strict=True) if x < 0.99]
    there, labels = torch.tensor([x for x, _ in inside]), torch.tensor([y for _, y in inside]).long()
    # It takes the confidence in whichever answer is the likelier: the same for those above one half.
    keep = there > 0.54
    ours = reliability(there[keep].tolist(), labels[keep].bool().tolist())
    assert ours.ece == pytest.approx(float(binary_calibration_error(there[keep], labels[keep], n_bins=BINS)), abs=1e-5)


def test_reliability_of_true_and_of_boastful_confidences():
    true, boastful = reliability(*drawn(5, 1)), reliability(*drawn(5, 6))
    assert true.ece < 0.05 < 0.2 < boastful.ece
    assert true.nce is not None and boastful.nce is not None and true.nce > 0.05 > boastful.nce
    assert sum(part.words for part in true.bins) == true.words == 700
    assert true.wrong == pytest.approx(sum(part.words * (1 - part.right) for part in true.bins))


def test_reliability_of_the_share_alone_tells_nothing():
    right = [True] * 90 + [False] * 10
    found = reliability([0.9] * 100, right)
    assert (found.ece, found.auc, found.nce) == pytest.approx((0, 0.5, 0), abs=1e-9)
    certain = reliability([float(x) for x in right], right)
    assert (certain.ece, certain.auc) == (0, 1) and certain.nce == pytest.approx(1, abs=1e-4)
    assert certain.report() == "ECE 0.000, AUC 1.000, NCE 1.000 (100 words, 10 wrong)"


def test_reliability_where_all_are_right_says_what_it_can():
    found = reliability([0.5, 1.0], [True, True])
    assert (found.ece, found.auc, found.nce, found.wrong) == (0.25, None, None, 0)
    assert found.report() == "ECE 0.250 (2 words, 0 wrong)"
    lines = [line.split() for line in found.table().splitlines()[1:]]
    assert lines == [["0.500", "1.000", "1"], ["1.000", "1.000", "1"]]
    with pytest.raises(ValueError, match="no words"):
        reliability([], [])


@pytest.mark.parametrize(
    ("words", "reference", "right"),
    [
        (["The", " weather", " is", " good."], "the weather was good", [True, True, False, True]),
        (["a", " b", " c"], "a c", [True, False, True]),
        (["a"], "", [False]),
        ([], "a b", []),
        (["well-known", " -", " “x”"], "well known X", [True, None, True]),
        (["well-known"], "well owned", [False]),
        (["天", "気", "は", " ok"], "天気が ok", [True, True, False, True]),
    ],
)
def test_right_words_are_those_that_scores_count_as_right(words: list[str], reference: str, right: list[bool | None]):
    assert right_words(words, reference) == right
