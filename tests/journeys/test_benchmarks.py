"""The benchmarks' two sides compute the same; their speeds are no test's business."""

import math

import pytest
import torch
from benchmarks import decode, rwkv7
from benchmarks.first_recipe import Side
from benchmarks.train_step import SIDES, Bench, Case, random_encoder

from rwkv_speech.batch import Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.models.base import RWKV6Sizes
from rwkv_speech.models.parts import Parts


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
        for quant in ("", "int8"):
            rows = decode.compare_cpu(path, quant, theirs, 1, 1e9)  # raises ValueError where they do not agree
            assert 0 < rows[0]["error"] < 0.1
            assert all(value > 0 for row in rows for key, value in row.items() if key != "what")


def test_random_utterances_are_decoded_to_their_limit():
    sizes = RWKV6Sizes(300, 1, 64, 1, 96, 8, 16)
    model = decode.random_model(random_encoder(1, 32, 2, 16), sizes, torch.float32, "cpu")
    assert decode.real_time(model, 2, 3) > 0


def test_the_first_recipe_hears_otherwise_each_time_and_ours_does_not(tiny_parts: Parts):
    waveforms = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    samples = [Sample(f"u{i}", waveforms[i], "the", [3, 4], 1.0, i, "asr") for i in range(2)]
    batch = collate(samples)
    sides = [Side(tiny_parts, ["asr"], (1e-3, 1e-3), seed=1, first=first) for first in (True, False)]
    assert torch.equal(sides[0].model.adapter.state_dict()["0.weight"], sides[1].model.adapter.state_dict()["0.weight"])
    first, ours = ([side.step(batch) for _ in range(2)] for side in sides)
    assert all(map(math.isfinite, first + ours)) and ours[1] < ours[0]
    heard = [[side._encode(batch)[0] for _ in range(2)] for side in sides]
    assert not torch.equal(*heard[0]) and torch.equal(*heard[1])


def test_rwkv7_s_peer_computes_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rwkv7, "SHAPES", [(1, 5, 2)])
    [row] = rwkv7.recurrence(1)  # raises ValueError where they do not agree
    assert row["error"] < 1e-6 and row["ratio"] > 0
