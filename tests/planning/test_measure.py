"""What "meta" finds is what PyTorch keeps, allocates and computes with real tensors."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_encoders import make_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import WavLMConfig, WavLMModel

from rwkv_speech.models.base import RWKV6Sizes
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.parts import FrameOptions
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.ops import native
from rwkv_speech.planning import measure
from rwkv_speech.planning.measure import BASE_MODELS, ENCODERS, WAVLM_LARGE, MicroBatch, Sizes, encoding, learning

TINY_ENCODER = make_model("wavlm", "layer", "seven").config.to_json_string()
FIFTEEN_SECONDS = MicroBatch(16, 15.0, 45)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(n_layer: int, C: int, vocab: int) -> Sizes:
    return Sizes(RWKV6Sizes(vocab, n_layer, C, C // 64, int(3.5 * C), 32, 64), TINY_ENCODER, 2, 64)


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


def on_the_cpu(sizes: Sizes, grad_cp: bool) -> SpeechLM:
    model = sizes.build().to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    for p in model.trained_parameters():
        p.grad = torch.zeros_like(p)
    model.lm.grad_cp = grad_cp
    return model


def real(model: SpeechLM, batch: MicroBatch) -> tuple[Callable[[], None], Callable[[], int]]:
    """A step on real tensors from the frames on, and the bytes that it keeps for its backward pass."""
    data = batch.on_meta(model.encoder)
    tensors = {name: torch.zeros_like(x, device="cpu") for name, x in vars(data).items() if isinstance(x, Tensor)}
    lengths = {name: getattr(data, name) for name in ("num_samples", "text_lengths", "frame_lengths")}
    data = replace(data, **(tensors | lengths))
    kept: dict[int, weakref.ref[Any]] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = weakref.ref(storage)
        return x

    def kept_bytes() -> int:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(data)
        total = sum(storage.nbytes() for find in kept.values() if (storage := find()) is not None)
        loss.backward()
        return total

    return lambda: model(data).backward(), kept_bytes


CASES = {
    "layer": (small(3, 256, 400), MicroBatch(4, 2.0, 20)),  # one layer counts for much
    "activations": (small(6, 128, 400), MicroBatch(4, 1.0, 100)),
    "logits": (small(2, 128, 20_000), MicroBatch(4, 2.0, 40)),
    "states": (small(6, 256, 400), MicroBatch(16, 0.6, 10)),
}


@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_bytes_of_learning_are_those_of_pytorch(case: str, grad_cp: bool):
    if native.kernels_for(torch.empty(1, 1, 1, 64)) is None:
        pytest.skip("no compiler: the PyTorch form of WKV-6 takes more")
    sizes, batch = CASES[case]
    step, kept_bytes = real(on_the_cpu(sizes, grad_cp), batch)
    found = learning(sizes, batch, torch.float32, grad_cp)
    assert found.kept == pytest.approx(kept_bytes(), rel=0.005)
    waveforms = 4 * batch.utterances * batch.seconds * 16_000
    assert found.peak - waveforms == pytest.approx(peak_bytes(step), rel=0.01)


def wide_encoder(conv_width: int) -> WavLMModel:
    """WavLM-Large cut to two layers; with narrow convolutions, its attention takes most."""
    config = WavLMConfig(
        hidden_size=1024,
        num_hidden_layers=2,
        num_attention_heads=16,
        intermediate_size=4096,
        conv_dim=(conv_width,) * 7,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    return WavLMModel(config)


def encoder_peaks(model: WavLMModel, batch: MicroBatch, dtype: torch.dtype) -> tuple[float, int]:
    """Found on "meta", and allocated."""
    found = encoding(model.config.to_json_string(), batch, dtype).peak
    encoder = SpeechEncoder(model, "large", dtype=dtype)
    samples = int(16_000 * batch.seconds)
    waveforms = torch.zeros(batch.utterances, samples)
    num_samples = torch.full((batch.utterances,), samples)
    return found, waveforms.nbytes + peak_bytes(lambda: encoder(waveforms, num_samples))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [MicroBatch(1, 14.0, 1), MicroBatch(4, 5.0, 1)], ids=["long", "several"])
def test_peak_of_attention_is_that_of_pytorch(batch: MicroBatch, dtype: torch.dtype):
    found, peak = encoder_peaks(wide_encoder(8), batch, dtype)
    # The CPU's products in bfloat16 reorder their inputs.
    assert found == pytest.approx(peak, rel=0.25 if dtype == torch.bfloat16 else 0.001)


def test_peak_of_convolutions_is_that_of_pytorch():
    found, peak = encoder_peaks(wide_encoder(512), MicroBatch(1, 3.0, 1), torch.float32)
    assert found == pytest.approx(peak, rel=0.25)  # the CPU's convolutions reorder their inputs


@pytest.mark.parametrize("family", ["wavlm", "hubert", "wav2vec2"])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_encoders_of_every_family_are_measured(family: str, norm: str):
    model = make_model(family, norm, "seven")
    found = encoding(model.config.to_json_string(), MicroBatch(3, 2.0, 1), torch.bfloat16)
    assert found.peak > 3 * 4 * 32_000 and found.operations > 2 * 3 * 99 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize("batch", [MicroBatch(3, 4.0, 20), MicroBatch(2, 1.0, 2)], ids=["activations", "states"])
def test_a_deep_model_is_measured_from_a_shallow_one(batch: MicroBatch, grad_cp: bool):
    sizes = small(9, 256, 400)
    found = learning(sizes, batch, torch.bfloat16, grad_cp)
    *peaks, kept, operations, launches = measure._learning(sizes, batch, torch.bfloat16, grad_cp)
    # Within a phase the worst moment may change with the depth, where a layer takes next to nothing.
    assert found.peak == pytest.approx(max(peaks), rel=0.05)
    assert found[1:] == (kept, operations, launches)


def test_operations_of_learning_are_two_for_each_weight_and_position():
    sizes = Sizes(BASE_MODELS["3B"])
    s, T, targets = sizes.lm, sizes.positions(FIFTEEN_SECONDS), 16 * 46
    matrices = 6 * s.C**2 + 2 * s.C * s.ffn + (10 * s.mix_rank + 2 * s.decay_rank) * s.C
    layers, head = 2 * s.n_layer * matrices * T, 2 * s.vocab * s.C * targets
    first, second = (2 * weights * 16 * 149 for weights in (5120 * 2048, 2048 * s.C))
    # The head's gradient is made with its loss. Frozen matrices have one product backwards, the adapter's last two.
    found, again = (learning(sizes, FIFTEEN_SECONDS, torch.bfloat16, grad_cp) for grad_cp in (False, True))
    forwards, backwards = layers + 2 * head + first + second, layers + first + 2 * second
    assert found.operations == pytest.approx(forwards + backwards, rel=0.02)  # WKV-6 beside them
    assert again.operations - found.operations == pytest.approx(layers, rel=0.02)


def test_operations_of_the_encoder_are_two_for_each_weight_and_frame():
    frames, width = 749, 512
    kernels, rates = (10, 3, 3, 3, 3, 2, 2), (5, 10, 20, 40, 80, 160, 320)
    weights = [(width if i else 1) * width * kernel for i, kernel in enumerate(kernels)]
    convolutions = sum(2 * n * 240_000 / rate for n, rate in zip(weights, rates, strict=True))
    matrices = 2 * (315_453_120 - sum(weights)) * frames
    attention = 24 * 4 * frames**2 * 1024
    found = encoding(WAVLM_LARGE, FIFTEEN_SECONDS, torch.bfloat16)
    assert found.operations == pytest.approx(16 * (convolutions + matrices + attention), rel=0.01)


def test_a_layer_computed_in_bfloat16_keeps_its_norms_in_float32():
    """As autocast does on a GPU: per position, so many numbers of each width, counted by hand from the layers."""
    s, batch = BASE_MODELS["3B"], MicroBatch(4, 16.0, 64)
    two, three = (Sizes(replace(s, vocab=100, n_layer=n)) for n in (2, 3))
    kept = [learning(sizes, batch, torch.bfloat16, False).kept for sizes in (two, three)]
    # Both norms' inputs, the shift's difference, the group norm; r k v and gates; w.
    channels = s.C * (5 * 4 + 6 * 2 + 4)
    low_rank, statistics = (5 * s.mix_rank + s.decay_rank) * 2, 2 * 2 * 4 + 2 * 4 * s.H
    by_hand = three.positions(batch) * (channels + s.ffn * 2 + low_rank + statistics)
    assert kept[1] - kept[0] == pytest.approx(by_hand, rel=0.03)


@pytest.mark.parametrize(("padding", "positions"), [(None, 525), (30.0, 1500)])
def test_whisper_hears_ten_seconds_at_their_length_unless_padded(padding: float | None, positions: int):
    config, utterances = ENCODERS["openai/whisper-large-v3"], 4
    found = encoding(config, MicroBatch(utterances, 10.0, 1), torch.bfloat16, FrameOptions(padding))
    width, layers = 1280, 32
    matrices = 2 * positions * layers * 12 * width**2
    attention = layers * 4 * positions**2 * width
    convolutions = 2 * positions * 3 * (2 * 128 + width) * width
    assert found.operations == pytest.approx(utterances * (matrices + attention + convolutions), rel=0.01)
    sizes = Sizes(BASE_MODELS["3B"], config, frames=FrameOptions(padding))
    # 500 frames of the true length, a hundred audio tokens of five; and a separator.
    assert sizes.positions(MicroBatch(utterances, 10.0, 30)) == utterances * (100 + 1 + 30)


def test_frames_of_several_layers_are_as_wide_as_all_of_them():
    config = make_model("wavlm", "layer", "seven").config.to_json_string()
    last, three = (Sizes(BASE_MODELS["1.6B"], config, frames=FrameOptions(None, layers)) for layers in ((), (1, 2)))
    width, stack, hidden = 32, last.stack, last.adapter_hidden
    assert three.parameters["adapter"] - last.parameters["adapter"] == width * stack * hidden


@pytest.mark.parametrize(("packet", "numbers"), [("wkv6_backward", 64 * 64), ("wkv7_backward", 64 * 64 + 16 * 64)])
def test_a_gpu_s_kernel_keeps_the_state_before_16_tokens_and_in_wkv7_their_products(packet: str, numbers: int):
    S, T, H, N = 4, 652, 3, 64
    r, state = torch.empty(1, T, H, N, device="meta"), torch.empty(S, H, N, N, device="meta")
    args = [r, state, r, *[r] * (4 if packet == "wkv6_backward" else 5), state]
    assert measure._scratch(getattr(torch.ops.rwkv_speech, packet), args) == (T // 16 + S) * H * numbers * 4
