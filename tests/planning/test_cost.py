from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rwkv_speech.config import TrainConfig
from rwkv_speech.models.peft import LoraSpec
from rwkv_speech.planning import cost
from rwkv_speech.planning.cost import GIB, Step, idle_share, largest_micro_bsz, memory_advice
from rwkv_speech.planning.measure import BASE_MODELS, WAVLM_LARGE, MicroBatch, Sizes, encoding, learning

PUBLISHED, BATCH, FIFTEEN_SECONDS = Sizes(BASE_MODELS["3B"]), MicroBatch(4, 16.0, 64), MicroBatch(16, 15.0, 45)
ONE_GPU = TrainConfig(device="1", precision="bf16", encoder_precision="bf16", plan=1)


def step(batch: MicroBatch = BATCH, **flags: Any) -> Step:
    return Step(PUBLISHED, batch, replace(ONE_GPU, **flags))


def part(found: Step, name: str) -> float:
    return next((size for other, size, *_ in found.parts if other == name), 0)


@pytest.mark.parametrize(
    ("name", "batch", "ranks", "grad_cp", "gib"),
    [
        ("3B", MicroBatch(4, 16.0, 64), "4", 1, 7.95),
        ("3B", MicroBatch(4, 35.0, 140), "4", 1, 8.5),
        ("3B", MicroBatch(4, 16.0, 64), "4", 0, 10.9),
        ("3B", MicroBatch(4, 35.0, 140), "4", 0, 14.9),
        ("3B", MicroBatch(16, 15.0, 50), "1", 1, 9.1),
        ("3B", MicroBatch(16, 15.0, 50), "1", 0, 19.3),
        ("1.6B", MicroBatch(8, 35.0, 140), "1", 0, 13.5),
        ("1.6B", MicroBatch(8, 35.0, 140), "1", 1, 6.0),
    ],
)
def test_published_settings_need_what_the_readme_says(
    name: str, batch: MicroBatch, ranks: str, grad_cp: int, gib: float
):
    found = Step(Sizes(BASE_MODELS[name]), batch, replace(ONE_GPU, device=ranks, grad_cp=grad_cp))
    assert found.needed / GIB == pytest.approx(gib, rel=0.01)


def test_7b_is_trained_on_a_gpu_of_24_gb_in_4_bits():
    seven, lora = BASE_MODELS["7B"], LoraSpec(16, 32.0, "receptance,key,value,output")
    plain, packed = (
        Step(Sizes(seven, quant=quant, lora=lora), BATCH, replace(ONE_GPU, grad_cp=1)) for quant in ("", "nf4")
    )
    assert packed.needed < 23.5 * GIB
    saved = part(plain, "language model, frozen") - part(packed, "language model, frozen")
    assert saved > 9 * GIB and 0.9 * saved < plain.needed - packed.needed < saved  # a matrix at a time is made floats


def test_memory_is_what_was_measured_and_the_larger_of_two_phases():
    found, learn = step(), learning(PUBLISHED, BATCH, torch.bfloat16, False)
    encode = encoding(WAVLM_LARGE, BATCH, torch.bfloat16)
    assert part(found, "kept for the backward pass") == learn.kept
    assert part(found, "waveforms and the encoder's activations") == encode.peak
    held = sum(size for _, size, phase, _ in found.parts if not phase)
    assert found.tensors == held + max(learn.peak, encode.peak)
    assert found.needed == pytest.approx(0.7 * GIB + held + 1.1 * max(learn.peak, encode.peak))


def test_strategies_share_out_what_they_share():
    names = ("ddp", *(f"deepspeed_stage_{stage}" for stage in (1, 2, 3)))
    alone, (ddp, one, two, three) = step(), (step(device="8", strategy=name) for name in names)
    trained = PUBLISHED.trained
    assert part(ddp, "gradients") == part(alone, "gradients") == 4 * trained
    assert [part(x, "gradient buckets") for x in (alone, ddp, one)] == [0, 4 * trained, 1e8]
    assert part(one, "AdamW moments") == pytest.approx(12 / 8 * trained)
    assert part(one, "gradients") == 8 * part(two, "gradients") == 4 * trained
    assert part(three, "trained weights") == pytest.approx(part(two, "trained weights") / 8)
    frozen = [part(x, "language model, frozen") for x in (alone, two, three)]
    assert frozen == [2 * PUBLISHED.parameters["lm"]] * 2 + [2 * PUBLISHED.parameters["lm"] / 8]
    # DeepSpeed's stage 3 fetches at most 1e9 parameters ahead.
    assert [part(x, "gathered weights") for x in (two, three)] == [0, 2e9]


def test_cached_frames_leave_the_encoder_at_rest():
    found = step(feature_cache="frames")
    assert not any(phase == "encoding" for _, _, phase, _ in found.parts)
    assert found.encoder == 0 and found.launches < step().launches


@pytest.mark.parametrize("grad_cp", [0, 1])
def test_largest_micro_bsz_fills_the_memory(grad_cp: int):
    model, config, capacity = Sizes(BASE_MODELS["1.6B"]), replace(ONE_GPU, grad_cp=grad_cp), 9 * GIB
    fits = largest_micro_bsz(model, BATCH, config, capacity)
    assert Step(model, BATCH._replace(utterances=fits), config).needed == pytest.approx(capacity, rel=0.03)


def test_largest_micro_bsz_is_zero_where_the_weights_do_not_fit():
    assert largest_micro_bsz(Sizes(BASE_MODELS["14B"]), BATCH, ONE_GPU, 23.5 * GIB) == 0


def test_time_of_a_step_meets_the_floor_of_the_design(monkeypatch: pytest.MonkeyPatch):
    # Two operations a weight and position at 790 TFLOP/s: 58 ms for 16 x 15 s at 3B, 81 with recomputation.
    monkeypatch.setitem(cost.REACHED, torch.bfloat16, 1.0)
    times = [(found := step(FIFTEEN_SECONDS, grad_cp=grad_cp)).encoder + found.lm for grad_cp in (0, 1)]
    assert times == pytest.approx([0.058, 0.081], rel=0.05)


def test_a_step_is_at_least_its_launches():
    found = step(MicroBatch(1, 1.0, 4))
    assert found.encoder + found.lm < found.launches == found.seconds


def test_accumulation_adds_up_all_but_the_all_reduce():
    once, twice = (step(FIFTEEN_SECONDS, accumulate=n, device="8") for n in (1, 2))
    assert (twice.lm, twice.encoder, twice.launches) == (2 * once.lm, 2 * once.encoder, 2 * once.launches)
    assert twice.all_reduce == once.all_reduce


def test_all_reduce_of_the_trained_parameters_alone():
    trained = PUBLISHED.trained
    assert step().sent == step().all_reduce == 0
    # A ring: each rank sends (R - 1) / R of the float32 gradients twice.
    assert step(device="8").sent == pytest.approx(2 * 7 / 8 * 4 * trained)
    frozen = 2 * 2 * PUBLISHED.parameters["lm"] + PUBLISHED.encoder_bytes(torch.bfloat16)
    assert step(device="8", strategy="deepspeed_stage_3").sent == pytest.approx(7 / 8 * (8 * trained + frozen))
    assert step(device="16").all_reduce > 5 * step(device="8").all_reduce  # beyond a machine


@pytest.mark.parametrize(
    ("durations", "flags", "share"),
    [
        # One step of two ranks: 9 s and 1 s of work; together they wait 8 of 18 s.
        ([9.0, 1.0], {"micro_bsz": 1}, 8 / 18),
        # Two micro batches of each rank, the costliest first: 9 + 5 against 6 + 1 s.
        ([9.0, 6.0, 5.0, 1.0], {"micro_bsz": 1, "accumulate": 2}, 1 - 10.5 / 14),
        # Two utterances on one rank, padded to 4 s each; the third alone; none.
        ([4.0, 4.0, 4.0], {"micro_bsz": 2}, 1 - 6 / 8),
        ([5.0], {"micro_bsz": 4}, 0.5),
        ([1.0, 9.0], {"micro_bsz": 1, "device": "1"}, 0),
        ([float("nan")] * 8, {"micro_bsz": 1}, 0),
    ],
)
def test_idle_share_is_that_of_the_slowest_rank(durations: list[float], flags: dict[str, Any], share: float):
    config = replace(ONE_GPU, **{"device": "2", **flags})
    assert idle_share(np.array(durations, np.float32), config) == pytest.approx(share)


ADVICE = TrainConfig(device="4", micro_bsz=5, accumulate=2, precision="fp32", strategy="ddp", plan=1)


def steps_of(**changed: Any) -> list[str]:
    """What each numbered line says to set."""
    lines = memory_advice(replace(ADVICE, **changed)).splitlines()[1:-1]
    assert [line.split(".")[0].strip() for line in lines] == [str(i + 1) for i in range(len(lines))]
    return [line.split(". ", 1)[1].split(":")[0] for line in lines]


def test_advice_names_the_flags_in_order():
    assert steps_of() == [
        "--micro_bsz 2 with --accumulate 5",  # 5 x 2 utterances in fives: no fewer than before
        "--grad_cp 1",
        "--ctx_len 512",
        "--precision bf16",
        "--strategy deepspeed_stage_3",
    ]


def test_advice_leaves_out_what_is_done_already():
    assert steps_of(micro_bsz=1, grad_cp=1, precision="bf16", device="1") == ["--ctx_len 512"]
    assert "--strategy deepspeed_stage_3" not in steps_of(strategy="deepspeed_stage_3")


def test_advice_halves_the_seconds_of_a_batch():
    assert steps_of(batch_seconds=45.0)[0] == "--batch_seconds 22.5 with --accumulate 4"
