import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rwkv_speech.models.ctc import CtcHead, CtcSpec, align

K = 3  # labels of the small cases, one of which is the blank


def best_path(log_probs: NDArray[np.float64], targets: list[int]) -> list[list[int]] | None:
    """The first and last frame of each target on the likeliest of all paths, each written out."""
    star = np.log(1 - np.exp(log_probs[:, :1]))
    emit, best, found = np.concatenate([log_probs, star], 1), -np.inf, None
    for path in itertools.product(range(K + 1), repeat=len(log_probs)):
        spans: list[list[int]] = []
        for t, label in enumerate(path):
            if label and t and path[t - 1] == label:
                spans[-1][1] = t
            elif label:
                spans.append([t, t])
        score = emit[range(len(path)), path].sum()
        if [path[first] for first, _ in spans] == targets and score > best:
            best, found = score, spans
    return found


def test_align_finds_the_best_of_all_paths():
    draw = np.random.default_rng(0)
    infeasible = 0
    for _ in range(150):
        log_probs = np.log(draw.dirichlet(np.ones(K), draw.integers(1, 6)))
        targets = draw.integers(1, K + 1, draw.integers(0, 4)).tolist()
        expected, found = best_path(log_probs, targets), align(log_probs, targets)
        assert (None if found is None else found.tolist()) == expected
        infeasible += expected is None
    assert 0 < infeasible < 75


def test_align_of_nothing():
    assert align(np.zeros((0, K)), [1]) is None
    found = align(np.zeros((4, K)), [])
    assert found is not None and found.shape == (0, 2)


def test_encode_takes_the_other_case_and_else_the_star():
    spec = CtcSpec(" aBß天")
    assert spec.encode("Ab 天é") == [2, 3, 1, 5, 6] and spec.star == 6


def test_text_joins_repeats_and_drops_blanks():
    spec = CtcSpec(" ab")
    path = [0, 1, 2, 2, 0, 2, 3, 0, 1, 0, 1, 3, 1, 0]
    assert spec.text(torch.eye(4)[path]) == "aab b"


@pytest.fixture(scope="module", params=[1, 2, 4])
def head(request: pytest.FixtureRequest) -> CtcHead:
    torch.manual_seed(0)
    head = CtcHead(24, CtcSpec(" abc", hidden=16, layers=request.param)).eval()
    assert len(head.state_dict()) == 4 * request.param + 2
    return head


def test_padding_changes_no_row(head: CtcHead):
    frames, lengths = torch.randn(3, 40, 24), torch.tensor([40, 7, 0])
    found = head(frames, lengths)
    for row, length in enumerate(lengths[:2].tolist()):
        frames[row, length:] = torch.nan
        torch.testing.assert_close(found[row, :length], head(frames[row : row + 1, :length], lengths[row : row + 1])[0])
    assert found.shape == (3, 40, 5)
    torch.testing.assert_close(head(frames, lengths)[1, :7], found[1, :7])
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, 40))


def test_head_computes_in_float32_under_autocast(head: CtcHead):
    frames, lengths = torch.randn(1, 9, 24), torch.tensor([9])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(frames, lengths), head.float()(frames, lengths))


def test_texts_are_those_of_each_row(head: CtcHead):
    frames, lengths = torch.randn(2, 30, 24), torch.tensor([30, 11])
    log_probs = head(frames, lengths)
    assert head.texts(frames, lengths) == [head.spec.text(log_probs[0]), head.spec.text(log_probs[1, :11])]
