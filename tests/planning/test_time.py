from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from rwkv_speech.data.epoch import Cut, EpochPlan
from rwkv_speech.data.source import Part
from rwkv_speech.errors import UserError
from rwkv_speech.planning.memory import Setup
from rwkv_speech.planning.sizes import BASE_MODELS, WAVLM_LARGE, MicroBatch, Sizes
from rwkv_speech.planning.time import H200, DataPlan, all_reduce_bytes, idle_share, step_time

PUBLISHED = Sizes(BASE_MODELS["3B"], WAVLM_LARGE)
FIFTEEN_SECONDS = MicroBatch(16, 15.0, 45)


def data_plan(durations: list[float], **changed: Any) -> DataPlan:
    settings: dict[str, Any] = {"micro_bsz": 4, "batch_seconds": None, "ctx_len": 1024, "epochs": 3}
    return DataPlan(np.array(durations, np.float32), **{**settings, **changed})


def test_steps_are_those_of_the_sampler():
    seconds = np.random.default_rng(0).uniform(1, 30, 1001).astype(np.float32)
    for batch_seconds in (None, 60.0):
        for setup in (Setup(), Setup(ranks=8), Setup(ranks=4, accumulate=3)):
            slots = setup.ranks * setup.accumulate
            found = data_plan(list(seconds), batch_seconds=batch_seconds)
            assert found.steps(setup) == EpochPlan(found.durations, Cut(4, batch_seconds, world_size=slots)).steps


def test_epoch_steps_limit_the_steps():
    assert data_plan([1.0] * 100, epoch_steps=7).steps(Setup()) == 7
    assert data_plan([1.0] * 100, epoch_steps=70).steps(Setup()) == 25


def test_hours_count_parts_as_often_as_they_are_heard():
    parts = [Part(2, Fraction(3)), Part(1)]
    found = data_plan([10.0, 20.0, 90.0], parts=parts)
    assert found.utterances == 7
    assert found.hours * 3600 == pytest.approx(3 * 30 + 90)


def test_unknown_durations_are_taken_as_the_mean():
    found = data_plan([10.0, float("nan"), 20.0])
    assert (found.unknown(), found.mean_seconds, found.hours) == (1, 15.0, 45 / 3600)
    assert data_plan([float("nan")] * 2).mean_seconds == 12.0


def test_largest_micro_batch_holds_the_longest_utterances():
    batch = data_plan([3.0, 35.0, 8.0]).largest(PUBLISHED)
    assert (batch.utterances, batch.seconds, batch.text_tokens) == (4, 35.0, 140)
    assert data_plan([3.0, 35.0], batch_seconds=80.0).largest(PUBLISHED).utterances == 2


@pytest.mark.parametrize("seconds", [300.0, float("nan")])
def test_largest_micro_batch_ends_at_the_context(seconds: float):
    batch = data_plan([3.0, seconds], ctx_len=512).largest(PUBLISHED)
    assert 0.97 * 512 <= batch.positions(PUBLISHED) / batch.utterances <= 512


def test_no_data_is_an_error():
    with pytest.raises(UserError, match="--train_data: found no utterance"):
        data_plan([])


def test_time_of_a_step_meets_the_floor_of_the_design():
    # Two operations a weight and position at 790 TFLOP/s: 58 ms for 16 x 15 s at 3B, 81 with recomputation.
    perfect = replace(H200, utilisation=1.0, launch_seconds=0.0)
    times = [
        step_time(PUBLISHED, FIFTEEN_SECONDS, Setup(encoder_bf16=True, grad_cp=grad_cp), perfect).total
        for grad_cp in (False, True)
    ]
    assert times == pytest.approx([0.058, 0.081], rel=0.05)


def test_a_step_is_at_least_its_launches():
    step = step_time(PUBLISHED, MicroBatch(1, 1.0, 4), Setup(), H200)
    assert step.encoder + step.lm < step.launches == step.total


def test_accumulation_adds_up_all_but_the_all_reduce():
    once, twice = (step_time(PUBLISHED, FIFTEEN_SECONDS, Setup(accumulate=n, ranks=8), H200) for n in (1, 2))
    assert twice.lm == 2 * once.lm and twice.encoder == 2 * once.encoder and twice.launches == 2 * once.launches
    assert twice.all_reduce == once.all_reduce


def test_cached_frames_take_the_encoder_no_time():
    step = step_time(PUBLISHED, FIFTEEN_SECONDS, Setup(cached_frames=True), H200)
    assert step.encoder == 0.0 and step.launches < step_time(PUBLISHED, FIFTEEN_SECONDS, Setup(), H200).launches


def test_all_reduce_of_the_trained_parameters_alone():
    trained = PUBLISHED.trained
    assert all_reduce_bytes(PUBLISHED, Setup(ranks=1)) == 0
    # A ring: each rank sends (R - 1) / R of the float32 gradients twice.
    assert all_reduce_bytes(PUBLISHED, Setup(ranks=8)) == pytest.approx(2 * 7 / 8 * 4 * trained)
    stage_3 = all_reduce_bytes(PUBLISHED, Setup(ranks=8, strategy="deepspeed_stage_3"))
    frozen = 2 * 2 * PUBLISHED.parameters["lm"] + 4 * PUBLISHED.parameters["encoder"]
    assert stage_3 == pytest.approx(7 / 8 * (8 * trained + frozen))


def test_all_reduce_beyond_a_machine_is_slower():
    near, far = (step_time(PUBLISHED, FIFTEEN_SECONDS, Setup(ranks=ranks), H200).all_reduce for ranks in (8, 16))
    assert far > 5 * near


def waiting(durations: list[float], micro_bsz: int, ranks: int, accumulate: int = 1) -> float:
    array = np.array(durations, np.float32)
    return idle_share(array, micro_bsz, None, Setup(ranks=ranks, accumulate=accumulate))


def test_idle_share_of_one_step_is_that_of_its_slowest_rank():
    # One step of two ranks: 9 s and 1 s of work; together they wait 8 of 18 s.
    assert waiting([9.0, 1.0], micro_bsz=1, ranks=2) == pytest.approx(8 / 18)
    # Two micro batches of each rank, the costliest first: 9 + 5 against 6 + 1 s.
    assert waiting([9.0, 6.0, 5.0, 1.0], micro_bsz=1, ranks=2, accumulate=2) == pytest.approx(1 - 10.5 / 14)


def test_idle_share_counts_padding_and_empty_slots():
    # Two utterances on one rank, padded to 4 s each; the third alone.
    assert waiting([4.0, 4.0, 4.0], micro_bsz=2, ranks=2) == pytest.approx(1 - 6 / 8)
    assert waiting([5.0], micro_bsz=4, ranks=2) == pytest.approx(0.5)


def test_idle_share_of_one_rank_is_none():
    assert waiting([1.0, 9.0], micro_bsz=1, ranks=1) == 0.0


def test_idle_share_takes_unknown_durations_as_alike():
    assert waiting([float("nan")] * 8, micro_bsz=1, ranks=4) == 0.0


def test_assumptions_name_what_is_assumed():
    text = replace(H200, utilisation=0.25).assumptions()
    assert "H200" in text and "25 % of 790 TFLOP/s" in text and "300 GB/s" in text
