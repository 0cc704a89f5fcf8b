"""How much memory a training step takes on each GPU, by part, and what to change when that is too much.

The formulas count the tensors of the real code: tests compare them with what PyTorch keeps and allocates.
"""

# C channels · D encoder width · V vocabulary · U utterances · F frames · A audio tokens · T positions

from dataclasses import dataclass, replace

from rwkv_speech.models.losses import TARGETS_AT_ONCE
from rwkv_speech.planning.sizes import EncoderSizes, MicroBatch, ModelSizes, Setup

GIB = 2**30
# The CUDA context with the libraries' own workspaces; and what the allocator loses between tensors. Assumed.
_CONTEXT = 0.7 * GIB
_FRAGMENTATION = 0.1
# Elements that DeepSpeed reduces at a time: more than is trained of any base model up to 7B. Its default is 5e8.
REDUCE_BUCKET = 25_000_000
# DeepSpeed's default of the parameters that its stage 3 may hold gathered.
_GATHERED = 1_000_000_000
# Float32 numbers per position and channel in WKV-6's backward pass, less what of its layer is free by then.
_WKV_PORTABLE, _WKV_NATIVE = 25, 8
# The first convolution's output is held about so many times over between it, its norm and the next convolution.
_CONV_COPIES = 3.5
_CONV_SECONDS_AT_ONCE = 30.0
_MOST_UTTERANCES = 4096


@dataclass(frozen=True)
class Part:
    """Bytes, and a note of what they are."""

    name: str
    bytes: float
    note: str = ""


@dataclass(frozen=True)
class Memory:
    """Of one GPU: what is `held` throughout, and what comes and goes while `encoding` and while `learning`."""

    held: tuple[Part, ...]
    encoding: tuple[Part, ...]
    learning: tuple[Part, ...]

    @property
    def tensors(self) -> float:
        """Bytes of all tensors at the worst moment."""
        return _sum(self.held) + self.passing

    @property
    def needed(self) -> float:
        """Bytes that the GPU should have: the tensors, the CUDA context and the allocator's losses."""
        return _CONTEXT + self.tensors + _FRAGMENTATION * self.passing

    @property
    def passing(self) -> float:
        """Bytes of what comes and goes, at the worst moment."""
        return max(_sum(self.encoding), _sum(self.learning))


def _sum(parts: tuple[Part, ...]) -> float:
    return sum(part.bytes for part in parts)


def memory(model: ModelSizes, batch: MicroBatch, setup: Setup) -> Memory:
    """The memory of one GPU for micro batches such as this one, which should be the largest of the run."""
    return Memory(
        held=(*_frozen(model, setup), *_trained(model, setup)),
        encoding=() if setup.cached_frames else _encoding(model.encoder, batch, setup.encoder_bf16),
        learning=(
            _adapter_activations(model, batch),
            *_lm_activations(model, batch, setup),
        ),
    )


def _frozen(model: ModelSizes, setup: Setup) -> tuple[Part, ...]:
    sharded = setup.ranks if setup.zero_stage() == 3 else 1
    note = f"1/{sharded} of them: stage 3 shards the frozen weights, too" if sharded > 1 else ""
    lm = model.lm_parameters() * _width(setup.bf16)
    encoder = model.encoder.parameters * _width(setup.encoder_bf16)
    parts = [
        Part("language model, frozen", lm / sharded, note),
        Part("encoder, frozen", encoder / sharded, note),
    ]
    if sharded > 1:
        gathered = min(_GATHERED, model.lm_parameters() + model.encoder.parameters) * _width(setup.bf16)
        parts.append(Part("gathered weights", gathered, "what stage 3 fetches ahead, at most 1e9 parameters"))
    return tuple(parts)


def _trained(model: ModelSizes, setup: Setup) -> tuple[Part, ...]:
    trained, stage, ranks = model.trained_parameters(), setup.zero_stage(), setup.ranks
    if not stage:
        # Between several ranks, gradients are gathered in buckets of the same size.
        gradients = 8 if ranks > 1 else 4
        return (
            Part("trained weights", 4 * trained, "adapter and initial state in float32"),
            Part("gradients", gradients * trained, "with their buckets" if ranks > 1 else ""),
            Part("AdamW moments", 8 * trained, "two in float32"),
        )
    # DeepSpeed works on a copy of the weights.
    return (
        Part("trained weights", 4 * trained / (ranks if stage == 3 else 1), "adapter and initial state in float32"),
        Part("gradients", 4 * trained / (ranks if stage >= 2 else 1)),
        Part("AdamW moments", 12 * trained / ranks, f"and a copy of the weights, 1/{ranks} of them"),
        Part("gradient bucket", 4 * REDUCE_BUCKET, "DeepSpeed's, float32"),
    )


def _encoding(encoder: EncoderSizes, batch: MicroBatch, bf16: bool) -> tuple[Part, ...]:
    """What the encoder needs at its worst moment; it keeps no graph."""
    U, F, D = batch.utterances, encoder.frames(batch.seconds), encoder.width
    at_once = min(U * batch.seconds, max(batch.seconds, _CONV_SECONDS_AT_ONCE))
    convolutions = _CONV_COPIES * 4 * at_once * encoder.conv_rates()[0] * encoder.conv_width[0]
    width = _width(bf16)
    hidden = U * F * D
    # Rows of the attention's mask begin at multiples of 8.
    bias = encoder.bias_heads * F * (U * -(-F // 8) * 8 + F) * width
    layer = bias + hidden * 4 * (4 + width)
    feed_forward = encoder.bias_heads * F * F * width + U * F * encoder.ffn * 2 * width + hidden * 12
    waveforms = Part("waveforms", 3 * U * batch.seconds * 16_000 * 4, "and their normalised copies")
    worst = max(convolutions, layer, feed_forward)
    note = {convolutions: "its convolutions", layer: "its attention, with the bias"}.get(worst, "its feed-forward part")
    return waveforms, Part("encoder activations", worst, f"no graph; at the worst moment: {note}")


def _adapter_activations(model: ModelSizes, batch: MicroBatch) -> Part:
    A = batch.utterances * model.audio_tokens(batch.seconds)
    numbers = model.encoder.width * model.stack + 2 * model.adapter_hidden + model.lm.C
    return Part("adapter activations", 4 * A * numbers)


def layer_bytes(model: ModelSizes, positions: int, bf16: bool) -> int:
    """Bytes that one layer of the language model keeps for its backward pass.

    Of numbers as wide as C: five as wide as the norms' (both inputs of norms, the token shift's difference, the group
    norm's input and output), six as the matrices' (r, k, v, the gate, the feed-forward part's gate and value), and the
    decay in float32.
    """
    s = model.lm
    width = _width(bf16)
    channels = s.C * (5 * 4 + 6 * width + 4)
    low_rank = (5 * s.mix_rank + s.decay_rank) * width
    statistics = 2 * 2 * 4 + 2 * 4 * s.H
    return positions * (channels + s.ffn * width + low_rank + statistics)


def _lm_activations(model: ModelSizes, batch: MicroBatch, setup: Setup) -> tuple[Part, ...]:
    """What the language model keeps, and beside it the worse of two: the loss, a layer's backward pass."""
    T, layers = batch.positions(model), model.lm.n_layer
    layer = layer_bytes(model, T, setup.bf16)
    note = f"{T} positions, {layers} layers"
    # The float32 logits become their own gradient; a head in bfloat16 makes and takes them in bfloat16.
    targets = min(batch.targets(), TARGETS_AT_ONCE)
    logits = (8 if setup.bf16 else 4) * targets * model.lm.vocab
    states = 4 * batch.utterances * model.state_parameters()
    at_loss = (Part("logits and their gradients", logits, f"{targets} targets at a time, {model.lm.vocab} tokens"),)
    wkv = 4 * T * model.lm.C * (_WKV_NATIVE if setup.native_wkv else _WKV_PORTABLE)
    at_layer: tuple[Part, ...] = (
        Part("WKV-6 scratch", wkv, "backward pass of one layer"),
        Part("gradients of the initial state", states, "one for every utterance, before they are summed"),
    )
    if setup.grad_cp:
        kept = Part("language model's inputs of layers", 4 * T * model.lm.C * layers, note)
        at_layer = (Part("language model activations", layer, "of one layer, computed again"), *at_layer)
    else:
        kept = Part("language model activations", layers * layer, note)
    return (kept, *max(at_loss, at_layer, key=_sum))


def _width(bf16: bool) -> int:
    return 2 if bf16 else 4


def largest_micro_bsz(model: ModelSizes, batch: MicroBatch, setup: Setup, capacity: float) -> int:
    """How many utterances such as the batch's fit a GPU of `capacity` bytes at a time; 0 if none does."""
    fits = 0
    while fits < _MOST_UTTERANCES and _needed(model, replace(batch, utterances=fits + 1), setup) <= capacity:
        fits += 1
    return fits


def _needed(model: ModelSizes, batch: MicroBatch, setup: Setup) -> float:
    return memory(model, batch, setup).needed


def out_of_memory_advice(
    *,
    micro_bsz: int,
    batch_seconds: float | None,
    accumulate: int,
    grad_cp: bool,
    ctx_len: int,
    bf16: bool,
    strategy: str,
    ranks: int,
) -> str:
    """What to change when a GPU's memory does not suffice, the cheapest remedy first; names the flags."""
    steps = []
    if batch_seconds:
        half = batch_seconds / 2
        steps.append(f"--batch_seconds {half:g} with --accumulate {2 * accumulate}: the same batch in smaller pieces")
    elif micro_bsz > 1:
        # Rounded up, so that the batch does not become smaller.
        pieces = -(-micro_bsz * accumulate // (micro_bsz // 2))
        steps.append(f"--micro_bsz {micro_bsz // 2} with --accumulate {pieces}: the same batch in smaller pieces")
    if not grad_cp:
        steps.append("--grad_cp 1: keeps the layers' inputs alone, for about a third more time")
    steps.append(f"--ctx_len {max(1, ctx_len // 2)}: leaves out the longest utterances, and lists them")
    if not bf16:
        steps.append("--precision bf16: half the memory of the frozen language model and of most activations")
    if ranks > 1 and not strategy.endswith("3"):
        steps.append(f"--strategy deepspeed_stage_3: shares the frozen weights, too, among the {ranks} GPUs")
    lines = [f"  {number}. {step}" for number, step in enumerate(steps, start=1)]
    last = "or a smaller base model with --load_model; `--plan 1` shows what each of these would take"
    return "\n".join(["the GPU's memory does not suffice; try, in this order:", *lines, f"  {last}"])
