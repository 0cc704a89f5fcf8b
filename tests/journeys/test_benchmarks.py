"""The benchmarks' two sides compute the same; their speeds are no test's business."""

import pytest
import torch
from benchmarks import decode
from benchmarks.train_step import SIDES, Bench, Case, random_encoder

from rwkv_speech.models.base import RWKV6Sizes


@pytest.mark.parametrize("bf16", [False, True])
def test_both_sides_of_a_training_step_agree(bf16: bool):
    case = Case(RWKV6Sizes(300, 2, 128, 2, 448, 8, 16), (2, 64, 2, 32), 3, (0.4, 1.1), (2, 5), bf16)
    bench = Bench(case, "cpu")
    found = bench.compare()  # raises ValueError where they differ by more than rounding
    for _ in range(2):  # the first one is left out of the times
        bench.step("ours")
    assert found["loss"] > 1 and bench.targets == sum(case.lengths()[1].tolist()) + 3
    assert set(bench.cpu_seconds) == set(SIDES) and len(bench.split()) == 3
    assert all(torch.isfinite(p.grad).all() for p in bench.model.trained_parameters() if p.grad is not None)


def test_both_sides_of_decoding_agree():
    with decode.random_file(RWKV6Sizes(300, 2, 128, 2, 448, 8, 16)) as path:
        theirs = decode.Theirs(path)
        for dtype in (torch.bfloat16, torch.int8):
            rows = decode.compare_cpu(path, dtype, theirs, 1, 1e9)  # raises ValueError where they do not agree
            assert 0 < rows[0]["error"] < 0.1
            assert all(value > 0 for row in rows for key, value in row.items() if key != "what")


def test_random_utterances_are_decoded_to_their_limit():
    sizes = RWKV6Sizes(300, 1, 64, 1, 96, 8, 16)
    model = decode.random_model(random_encoder(1, 32, 2, 16), sizes, torch.float32, "cpu")
    assert decode.real_time(model, 2, 3) > 0
