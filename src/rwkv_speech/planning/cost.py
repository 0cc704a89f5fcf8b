"""What a training step costs: the memory of each GPU, by part, and the time on paper."""

import torch

from rwkv_speech.config import TrainConfig
from rwkv_speech.data.epoch import Cut, EpochPlan, Floats
from rwkv_speech.devices import accelerator, compute_of, uses_bf16
from rwkv_speech.planning.measure import Cost, MicroBatch, Sizes, encoding, learning

GIB = 2**30
# The CUDA context with the libraries' own workspaces; and what the allocator loses between tensors. Assumed.
_CONTEXT, _FRAGMENTATION = 0.7 * GIB, 0.1
# Elements that DeepSpeed reduces at a time: more than is trained of any base model up to 7B. Its default is 5e8.
REDUCE_BUCKET = 25_000_000
# DeepSpeed's default of the parameters that its stage 3 may hold gathered.
_GATHERED = 1_000_000_000
# What an H200 does a second, and how much of it is reached: in bfloat16 as measured, else by data sheets and guesses.
OPERATIONS, REACHED = {torch.bfloat16: 790e12, torch.float32: 60e12}, {torch.bfloat16: 0.4, torch.float32: 0.7}
# Bytes a second of an all-reduce within a machine of 8 GPUs, and over several.
_INSIDE, _BETWEEN, _HOP_SECONDS, _LAUNCH_SECONDS = 300e9, 40e9, 2e-5, 6e-6
ASSUMED = (
    "H200: 40 % of 790 TFLOP/s reached in bfloat16, 70 % of 60 in float32, 6 µs a launch; all-reduce at 300 GB/s "
    "within 8 GPUs, 40 GB/s beyond"
)
# What the idle share of a large data set is estimated from.
_MOST_UTTERANCES = 200_000

Part = tuple[str, float, str, str]


def ranks_of(config: TrainConfig) -> int:
    """On how many devices a run computes."""
    return accelerator(config)[1] * config.num_nodes


class Step:
    """An optimizer step of `--accumulate` such micro batches on every rank: memory of each GPU, and time on paper.

    parts            name, bytes, "encoding" or "learning" for what is not there throughout, and a note
    tensors, needed  bytes of all at the worst moment; with the CUDA context and the allocator's losses
    sent             bytes of each rank: gradients around a ring; by stage 3 also the frozen weights, which it shards
    encoder, lm, launches, all_reduce  seconds
    seconds          computing or launching, whichever is longer, then the all-reduce
    """

    def __init__(self, sizes: Sizes, batch: MicroBatch, config: TrainConfig) -> None:
        compute, ranks, times = compute_of(config, "meta"), ranks_of(config), config.accumulate
        n = sizes.parameters
        lm, encoder = sizes.lm_bytes(compute.lm_dtype), sizes.encoder_bytes(compute.encoder_dtype)
        stage = int(config.strategy[-1]) if config.strategy.startswith("deepspeed") else 0
        learn = learning(sizes, batch, compute.lm_dtype, bool(config.grad_cp))
        encode = Cost()
        if not config.feature_cache:
            encode = encoding(sizes.encoder, batch, compute.encoder_dtype, sizes.frames)
        kept = (
            f"{sizes.positions(batch)} positions, {sizes.lm.n_layer} layers" + ", their inputs alone" * config.grad_cp
        )
        gathered = min(_GATHERED, n["lm"] + n["encoder"]) * compute.lm_dtype.itemsize
        parts = [
            *_held(lm, encoder, gathered, 4 * sizes.trained, stage, ranks),
            ("waveforms and the encoder's activations", encode.peak, "encoding", "no graph"),
            ("kept for the backward pass", learn.kept, "learning", kept),
            (
                "beside it at the worst moment",
                learn.peak - learn.kept,
                "learning",
                "logits, or a layer's backward pass",
            ),
        ]
        self.parts = [part for part in parts if part[1]]
        held, *phases = (sum(x[1] for x in self.parts if x[2] == phase) for phase in ("", "encoding", "learning"))
        self.tensors, self.needed = held + max(phases), _CONTEXT + held + (1 + _FRAGMENTATION) * max(phases)
        self.sent = (2 * 4 * sizes.trained + (stage == 3) * times * (2 * lm + encoder)) * (ranks - 1) / ranks
        bandwidth, hops = _INSIDE if ranks <= 8 else _BETWEEN, 2 * (ranks - 1).bit_length()
        self.all_reduce = self.sent / bandwidth + hops * _HOP_SECONDS
        self.encoder, self.lm = (
            times * cost.operations / (REACHED[dtype] * OPERATIONS[dtype])
            for cost, dtype in ((encode, compute.encoder_dtype), (learn, compute.lm_dtype))
        )
        self.launches = times * _LAUNCH_SECONDS * (encode.launches + learn.launches)
        self.seconds = max(self.encoder + self.lm, self.launches) + self.all_reduce


def _held(lm: float, encoder: float, gathered: float, trained: float, stage: int, ranks: int) -> list[Part]:
    """The parts that are there throughout, from bytes of the weights."""
    shards = ranks if stage == 3 else 1
    note = f"1/{ranks} of them: stage 3 shards the frozen weights, too" if shards > 1 else ""
    moments = f"1/{ranks} of two in float32 and a copy of the weights" if stage else "two in float32"
    return [
        ("language model, frozen", lm / shards, "", note),
        ("encoder, frozen", encoder / shards, "", note),
        ("gathered weights", gathered * (shards > 1), "", "what stage 3 fetches ahead, at most 1e9 parameters"),
        ("trained weights", trained / shards, "", "adapter and initial state in float32"),
        ("gradients", trained / (ranks if stage >= 2 else 1), "", ""),
        # Between several ranks, gradients are gathered in buckets: of the same size, or of DeepSpeed's.
        ("gradient buckets", 4 * REDUCE_BUCKET if stage else trained * (ranks > 1), "", ""),
        ("AdamW moments", (3 / ranks if stage else 2) * trained, "", moments),
    ]


def largest_micro_bsz(sizes: Sizes, batch: MicroBatch, config: TrainConfig, capacity: float) -> int:
    """How many utterances such as the batch's fit `capacity` bytes: on the straight line through two such batches."""
    n = max(8, batch.utterances)
    once, twice = (Step(sizes, batch._replace(utterances=m), config).needed for m in (n, 2 * n))
    return max(0, int(n + n * (capacity - once) / (twice - once)))


def idle_share(durations: Floats, config: TrainConfig) -> float:
    """The share of their time that ranks wait for the slowest in each step, if a micro batch costs its padded seconds.

    `durations` (N,) seconds, NaN where unknown. Large data sets are estimated from a part.
    """
    some, ranks = durations[:: -(-len(durations) // _MOST_UTTERANCES)], ranks_of(config)
    cut = Cut(config.micro_bsz, config.batch_seconds, world_size=ranks, accumulate=config.accumulate)
    epoch = EpochPlan(some, cut).epoch(0)
    # A rank's micro batches are every ranks-th slot of a step.
    costs = epoch.costs[epoch.steps].reshape(-1, config.accumulate, ranks).sum(1)
    return 1 - float(costs.mean(1).sum() / costs.max(1).sum())


def memory_advice(config: TrainConfig) -> str:
    """What to change when a GPU's memory does not suffice, the cheapest remedy first; names the flags."""
    ranks, accumulate, half = ranks_of(config), config.accumulate, max(1, config.micro_bsz // 2)
    if config.batch_seconds:
        smaller = f"--batch_seconds {config.batch_seconds / 2:g} with --accumulate {2 * accumulate}"
    else:  # rounded up, so that the batch does not become smaller
        smaller = f"--micro_bsz {half} with --accumulate {-(-config.micro_bsz * accumulate // half)}"
    sharded = ranks == 1 or config.strategy == "deepspeed_stage_3"
    remedies = (
        (config.batch_seconds or config.micro_bsz > 1, f"{smaller}: the same batch in smaller pieces"),
        (not config.grad_cp, "--grad_cp 1: keeps the layers' inputs alone, for about a third more time"),
        (True, f"--ctx_len {max(1, config.ctx_len // 2)}: leaves out the longest utterances, and lists them"),
        (
            not uses_bf16(config),
            "--precision bf16: half the memory of the frozen language model and of most activations",
        ),
        (not sharded, f"--strategy deepspeed_stage_3: shares the frozen weights, too, among the {ranks} GPUs"),
    )
    lines = [f"  {i}. {text}" for i, text in enumerate((text for helps, text in remedies if helps), start=1)]
    last = "  or a smaller base model with --load_model; `--plan 1` shows what each of these would take"
    return "\n".join(["the GPU's memory does not suffice; try, in this order:", *lines, last])
