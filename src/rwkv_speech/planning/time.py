"""How many steps a run takes, and how long each is on paper: operations, launches, and traffic between GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rwkv_speech.data.epoch import Cut, EpochPlan, Floats
from rwkv_speech.data.source import Part
from rwkv_speech.errors import UserError
from rwkv_speech.planning.measure import encoding, learning
from rwkv_speech.planning.memory import Setup
from rwkv_speech.planning.sizes import MicroBatch, Sizes

# What the idle share of a large data set is estimated from.
_MOST_UTTERANCES = 200_000
# Read speech of LibriSpeech's pace in World tokens.
TEXT_TOKENS_PER_SECOND = 4.0
# Taken where no duration is known.
_UNKNOWN_SECONDS = 12.0


@dataclass(frozen=True)
class Gpu:
    """What a GPU is taken to do. Operations and bytes per second; the utilisations are the shares that are reached.

    `inside` and `between` are the bandwidths of an all-reduce within a machine of `per_node` GPUs, and over several.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    utilisation: float = 0.4
    fp32_utilisation: float = 0.7
    launch_seconds: float = 6e-6
    per_node: int = 8
    inside: float = 300e9
    between: float = 40e9
    hop_seconds: float = 2e-5

    def assumptions(self) -> str:
        """One line for a report."""
        return (
            f"{self.name}: {100 * self.utilisation:.0f} % of {self.bf16 / 1e12:.0f} TFLOP/s reached in bfloat16, "
            f"{100 * self.fp32_utilisation:.0f} % of {self.fp32 / 1e12:.0f} in float32, "
            f"{1e6 * self.launch_seconds:.0f} µs a launch; all-reduce at {self.inside / 1e9:.0f} GB/s within "
            f"{self.per_node} GPUs, {self.between / 1e9:.0f} GB/s beyond"
        )


# bfloat16 was measured; the other numbers are data sheets' and guesses.
H200 = Gpu("H200", memory=139 * 2**30, bf16=790e12, fp32=60e12)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    encoder: float
    lm: float
    all_reduce: float
    launches: float  # what the operations take to start, which nothing can undercut

    @property
    def total(self) -> float:
        """Seconds: computing or launching, whichever is longer, then the all-reduce."""
        return max(self.encoder + self.lm, self.launches) + self.all_reduce


def all_reduce_bytes(sizes: Sizes, setup: Setup) -> float:
    """Bytes that each rank sends in an optimizer step: the gradients of the trained parameters, around a ring.

    Stage 3 also fetches the frozen weights, which it shards: those of the language model forwards and backwards.
    """
    volume = 2 * 4 * sizes.trained
    if setup.zero_stage() == 3:
        lm = (2 if setup.bf16 else 4) * sizes.parameters["lm"]
        encoder = (2 if setup.encoder_bf16 else 4) * sizes.parameters["encoder"]
        volume += setup.accumulate * (2 * lm + encoder)
    return volume * (setup.ranks - 1) / setup.ranks


def step_time(sizes: Sizes, batch: MicroBatch, setup: Setup, gpu: Gpu) -> StepTime:
    """One optimizer step of `setup.accumulate` such micro batches on every rank."""
    rates = {True: gpu.utilisation * gpu.bf16, False: gpu.fp32_utilisation * gpu.fp32}
    lm = learning(sizes, batch, setup.bf16, setup.grad_cp)
    encoder = None if setup.cached_frames else encoding(sizes.encoder, batch, setup.encoder_bf16)
    launches = lm.launches + (encoder.launches if encoder else 0)
    bandwidth = gpu.inside if setup.ranks <= gpu.per_node else gpu.between
    hops = 2 * (setup.ranks - 1).bit_length() * gpu.hop_seconds
    return StepTime(
        encoder=setup.accumulate * encoder.operations / rates[setup.encoder_bf16] if encoder else 0.0,
        lm=setup.accumulate * lm.operations / rates[setup.bf16],
        all_reduce=all_reduce_bytes(sizes, setup) / bandwidth + hops,
        launches=setup.accumulate * gpu.launch_seconds * launches,
    )


def idle_share(durations: Floats, micro_bsz: int, batch_seconds: float | None, setup: Setup) -> float:
    """The share of their time that ranks wait for the slowest in each step, if a micro batch costs its padded seconds.

    `durations` (N,) seconds, NaN where unknown, which counts as 1 s each. Large data sets are estimated from a part.
    """
    if setup.ranks == 1 or not len(durations):
        return 0.0
    known = np.nan_to_num(durations[:: -(-len(durations) // _MOST_UTTERANCES)], nan=1.0)
    plan = EpochPlan(known, Cut(micro_bsz, batch_seconds, world_size=setup.ranks, accumulate=setup.accumulate))
    epoch = plan.epoch(0)
    sizes = np.diff(epoch.bounds)
    filled = np.flatnonzero(sizes)
    costs = np.zeros(len(sizes))
    costs[filled] = np.maximum.reduceat(known[epoch.order], epoch.bounds[filled]) * sizes[filled]
    # A rank's micro batches are every ranks-th slot of a step.
    of_ranks = costs[epoch.steps].reshape(len(epoch.steps), setup.accumulate, setup.ranks).sum(1)
    slowest: float = of_ranks.max(1).sum()
    return 1 - float(of_ranks.mean(1).sum()) / slowest


@dataclass(frozen=True)
class DataPlan:
    """The data of a run as its flags cut it up.

    `durations` (N,) seconds, NaN where unknown; `parts` say how often an epoch hears each run of them, by default all
    once. Raises UserError for no utterances at all.
    """

    durations: Floats
    micro_bsz: int
    batch_seconds: float | None
    ctx_len: int
    epochs: int
    epoch_steps: int | None = None
    parts: Sequence[Part] | None = None

    def __post_init__(self) -> None:
        if not len(self.durations):
            raise UserError("--train_data: found no utterance, expected one at least to plan a run: check the data")

    @cached_property
    def micro_batches(self) -> int:
        """Of a whole epoch, on all GPUs together."""
        return EpochPlan(self.durations, Cut(self.micro_bsz, self.batch_seconds), self.parts).steps

    @cached_property
    def utterances(self) -> float:
        """Of a whole epoch."""
        return float(self._weights().sum())

    @cached_property
    def mean_seconds(self) -> float:
        """Of the utterances whose duration is known; 12 where none is."""
        known = ~np.isnan(self.durations)
        weights = self._weights()[known]
        return float(np.average(self.durations[known], weights=weights)) if weights.sum() else _UNKNOWN_SECONDS

    @property
    def hours(self) -> float:
        """Audio of a whole epoch."""
        return self.utterances * self.mean_seconds / 3600

    def _weights(self) -> Floats:
        parts = [Part(len(self.durations))] if self.parts is None else self.parts
        return np.repeat(np.array([part.weight for part in parts], np.float32), [part.size for part in parts])

    def unknown(self) -> int:
        """How many utterances have no known duration."""
        return int(np.isnan(self.durations).sum())

    def steps(self, setup: Setup) -> int:
        """Optimizer steps of an epoch."""
        steps = -(-self.micro_batches // (setup.ranks * setup.accumulate))
        return min(steps, self.epoch_steps or steps)

    def largest(self, sizes: Sizes) -> MicroBatch:
        """The micro batch that needs most memory: the longest utterances, as far as the context reaches."""
        bound = (self.ctx_len - 1) / (sizes.audio_tokens(100.0) / 100 + TEXT_TOKENS_PER_SECOND)
        longest = bound if self.unknown() else min(bound, float(self.durations.max()))
        return _micro_batch(
            max(1, int(self.batch_seconds // longest)) if self.batch_seconds else self.micro_bsz, longest
        )

    def average(self) -> MicroBatch:
        """The micro batch that takes the average time."""
        return _micro_batch(max(1, round(self.utterances / self.micro_batches)), self.mean_seconds)


def _micro_batch(utterances: int, seconds: float) -> MicroBatch:
    return MicroBatch(utterances, seconds, round(seconds * TEXT_TOKENS_PER_SECOND))
