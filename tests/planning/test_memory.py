from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_encoders import large_shaped
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map

from rwkv_speech.models.base import RWKV6Sizes
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.state import Packing
from rwkv_speech.planning.memory import GIB, Memory, Part, largest_micro_bsz, layer_bytes, memory, out_of_memory_advice
from rwkv_speech.planning.sizes import BASE_MODELS, WAVLM_LARGE, EncoderSizes, MicroBatch, ModelSizes, Setup

PUBLISHED = ModelSizes(BASE_MODELS["3B"], WAVLM_LARGE)
BATCH = MicroBatch(utterances=4, seconds=16.0, text_tokens=64)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sizes(n_layer: int, C: int, vocab: int) -> RWKV6Sizes:
    return RWKV6Sizes(vocab, n_layer, C, C // 64, int(3.5 * C), 32, 64)


class CudaAutocast(TorchFunctionMode):
    """What autocast does on a GPU, on any device: matrix products in bfloat16, norms in float32."""

    low = (F.linear, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.einsum)
    high = (F.layer_norm, F.group_norm)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (*self.low, *self.high):
            dtype = torch.bfloat16 if func in self.low else torch.float32
            convert = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
            args, kwargs = tree_map(convert, args), tree_map(convert, kwargs or {})
        return func(*args, **(kwargs or {}))


def saved_bytes(lm_sizes: RWKV6Sizes, positions: int, bf16: bool, grad_cp: bool = False) -> int:
    """What PyTorch keeps for the backward pass of the real layers, weights apart; nothing is computed on "meta"."""
    with torch.device("meta"):
        lm = RWKV6(lm_sizes).to(torch.bfloat16 if bf16 else torch.float32).requires_grad_(False)
        lm.grad_cp = grad_cp
        x = torch.empty(1, positions, lm_sizes.C, dtype=lm.emb.weight.dtype, requires_grad=True)
        state = lm.zero_state(4)
        state = state._replace(wkv=state.wkv.requires_grad_())
        ends = torch.empty(4, dtype=torch.int64)
        packing = Packing(torch.empty(5, dtype=torch.int64), ends, ends, ends)
    weights = {p.untyped_storage()._cdata for p in lm.parameters()}
    kept: dict[int, Any] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights and (x.dim(), len(x)) != (4, 4):  # states are counted by themselves
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if bf16:
            with CudaAutocast():
                lm.hidden(x, state, packing)
        else:
            lm.hidden(x, state, packing)
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(compute: Callable[[], object]) -> int:
    """The most that PyTorch's CPU allocator holds at a time beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["1.6B", "3B", "7B"])
def test_layer_bytes_are_what_the_real_layers_keep(name: str, bf16: bool):
    two, three = (replace(BASE_MODELS[name], n_layer=n, vocab=100) for n in (2, 3))
    kept = saved_bytes(three, 900, bf16) - saved_bytes(two, 900, bf16)
    assert layer_bytes(ModelSizes(two, WAVLM_LARGE), 900, bf16) == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputation_keeps_the_layers_inputs_alone(bf16: bool):
    two, three = (replace(BASE_MODELS["3B"], n_layer=n, vocab=100) for n in (2, 3))
    model = ModelSizes(three, WAVLM_LARGE)
    kept = saved_bytes(three, BATCH.positions(model), bf16, True) - saved_bytes(two, BATCH.positions(model), bf16, True)
    found = part(memory(model, BATCH, Setup(bf16=bf16, grad_cp=True)), "language model's inputs of layers")
    assert found.bytes == pytest.approx(3 * kept, rel=0.05)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("utterances", "frames"), [(1, 700), (4, 250)])
def test_peak_of_the_encoders_layers_is_as_estimated(utterances: int, frames: int, bf16: bool):
    encoder = SpeechEncoder(large_shaped(1), "large", dtype=torch.bfloat16 if bf16 else torch.float32)
    hidden, mask = torch.randn(utterances, frames, 1024), torch.ones(utterances, frames, dtype=torch.bool)

    def compute() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return encoder.model.encoder(hidden, attention_mask=mask).last_hidden_state

    # Its convolutions made small, so that the layers are the worst moment.
    found = replace(EncoderSizes.of(encoder.model), conv_width=(1,) * 7)
    batch = MicroBatch(utterances, (frames * 320 + 80) / 16_000, 1)
    estimate = part(
        memory(ModelSizes(sizes(1, 128, 100), found), batch, Setup(encoder_bf16=bf16)), "encoder activations"
    )
    assert estimate.bytes == pytest.approx(peak_bytes(compute), rel=0.25)


def test_peak_of_the_encoders_convolutions_is_as_estimated():
    encoder = SpeechEncoder(large_shaped(1), "large")
    waveforms = torch.randn(1, 3 * 16_000)
    measured = peak_bytes(lambda: encoder(waveforms, torch.tensor([waveforms.shape[1]])))
    estimate = memory(ModelSizes(sizes(1, 128, 100), EncoderSizes.of(encoder.model)), MicroBatch(1, 3.0, 1), Setup())
    assert sum(x.bytes for x in estimate.encoding) == pytest.approx(measured, rel=0.25)


def part(found: Memory, name: str) -> Part:
    return next(x for x in (*found.held, *found.encoding, *found.learning) if x.name == name)


def test_published_setting_needs_nine_gib_with_recomputation():
    assert memory(PUBLISHED, BATCH, Setup(grad_cp=True)).needed == pytest.approx(8.8 * GIB, rel=0.02)
    assert memory(PUBLISHED, BATCH, Setup()).needed == pytest.approx(11.4 * GIB, rel=0.02)


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
    trained = PUBLISHED.trained_parameters()
    assert part(ddp, "gradients").bytes == 2 * part(alone, "gradients").bytes == 8 * trained
    assert part(one, "AdamW moments").bytes == pytest.approx(12 / 8 * trained)
    assert part(one, "gradients").bytes == 8 * part(two, "gradients").bytes == 4 * trained
    assert part(three, "trained weights").bytes == pytest.approx(part(two, "trained weights").bytes / 8)
    frozen = [part(x, "language model, frozen").bytes for x in (alone, two, three)]
    assert frozen == [2 * PUBLISHED.lm_parameters()] * 2 + [2 * PUBLISHED.lm_parameters() / 8]


def test_cached_frames_leave_the_encoder_at_rest():
    assert memory(PUBLISHED, BATCH, Setup(cached_frames=True)).encoding == ()


@pytest.mark.parametrize("grad_cp", [False, True])
def test_largest_micro_bsz_fits_and_one_more_does_not(grad_cp: bool):
    model, setup, capacity = ModelSizes(BASE_MODELS["1.6B"], WAVLM_LARGE), Setup(grad_cp=grad_cp), 23.5 * GIB
    fits = largest_micro_bsz(model, BATCH, setup, capacity)
    assert memory(model, replace(BATCH, utterances=fits), setup).needed <= capacity
    assert memory(model, replace(BATCH, utterances=fits + 1), setup).needed > capacity
    assert fits > (100 if grad_cp else 20)


def test_largest_micro_bsz_is_zero_where_the_weights_do_not_fit():
    assert largest_micro_bsz(ModelSizes(BASE_MODELS["14B"], WAVLM_LARGE), BATCH, Setup(), 23.5 * GIB) == 0


ADVICE: dict[str, Any] = {
    "micro_bsz": 5,
    "batch_seconds": None,
    "accumulate": 2,
    "grad_cp": False,
    "ctx_len": 1024,
    "bf16": False,
    "strategy": "ddp",
    "ranks": 4,
}


def steps_of(**changed: Any) -> list[str]:
    """What each numbered line says to set."""
    lines = out_of_memory_advice(**{**ADVICE, **changed}).splitlines()[1:-1]
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
    assert steps_of(micro_bsz=1, grad_cp=True, bf16=True, ranks=1) == ["--ctx_len 512"]
    assert "--strategy deepspeed_stage_3" not in steps_of(strategy="deepspeed_stage_3")


def test_advice_halves_the_seconds_of_a_batch():
    assert steps_of(batch_seconds=45.0)[0] == "--batch_seconds 22.5 with --accumulate 4"
