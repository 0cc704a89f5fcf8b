"""How much memory a training step takes on each GPU, by part, and what to change when that is too much."""

from dataclasses import dataclass, replace

from rwkv_speech.config import TrainConfig
from rwkv_speech.devices import accelerator, uses_bf16
from rwkv_speech.planning.measure import encoding, learning
from rwkv_speech.planning.sizes import MicroBatch, Sizes

GIB = 2**30
# The CUDA context with the libraries' own workspaces; and what the allocator loses between tensors. Assumed.
_CONTEXT = 0.7 * GIB
_FRAGMENTATION = 0.1
# Elements that DeepSpeed reduces at a time: more than is trained of any base model up to 7B. Its default is 5e8.
REDUCE_BUCKET = 25_000_000
# DeepSpeed's default of the parameters that its stage 3 may hold gathered.
_GATHERED = 1_000_000_000
_MOST_UTTERANCES = 4096


@dataclass(frozen=True)
class Setup:
    """How a run computes.

    `bf16`: the language model in bfloat16, under autocast; `encoder_bf16` the same of the encoder. What is trained is
    in float32 throughout. `cached_frames`: they come from a feature cache, the encoder rests.
    """

    bf16: bool = True
    encoder_bf16: bool = False
    grad_cp: bool = False
    strategy: str = "auto"
    ranks: int = 1
    accumulate: int = 1
    cached_frames: bool = False

    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
        return int(self.strategy[-1]) if self.strategy.startswith("deepspeed") else 0


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
    def passing(self) -> float:
        """Bytes of what comes and goes, at the worst moment."""
        return max(_sum(self.encoding), _sum(self.learning))

    @property
    def tensors(self) -> float:
        """Bytes of all tensors at the worst moment."""
        return _sum(self.held) + self.passing

    @property
    def needed(self) -> float:
        """Bytes that the GPU should have: the tensors, the CUDA context and the allocator's losses."""
        return _CONTEXT + self.tensors + _FRAGMENTATION * self.passing


def _sum(parts: tuple[Part, ...]) -> float:
    return sum(part.bytes for part in parts)


def memory(sizes: Sizes, batch: MicroBatch, setup: Setup) -> Memory:
    """The memory of one GPU for micro batches such as this one, which should be the largest of the run."""
    step = learning(sizes, batch, setup.bf16, setup.grad_cp)
    note = f"{batch.positions(sizes)} positions, {sizes.lm.n_layer} layers"
    encoder = () if setup.cached_frames else (encoding(sizes.encoder, batch, setup.encoder_bf16).peak,)
    return Memory(
        held=(*_frozen(sizes, setup), *_trained(sizes, setup)),
        encoding=tuple(Part("waveforms and the encoder's activations", peak, "no graph") for peak in encoder),
        learning=(
            Part("kept for the backward pass", step.kept, note + ", their inputs alone" * setup.grad_cp),
            Part("beside it at the worst moment", step.peak - step.kept, "logits, or a layer's backward pass"),
        ),
    )


def _frozen(sizes: Sizes, setup: Setup) -> tuple[Part, ...]:
    sharded = setup.ranks if setup.zero_stage() == 3 else 1
    note = f"1/{sharded} of them: stage 3 shards the frozen weights, too" if sharded > 1 else ""
    lm = sizes.parameters["lm"] * _width(setup.bf16)
    encoder = sizes.parameters["encoder"] * _width(setup.encoder_bf16)
    parts = [Part("language model, frozen", lm / sharded, note), Part("encoder, frozen", encoder / sharded, note)]
    if sharded > 1:
        gathered = min(_GATHERED, sizes.parameters["lm"] + sizes.parameters["encoder"]) * _width(setup.bf16)
        parts.append(Part("gathered weights", gathered, "what stage 3 fetches ahead, at most 1e9 parameters"))
    return tuple(parts)


def _trained(sizes: Sizes, setup: Setup) -> tuple[Part, ...]:
    trained, stage, ranks = 4 * sizes.trained, setup.zero_stage(), setup.ranks
    moments = f"1/{ranks} of two in float32 and a copy of the weights" if stage else "two in float32"
    # Between several ranks, gradients are gathered in buckets: of the same size, or of DeepSpeed's.
    buckets = 4 * REDUCE_BUCKET if stage else trained * (ranks > 1)
    return (
        Part("trained weights", trained / (ranks if stage == 3 else 1), "adapter and initial state in float32"),
        Part("gradients", trained / (ranks if stage >= 2 else 1)),
        Part("gradient buckets", buckets),
        Part("AdamW moments", (3 / ranks if stage else 2) * trained, moments),
    )


def _width(bf16: bool) -> int:
    return 2 if bf16 else 4


def largest_micro_bsz(sizes: Sizes, batch: MicroBatch, setup: Setup, capacity: float) -> int:
    """How many utterances such as the batch's fit a GPU of `capacity` bytes at a time; 0 if none does."""
    fits, too_many, guess = 0, _MOST_UTTERANCES + 1, batch.utterances
    while too_many - fits > 1:
        found = memory(sizes, replace(batch, utterances=guess), setup)
        if found.needed <= capacity:
            fits = guess
        else:
            too_many = guess
        # What comes and goes grows nearly in proportion.
        free = capacity - (found.needed - (1 + _FRAGMENTATION) * found.passing)
        proportional = int(free * guess / ((1 + _FRAGMENTATION) * found.passing))
        guess = min(max(proportional, fits + 1), too_many - 1)
    return fits


def memory_advice(config: TrainConfig) -> str:
    """What to change when a GPU's memory does not suffice, the cheapest remedy first; names the flags."""
    micro_bsz, accumulate = config.micro_bsz, config.accumulate
    ranks = accelerator(config)[1] * config.num_nodes
    steps = []
    if config.batch_seconds:
        half = config.batch_seconds / 2
        steps.append(f"--batch_seconds {half:g} with --accumulate {2 * accumulate}: the same batch in smaller pieces")
    elif micro_bsz > 1:
        # Rounded up, so that the batch does not become smaller.
        pieces = -(-micro_bsz * accumulate // (micro_bsz // 2))
        steps.append(f"--micro_bsz {micro_bsz // 2} with --accumulate {pieces}: the same batch in smaller pieces")
    if not config.grad_cp:
        steps.append("--grad_cp 1: keeps the layers' inputs alone, for about a third more time")
    steps.append(f"--ctx_len {max(1, config.ctx_len // 2)}: leaves out the longest utterances, and lists them")
    if not uses_bf16(config):
        steps.append("--precision bf16: half the memory of the frozen language model and of most activations")
    if ranks > 1 and config.strategy != "deepspeed_stage_3":
        steps.append(f"--strategy deepspeed_stage_3: shares the frozen weights, too, among the {ranks} GPUs")
    lines = [f"  {number}. {step}" for number, step in enumerate(steps, start=1)]
    last = "or a smaller base model with --load_model; `--plan 1` shows what each of these would take"
    return "\n".join(["the GPU's memory does not suffice; try, in this order:", *lines, f"  {last}"])
