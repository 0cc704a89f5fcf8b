import dataclasses
from dataclasses import replace
from typing import Any

import pytest

from rwkv_speech.config import TrainConfig
from rwkv_speech.planning.measure import encoding, learning
from rwkv_speech.planning.memory import GIB, Memory, Part, Setup, largest_micro_bsz, memory, memory_advice
from rwkv_speech.planning.sizes import BASE_MODELS, WAVLM_LARGE, MicroBatch, Sizes

PUBLISHED = Sizes(BASE_MODELS["3B"], WAVLM_LARGE)
BATCH = MicroBatch(utterances=4, seconds=16.0, text_tokens=64)
FOUR_GPUS = Setup(encoder_bf16=True, strategy="ddp", ranks=4)


def part(found: Memory, name: str) -> Part:
    return next(x for x in (*found.held, *found.encoding, *found.learning) if x.name == name)


@pytest.mark.parametrize(
    ("name", "batch", "setup", "grad_cp", "gib"),
    [
        ("3B", MicroBatch(4, 16.0, 64), FOUR_GPUS, True, 7.95),
        ("3B", MicroBatch(4, 35.0, 140), FOUR_GPUS, True, 8.5),
        ("3B", MicroBatch(4, 16.0, 64), FOUR_GPUS, False, 10.9),
        ("3B", MicroBatch(4, 35.0, 140), FOUR_GPUS, False, 14.9),
        ("3B", MicroBatch(16, 15.0, 50), Setup(encoder_bf16=True), True, 9.1),
        ("3B", MicroBatch(16, 15.0, 50), Setup(encoder_bf16=True), False, 19.3),
        ("1.6B", MicroBatch(8, 35.0, 140), Setup(encoder_bf16=True), False, 13.5),
        ("1.6B", MicroBatch(8, 35.0, 140), Setup(encoder_bf16=True), True, 6.0),
    ],
)
def test_published_settings_need_what_the_readme_says(
    name: str, batch: MicroBatch, setup: Setup, grad_cp: bool, gib: float
):
    found = memory(Sizes(BASE_MODELS[name], WAVLM_LARGE), batch, replace(setup, grad_cp=grad_cp))
    assert found.needed / GIB == pytest.approx(gib, rel=0.01)


def test_parts_are_what_was_measured():
    found, step = memory(PUBLISHED, BATCH, Setup()), learning(PUBLISHED, BATCH, bf16=True, grad_cp=False)
    assert part(found, "kept for the backward pass").bytes == step.kept
    assert sum(x.bytes for x in found.learning) == step.peak
    assert found.encoding[0].bytes == encoding(WAVLM_LARGE, BATCH, bf16=False).peak


def test_needed_is_more_than_the_tensors_by_context_and_a_tenth_of_what_passes():
    found = memory(PUBLISHED, BATCH, Setup())
    assert found.tensors == sum(x.bytes for x in found.held) + found.passing
    assert found.needed == pytest.approx(0.7 * GIB + found.tensors + 0.1 * found.passing)


def test_passing_is_the_larger_of_the_two_phases():
    held, small, large = (Part("held", 10),), (Part("a", 3), Part("b", 4)), (Part("c", 20),)
    assert Memory(held, small, large).tensors == Memory(held, large, small).tensors == 30


def test_strategies_share_out_what_they_share():
    alone, ddp, one, two, three = (
        memory(PUBLISHED, BATCH, Setup(strategy=name, ranks=ranks))
        for name, ranks in (("auto", 1), ("ddp", 8), *((f"deepspeed_stage_{stage}", 8) for stage in (1, 2, 3)))
    )
    trained = PUBLISHED.trained
    assert part(ddp, "gradients").bytes == part(alone, "gradients").bytes == 4 * trained
    assert [part(x, "gradient buckets").bytes for x in (alone, ddp, one)] == [0, 4 * trained, 1e8]
    assert part(one, "AdamW moments").bytes == pytest.approx(12 / 8 * trained)
    assert part(one, "gradients").bytes == 8 * part(two, "gradients").bytes == 4 * trained
    assert part(three, "trained weights").bytes == pytest.approx(part(two, "trained weights").bytes / 8)
    frozen = [part(x, "language model, frozen").bytes for x in (alone, two, three)]
    assert frozen == [2 * PUBLISHED.parameters["lm"]] * 2 + [2 * PUBLISHED.parameters["lm"] / 8]


def test_cached_frames_leave_the_encoder_at_rest():
    assert memory(PUBLISHED, BATCH, Setup(cached_frames=True)).encoding == ()


@pytest.mark.parametrize("grad_cp", [False, True])
def test_largest_micro_bsz_fits_and_one_more_does_not(grad_cp: bool):
    model, setup, capacity = Sizes(BASE_MODELS["1.6B"], WAVLM_LARGE), Setup(grad_cp=grad_cp), 23.5 * GIB
    fits = largest_micro_bsz(model, BATCH, setup, capacity)
    assert memory(model, replace(BATCH, utterances=fits), setup).needed <= capacity
    assert memory(model, replace(BATCH, utterances=fits + 1), setup).needed > capacity
    assert fits > (100 if grad_cp else 20)


def test_setup_knows_its_zero_stage():
    stages = [Setup(strategy=name).zero_stage() for name in ("auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_3")]
    assert stages == [0, 0, 1, 3]


def test_largest_micro_bsz_is_zero_where_the_weights_do_not_fit():
    assert largest_micro_bsz(Sizes(BASE_MODELS["14B"], WAVLM_LARGE), BATCH, Setup(), 23.5 * GIB) == 0


ADVICE = TrainConfig(device="4", micro_bsz=5, accumulate=2, precision="fp32", strategy="ddp", plan=1)


def steps_of(**changed: Any) -> list[str]:
    """What each numbered line says to set."""
    lines = memory_advice(dataclasses.replace(ADVICE, **changed)).splitlines()[1:-1]
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
