from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_encoders import large_shaped
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rwkv_speech.models.adapter import Adapter
from rwkv_speech.models.base import RWKV6Sizes
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.planning.compute import (
    H200,
    all_reduce_bytes,
    encoder_operations,
    idle_share,
    operations,
    step_time,
)
from rwkv_speech.planning.sizes import BASE_MODELS, WAVLM_LARGE, EncoderSizes, MicroBatch, ModelSizes, Setup

PUBLISHED = ModelSizes(BASE_MODELS["3B"], WAVLM_LARGE)
FIFTEEN_SECONDS = MicroBatch(16, 15.0, 45)


def counted_operations(sizes: RWKV6Sizes, batch: MicroBatch, model: ModelSizes, grad_cp: bool) -> tuple[int, int]:
    """PyTorch's own count for the real adapter, layers and head, forwards and backwards; "meta" computes nothing."""
    audio = batch.utterances * model.audio_tokens(batch.seconds)
    with torch.device("meta"):
        lm = RWKV6(sizes).requires_grad_(False)
        lm.grad_cp = grad_cp
        adapter = Adapter(model.encoder.width, sizes.C, model.stack, model.adapter_hidden)
        frames = torch.empty(1, audio, model.encoder.width * model.stack)
        text = torch.empty(1, batch.positions(model) - audio, sizes.C)
    with FlopCounterMode(display=False) as forward:
        # The modules in it are called one by one: their boolean indexing has no shape without values.
        inputs = torch.cat((torch.nn.Sequential.forward(adapter, frames), text), 1)
        state = lm.zero_state(1)
        hidden, _ = lm.hidden(inputs, state._replace(wkv=state.wkv.requires_grad_()))
        logits = lm.head(hidden[:, : batch.targets()])
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("grad_cp", [False, True])
def test_operations_of_the_language_model_are_those_that_pytorch_counts(grad_cp: bool):
    sizes = replace(BASE_MODELS["1.6B"], n_layer=2, vocab=1000)  # small, so that the adapter counts
    model = ModelSizes(sizes, WAVLM_LARGE)
    forward, backward = counted_operations(sizes, FIFTEEN_SECONDS, model, grad_cp)
    found = operations(model, FIFTEEN_SECONDS, grad_cp)
    assert found.forward == pytest.approx(forward, rel=0.01)
    assert found.backward + found.again == pytest.approx(backward, rel=0.01)


def test_operations_of_the_encoder_are_those_that_pytorch_counts():
    encoder = SpeechEncoder(large_shaped(2), "large")
    seconds = 8.0
    # The counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder(torch.zeros(1, int(16_000 * seconds)), torch.tensor([int(16_000 * seconds)]))
    found = encoder_operations(EncoderSizes.of(encoder.model), seconds)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_time_of_a_step_meets_the_floor_of_the_design():
    # facts.md: 16 x 15 s at 3B on one H200 take 58 ms at least, 81 with recomputation.
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
    trained = PUBLISHED.trained_parameters()
    assert all_reduce_bytes(PUBLISHED, Setup(ranks=1)) == 0
    # A ring: each rank sends (R - 1) / R of the float32 gradients twice.
    assert all_reduce_bytes(PUBLISHED, Setup(ranks=8)) == pytest.approx(2 * 7 / 8 * 4 * trained)
    stage_3 = all_reduce_bytes(PUBLISHED, Setup(ranks=8, strategy="deepspeed_stage_3"))
    frozen = 2 * 2 * PUBLISHED.lm_parameters() + 4 * PUBLISHED.encoder.parameters
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
