"""What a micro batch keeps and computes: the real model runs on the "meta" device, where tensors have no values."""

# C channels · U utterances · F frames · A audio tokens · T positions of the packed batch

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.batch import Batch
from rwkv_speech.devices import autocast
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.planning.sizes import EncoderSizes, MicroBatch, Sizes

# Layers are alike from the second on: a deeper model costs what so many do, and the difference to one more for each.
_FEW_LAYERS = 2
# So are utterances, once the encoder's convolutions take them in pieces, of so many seconds, and the loss, too.
_SOME_CHUNKS, _CHUNK_SECONDS = 4, 30.0
# Tokens between two states that the GPU's backward kernel keeps.
_KERNEL_TILE = 16
# They copy an input that is not contiguous.
_COPYING = (torch.ops.aten.native_layer_norm, torch.ops.aten.convolution)


class Measured(NamedTuple):
    """Of one pass over a micro batch; weights, their gradients and the optimizer's tensors are left out."""

    kept: float  # bytes kept for the backward pass
    forward: float  # floating-point operations
    backward: float  # the same, with what is computed again
    launches: float  # operations that a GPU is handed
    peak: float  # bytes of all tensors at the worst moment

    @property
    def operations(self) -> float:
        """Of both passes."""
        return self.forward + self.backward


# The first four of Measured, and the peak of each phase, since these grow differently with layers and utterances: of
# convolutions, transformer; or of the forward pass, the backward pass of the last layer, the others, the adapter.
Numbers = NDArray[np.float64]


def encoding(encoder: EncoderSizes, batch: MicroBatch, bf16: bool) -> Measured:
    """The frozen encoder on a GPU, from waveforms to frames."""

    def measure(layers: int, utterances: int) -> Numbers:
        return _encoding(encoder.cut(layers), replace(batch, utterances=utterances), bf16)

    return _of_any_size(measure, encoder.config.num_hidden_layers, batch)


def learning(sizes: Sizes, batch: MicroBatch, bf16: bool, grad_cp: bool) -> Measured:
    """Adapter and language model on a GPU, forwards and backwards, from the encoder's frames on."""

    def measure(layers: int, utterances: int) -> Numbers:
        cut = replace(sizes, lm=replace(sizes.lm, n_layer=layers), encoder=sizes.encoder.cut(1))
        return _learning(cut, replace(batch, utterances=utterances), bf16, grad_cp)

    return _of_any_size(measure, sizes.lm.n_layer, batch)


def _of_any_size(measure: Callable[[int, int], Numbers], layers: int, batch: MicroBatch) -> Measured:
    """What `measure` finds, from a small model and a small batch where both are large."""
    some = _SOME_CHUNKS * max(1, int(_CHUNK_SECONDS / batch.seconds))

    def of_layers(utterances: int) -> Numbers:
        return _line(lambda n: measure(n, utterances), _FEW_LAYERS, _FEW_LAYERS + 1, layers)

    numbers = _line(of_layers, some, 2 * some, batch.utterances).tolist()
    return Measured._make([*numbers[:4], max(numbers[4:])])


def _line(measure: Callable[[int], Numbers], first: int, second: int, wanted: int) -> Numbers:
    """Measured at `wanted`, or where that lies beyond, on the straight line through two others."""
    if wanted <= second:
        return measure(wanted)
    a, b = measure(first), measure(second)
    return a + (b - a) * (wanted - first) / (second - first)


@functools.cache
def _encoding(encoder: EncoderSizes, batch: MicroBatch, bf16: bool) -> Numbers:
    model = encoder.build(bf16)
    data = _data(model, batch)
    with _Meter(model.parameters()) as meter, _EncoderOnGpu():
        meter.hold(data.waveforms)
        transformer: Any = model.model
        transformer.encoder.register_forward_pre_hook(meter.lap)
        model(data.waveforms, data.num_samples)
        meter.lap()
    return np.array([0, meter.operations, 0, meter.launches, *meter.laps])


@functools.cache
def _learning(sizes: Sizes, batch: MicroBatch, bf16: bool, grad_cp: bool) -> Numbers:
    model = sizes.build(bf16)
    model.lm.grad_cp = grad_cp
    for part in (model.adapter, *model.lm.blocks, model.lm.ln_out, model.lm.head) if bf16 else ():
        _under_autocast(part)
    data = _data(model.encoder, batch)
    gradients = [torch.empty_like(p) for p in model.trained_parameters()]
    for p, gradient in zip(model.trained_parameters(), gradients, strict=True):
        p.grad = gradient

    def lap_behind(_: Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].register_hook(meter.lap)

    with _Meter([*model.parameters(), *gradients]) as meter:
        meter.hold(data.waveforms)
        meter.hold(data.frames)
        hooks = [model.lm.blocks[layer].register_forward_pre_hook(lap_behind) for layer in (0, -1)]
        with torch.autograd.graph.saved_tensors_hooks(meter.keep, lambda x: x):
            loss = model(data)
        for hook in hooks:
            hook.remove()
        meter.lap()
        kept, forward = meter.kept(), meter.operations
        loss.backward()
        meter.lap()
    return np.array([kept, forward, meter.operations - forward, meter.launches, *meter.laps])


def _data(encoder: SpeechEncoder, batch: MicroBatch) -> Batch:
    """Audio and frames on "meta"; lengths and text on the host, as always."""
    U, samples = batch.utterances, round(batch.seconds * SAMPLE_RATE)
    num_samples = torch.full((U,), samples)
    frame_lengths = encoder.frame_lengths(num_samples)
    return Batch(
        indices=[0] * U,
        ids=[""] * U,
        tasks=["asr"] * U,
        langs=[None] * U,
        waveforms=torch.empty(U, samples, device="meta"),
        num_samples=num_samples,
        text_ids=torch.ones(U * batch.text_tokens, dtype=torch.int64),
        text_lengths=torch.full((U,), batch.text_tokens),
        texts=[""] * U,
        bad=[],
        frames=torch.empty(U, int(frame_lengths.max()), encoder.width, device="meta"),
        frame_lengths=frame_lengths,
    )


def _under_autocast(module: Module) -> None:
    """Module by module, since nothing is left around a layer that the backward pass computes again."""
    forward = module.forward

    def call(*args: Any) -> Any:
        with autocast("meta", True):
            return forward(*args)

    setattr(module, "forward", call)  # noqa: B010


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Meter(TorchDispatchMode):
    """Counts bytes of living "meta" storages other than `held`, floating-point operations, and launches."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self._held, self._living, self._kept = {_key(x) for x in held}, dict[int, int](), set[int]()
        self.laps: list[int] = []
        self.now = self.peak = self.operations = self.launches = 0

    def hold(self, x: Tensor | None) -> bool:
        """Count a tensor's storage until it is freed; False if it is counted already, or not to be."""
        if x is None or x.device.type != "meta" or (key := _key(x)) in self._held or key in self._living:
            return False
        storage = x.untyped_storage()
        self._living[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key)
        return True

    def _release(self, key: int) -> None:
        self.now -= self._living.pop(key)
        self._kept.discard(key)

    def keep(self, x: Tensor) -> Tensor:
        """As a hook of what autograd saves."""
        self._kept.add(_key(x))
        return x

    def kept(self) -> int:
        """Bytes that autograd has saved and not given up."""
        return sum(self._living.get(key, 0) for key in self._kept)

    def lap(self, *_: Any) -> None:
        """As a hook: the end of a phase."""
        self.laps.append(self.peak)
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.device.type == "meta"]
        new = [self.hold(x) for x in results]
        self.launches += any(new) or bool(results and func._schema.is_mutable)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.operations += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet == torch.ops.rwkv_speech.wkv6:
            self.operations += _wkv6_operations(args[0])
        elif packet == torch.ops.rwkv_speech.wkv6_backward:
            self.operations += 3 * _wkv6_operations(args[2])
        self.peak = max(self.peak, self.now + _scratch(packet, args))
        return out


def _scratch(packet: Any, args: Any) -> int:
    """Bytes that a kernel allocates beside its results, which "meta" does not."""
    if packet in _COPYING and not args[0].is_contiguous():
        return int(args[0].nbytes)
    if packet == torch.ops.rwkv_speech.wkv6_backward:
        r, state = args[2], args[7]
        # The states before all tiles of all sequences.
        return int((r.shape[0] * r.shape[1] // _KERNEL_TILE + len(state)) * state[0].nbytes)
    return 0


def _wkv6_operations(r: Tensor) -> int:
    """Each token of (B, T, H, N) reads the N² numbers of every head's state, decays them and adds to them."""
    return 5 * r.numel() * r.shape[-1]


class _EncoderOnGpu(TorchFunctionMode):
    """Attention in one kernel, where PyTorch would make the scores of all pairs on "meta"; and a mask for padding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args[:3], None, False)[0]
        if func is Tensor.all:  # whether there is no padding: what transformers asks for has no value here
            return torch.tensor(False)
        return func(*args, **(kwargs or {}))
