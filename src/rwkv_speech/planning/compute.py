"""How long a training step takes on paper: floating-point operations, launches, and traffic between GPUs."""

# C channels · D encoder width · V vocabulary · F frames · T positions · R ranks

from dataclasses import dataclass

import numpy as np

from rwkv_speech.data.epoch import Cut, EpochPlan, Floats
from rwkv_speech.planning.sizes import EncoderSizes, MicroBatch, ModelSizes, Setup

# Operations that one layer launches: of the language model forwards and backwards (counted), of the encoder.
_LAUNCHES_FORWARD, _LAUNCHES_BACKWARD, _LAUNCHES_ENCODER = 71, 93, 30
# What the idle share of a large data set is estimated from.
_MOST_UTTERANCES = 200_000


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
class Operations:
    """Floating-point operations of one micro batch; nothing is computed for the gradients of frozen weights."""

    encoder: float
    forward: float
    backward: float
    again: float  # the layers once more, with recomputation

    @property
    def lm(self) -> float:
        """Of language model and adapter."""
        return self.forward + self.backward + self.again


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


def operations(model: ModelSizes, batch: MicroBatch, grad_cp: bool) -> Operations:
    """Two for each weight and position, and the attention's F² of the encoder; WKV-6 itself is below 1 % of these.

    The backward pass of a frozen matrix has one product, so has the adapter's first, and its second has two.
    """
    positions, s = batch.positions(model), model.lm
    layers = 2 * s.n_layer * model.layer_matrices() * positions
    head = 2 * s.vocab * s.C * batch.targets()
    audio_tokens = batch.utterances * model.audio_tokens(batch.seconds)
    first = 2 * model.encoder.width * model.stack * model.adapter_hidden * audio_tokens
    second = 2 * model.adapter_hidden * s.C * audio_tokens
    return Operations(
        encoder=batch.utterances * encoder_operations(model.encoder, batch.seconds),
        forward=layers + head + first + second,
        backward=layers + head + first + 2 * second,
        again=layers if grad_cp else 0,
    )


def encoder_operations(encoder: EncoderSizes, seconds: float) -> float:
    """Of one utterance."""
    frames, convolutions = encoder.frames(seconds), encoder.conv_parameters()
    conv = sum(2 * n * rate * seconds for n, rate in zip(convolutions, encoder.conv_rates(), strict=True))
    matrices = 2 * (encoder.parameters - sum(convolutions)) * frames
    return conv + matrices + 4 * frames**2 * encoder.width * encoder.n_layer


def all_reduce_bytes(model: ModelSizes, setup: Setup) -> float:
    """Bytes that each rank sends in an optimizer step: the gradients of the trained parameters, around a ring.

    Stage 3 also fetches the frozen weights, which it shards: those of the language model forwards and backwards.
    """
    volume = 2 * 4 * model.trained_parameters()
    if setup.zero_stage() == 3:
        lm = (2 if setup.bf16 else 4) * model.lm_parameters()
        encoder = (2 if setup.encoder_bf16 else 4) * model.encoder.parameters
        volume += setup.accumulate * (2 * lm + encoder)
    return volume * (setup.ranks - 1) / setup.ranks


def step_time(model: ModelSizes, batch: MicroBatch, setup: Setup, gpu: Gpu) -> StepTime:
    """One optimizer step of `setup.accumulate` such micro batches on every rank."""
    work = operations(model, batch, setup.grad_cp)
    rates = {True: gpu.utilisation * gpu.bf16, False: gpu.fp32_utilisation * gpu.fp32}
    a_layer = _LAUNCHES_FORWARD * (2 if setup.grad_cp else 1) + _LAUNCHES_BACKWARD
    encoder_layers = 0 if setup.cached_frames else model.encoder.n_layer
    launches = gpu.launch_seconds * (model.lm.n_layer * a_layer + encoder_layers * _LAUNCHES_ENCODER)
    bandwidth = gpu.inside if setup.ranks <= gpu.per_node else gpu.between
    hops = 2 * (setup.ranks - 1).bit_length() * gpu.hop_seconds
    return StepTime(
        encoder=0.0 if setup.cached_frames else setup.accumulate * work.encoder / rates[setup.encoder_bf16],
        lm=setup.accumulate * work.lm / rates[setup.bf16],
        all_reduce=all_reduce_bytes(model, setup) / bandwidth + hops,
        launches=setup.accumulate * launches,
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
