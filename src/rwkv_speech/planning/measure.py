"""What a micro batch takes on a GPU: the real model runs on the "meta" device, where tensors have no values."""

import functools
import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rwkv_speech import tiny
from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.batch import Batch, Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.devices import autocast
from rwkv_speech.errors import UserError
from rwkv_speech.models import parts
from rwkv_speech.models.base import LMSizes, RWKV6Sizes
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.families import lm_of
from rwkv_speech.models.parts import ADAPTER_HIDDEN, STACK, FrameOptions, Parts
from rwkv_speech.models.peft import LoraSpec
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.tokenizer import WorldTokenizer

_HEAD_SIZE = 64
# As transformers writes an encoder's configuration.
WAVLM_LARGE = (
    '{"model_type": "wavlm", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, '
    '"intermediate_size": 4096, "feat_extract_norm": "layer", "do_stable_layer_norm": true}'
)
# Of the hub, by the names that a plan needs when it is out of reach.
ENCODERS = {parts.WAVLM_LARGE: WAVLM_LARGE} | dict.fromkeys(
    ("openai/whisper-large-v3", "openai/whisper-large-v3-turbo"),
    '{"model_type": "whisper", "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, '
    '"encoder_ffn_dim": 5120, "num_mel_bins": 128}',
)
# Tokens between two states that the GPU's backward kernel keeps.
_KERNEL_TILE = 16
_LAST = FrameOptions()


def world_sizes(n_layer: int, n_embd: int) -> RWKV6Sizes:
    """Those of a published RWKV-6 World model; raises UserError where `n_embd` is not a multiple of 64."""
    if n_embd % _HEAD_SIZE:
        raise UserError(f"--n_embd: found {n_embd}, expected a multiple of {_HEAD_SIZE}, the size of a head")
    ranks = (64, 128) if n_embd >= 4096 else (32, 64)
    return RWKV6Sizes(65536, n_layer, n_embd, n_embd // _HEAD_SIZE, int(3.5 * n_embd) // 32 * 32, *ranks)


BASE_MODELS = {"1.6B": world_sizes(24, 2048), "3B": world_sizes(32, 2560), "7B": world_sizes(32, 4096),
               "14B": world_sizes(61, 4096)}  # fmt: skip


@functools.cache
def build_encoder(config: str, dtype: torch.dtype = torch.float32, frames: FrameOptions = _LAST) -> SpeechEncoder:
    """The real encoder of a transformers configuration in JSON, on the "meta" device."""
    with torch.device("meta"):
        return SpeechEncoder.from_config(json.loads(config), dtype, frames)


class MicroBatch(NamedTuple):
    """What one GPU computes at a time: utterances of so many `seconds`, with so many `text_tokens` each."""

    utterances: int
    seconds: float
    text_tokens: int

    def on_meta(self, encoder: SpeechEncoder) -> Batch:
        """Waveforms and frames without values; lengths and text on the host, as always."""
        num_samples = round(self.seconds * SAMPLE_RATE)
        num_frames = int(encoder.frame_lengths(torch.tensor([num_samples])))
        with torch.device("meta"):
            waveform, frames = torch.empty(num_samples), torch.empty(num_frames, encoder.width)
        sample = Sample("", waveform, "", [1] * self.text_tokens, self.seconds, 0, "asr", frames=frames)
        return collate([sample] * self.utterances)


@dataclass(frozen=True)
class Sizes:
    """What a SpeechLM without values is built from; `encoder` is its transformers configuration in JSON."""

    lm: LMSizes
    encoder: str = WAVLM_LARGE
    stack: int = STACK
    adapter_hidden: int = ADAPTER_HIDDEN
    frames: FrameOptions = _LAST
    num_states: int = 1
    quant: str = ""
    lora: LoraSpec | None = None
    train_parts: str = ""

    def build(self, dtype: torch.dtype = torch.float32) -> SpeechLM:
        """The real model on the "meta" device, the language model in `dtype`."""
        shape = Parts(
            stack=self.stack, adapter_hidden=self.adapter_hidden, lora=self.lora, train_parts=self.train_parts
        )
        names = ["asr", *(f"task{number}" for number in range(1, self.num_states))]
        with torch.device("meta"):
            lm = lm_of(self.lm).to(dtype).requires_grad_(False)
            lm.quantise(self.quant, dtype)
            return SpeechLM(
                build_encoder(self.encoder, frames=self.frames), lm, WorldTokenizer(tiny.VOCAB_FILE), shape, names
            )

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """How many each part of the model has: "encoder", "lm", what is trained of it, "adapter", "initial_states"."""
        model = replace(self, quant="", frames=replace(self.frames, quant="")).build()
        found = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        tuned = sum(p.numel() for p in model.tuned.values())
        return found | {"lm": found["lm"] - tuned, "tuned": tuned}

    @property
    def trained(self) -> int:
        """Parameters that the optimizer sees."""
        return self.parameters["adapter"] + self.parameters["initial_states"] + self.parameters["tuned"]

    def lm_bytes(self, dtype: torch.dtype) -> int:
        """Of the frozen language model, whose numbers that are not packed have this type."""
        return _lm_bytes(self, dtype)

    def encoder_bytes(self, dtype: torch.dtype) -> int:
        """Of the encoder, whose matrices that are not packed have this type."""
        return sum(p.nbytes for p in build_encoder(self.encoder, dtype, self.frames).parameters())

    def positions(self, batch: MicroBatch) -> int:
        """Audio tokens, separators and text of a batch, packed without padding."""
        frames = build_encoder(self.encoder).frame_lengths(torch.tensor(round(batch.seconds * SAMPLE_RATE)))
        return batch.utterances * (int(frames) // self.stack + 1 + batch.text_tokens)


@functools.cache
def _lm_bytes(sizes: Sizes, dtype: torch.dtype) -> int:
    model = sizes.build(dtype)
    tuned = {id(p) for p in model.tuned.values()}
    return sum(p.nbytes for p in model.lm.parameters() if id(p) not in tuned)


class Cost(NamedTuple):
    """Of one pass over a micro batch; weights, their gradients and the optimizer's tensors are left out."""

    peak: float = 0  # bytes of all tensors at the worst moment
    kept: float = 0  # bytes kept for the backward pass
    operations: float = 0  # on floating-point numbers
    launches: float = 0  # operations that a GPU is handed


@functools.cache
def encoding(config: str, batch: MicroBatch, dtype: torch.dtype, frames: FrameOptions = _LAST) -> Cost:
    """The frozen encoder, from waveforms to frames."""
    encoder = build_encoder(config, dtype, frames)
    data = batch.on_meta(encoder)
    with _Meter(encoder.parameters()) as meter, _EncoderOnGpu():
        encoder(data.waveforms.clone(), data.num_samples)
    return Cost(meter.peak, 0, meter.operations, meter.launches)


@functools.cache
def learning(sizes: Sizes, batch: MicroBatch, dtype: torch.dtype, grad_cp: bool) -> Cost:
    """Adapter and language model, forwards and backwards, from the encoder's frames on."""
    # What two layers cost, and what a third one adds, for each further layer.
    two, three = (_learning(replace(sizes, lm=replace(sizes.lm, n_layer=n)), batch, dtype, grad_cp) for n in (2, 3))
    last, others, *rest = (a + (b - a) * (sizes.lm.n_layer - 2) for a, b in zip(two, three, strict=True))
    return Cost(max(last, others), *rest)


def _learning(sizes: Sizes, batch: MicroBatch, dtype: torch.dtype, grad_cp: bool) -> tuple[float, ...]:
    """The peak until the last layer's backward pass is done and that of the others', and the rest of Cost."""
    model = sizes.build(dtype)
    model.lm.grad_cp = grad_cp
    # Module by module, since nothing is left around a layer that the backward pass computes again.
    for part in (model.adapter, *model.lm.blocks, model.lm.ln_out, model.lm.head) if dtype == torch.bfloat16 else ():
        setattr(part, "forward", _under_autocast(part.forward))  # noqa: B010 (an assignment to a method is none for mypy)
    for p in model.trained_parameters():
        p.grad = torch.empty_like(p)
    with _Meter(x for p in model.parameters() for x in (p, p.grad) if x is not None) as meter:
        data = batch.on_meta(model.encoder)
        before = meter.now
        hook = model.lm.blocks[-1].register_forward_pre_hook(meter.lap_behind)
        loss = model(data)
        hook.remove()
        kept = meter.now - before
        loss.backward()
    return meter.earlier_peak, meter.peak, kept, meter.operations, meter.launches


def _under_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with autocast("meta", True):
            return forward(*args)

    return call


class _Meter(TorchDispatchMode):
    """Counts bytes of living "meta" tensors but for the `held` ones, floating-point operations, and launches."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {x.untyped_storage()._cdata for x in held}
        self.now = self.peak = self.earlier_peak = self.operations = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, packet = func(*args, **(kwargs or {})), func._overloadpacket
        results = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor) and x.device.type == "meta"]
        new = {x._cdata: x for x in results if x._cdata not in self._known}
        for key, storage in new.items():
            self._known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.now + _scratch(packet, args))
        self.launches += bool(new) or bool(results and func._schema.is_mutable)
        self.operations += _OPERATIONS[packet](*args, **(kwargs or {}), out_val=out) if packet in _OPERATIONS else 0
        return out

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes

    def lap_behind(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """As a hook of a layer: once its backward pass is done, the peak begins again."""

        def lap(_: Tensor) -> None:
            self.earlier_peak, self.peak = self.peak, self.now

        inputs[0].register_hook(lap)


def _wkv6_operations(r: Tensor, *_: Any, **__: Any) -> int:
    """Each token of (B, T, H, N) reads the N² numbers of every head's state, decays them and adds to them."""
    return 5 * r.numel() * r.shape[-1]


def _wkv7_operations(r: Tensor, *_: Any, **__: Any) -> int:
    """In WKV-7 it reads them twice and adds to them twice."""
    return 9 * r.numel() * r.shape[-1]


_OPERATIONS = flop_registry | {
    torch.ops.rwkv_speech.wkv6: _wkv6_operations,
    torch.ops.rwkv_speech.wkv6_backward: lambda dy, dstate, r, *_, **__: 3 * _wkv6_operations(r),
    torch.ops.rwkv_speech.wkv7: _wkv7_operations,
    torch.ops.rwkv_speech.wkv7_backward: lambda dy, dstate, r, *_, **__: 3 * _wkv7_operations(r),
}


def _scratch(packet: Any, args: Any) -> int:
    """Bytes that a kernel allocates beside its results, which "meta" does not."""
    if packet in (torch.ops.aten.native_layer_norm, torch.ops.aten.convolution) and not args[0].is_contiguous():
        return int(args[0].nbytes)  # they copy it
    if packet == torch.ops.rwkv_speech.wkv6_backward:
        return _tile_bytes(args[2], args[7], 0)
    if packet == torch.ops.rwkv_speech.wkv7_backward:
        return _tile_bytes(args[2], args[8], _KERNEL_TILE)
    return 0


def _tile_bytes(r: Tensor, state: Tensor, vectors: int) -> int:
    """What is kept of all tiles of all sequences: the state before each, and so many vectors of a head's size."""
    tiles = r.shape[0] * r.shape[1] // _KERNEL_TILE + len(state)
    return tiles * (state[0].nbytes + vectors * 4 * state.shape[1] * state.shape[2])


class _EncoderOnGpu(TorchFunctionMode):
    """Attention in one kernel, where PyTorch would make the scores of all pairs on "meta"; and a mask for padding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args[:3], None, False)[0]
        if func is Tensor.all:  # whether there is no padding: what transformers asks for has no value here
            return torch.tensor(False)
        return func(*args, **(kwargs or {}))
