"""What a run will cost, before it starts: parameters, memory of each GPU, data, time. `train.py --plan 1` prints it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rwkv_speech.config import TrainConfig
from rwkv_speech.data.epoch import Cut, EpochPlan, Floats
from rwkv_speech.data.source import Part
from rwkv_speech.errors import UserError
from rwkv_speech.planning import cost
from rwkv_speech.planning.cost import GIB, Step, ranks_of
from rwkv_speech.planning.measure import BASE_MODELS, MicroBatch, Sizes

# Read speech of LibriSpeech's pace in World tokens; and seconds that are taken where no duration is known.
_TOKENS_PER_SECOND, _UNKNOWN_SECONDS = 4.0, 12.0
_RANKS, _HOURS, _GROWTH_RANKS = (1, 8, 64), (100, 1_000, 10_000, 100_000), 8
_UNITS = (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 86400), ("days", 86400, float("inf")))
# What a GPU sold with 24 GB has, and an H200.
_SMALL_GPU, _H200 = 23.5 * GIB, 139 * GIB


@dataclass(frozen=True)
class Data:
    """What an epoch hears: `durations` (N,) seconds, NaN where unknown; in all so many utterances and micro batches."""

    durations: Floats
    utterances: float
    mean_seconds: float
    micro_batches: int
    largest: MicroBatch  # of the longest utterances, as far as the context reaches
    average: MicroBatch

    @classmethod
    def of(cls, durations: Floats, parts: Sequence[Part], config: TrainConfig, sizes: Sizes) -> "Data":
        """As the flags cut up `parts`; raises UserError for no utterances at all."""
        if not len(durations):
            raise UserError("--train_data: found no utterance, expected one at least to plan a run: check the data")
        micro_batches = EpochPlan(durations, Cut(config.micro_bsz, config.batch_seconds), parts).steps
        weights = np.repeat([float(part.weight) for part in parts], [part.size for part in parts])
        known = ~np.isnan(durations)
        mean = float(np.average(durations[known], weights=weights[known])) if known.any() else _UNKNOWN_SECONDS
        tokens = (sizes.positions(MicroBatch(1, 100.0, 0)) - 1) / 100 + _TOKENS_PER_SECOND
        longest = min((config.ctx_len - 1) / tokens, float(durations.max()) if known.all() else np.inf)
        fit = max(1, int(config.batch_seconds // longest)) if config.batch_seconds else config.micro_bsz
        some = max(1, round(weights.sum() / micro_batches))
        largest, average = (MicroBatch(n, s, round(s * _TOKENS_PER_SECOND)) for n, s in ((fit, longest), (some, mean)))
        return cls(durations, float(weights.sum()), mean, micro_batches, largest, average)

    def steps(self, config: TrainConfig) -> int:
        """Optimizer steps of an epoch."""
        steps = -(-self.micro_batches // (ranks_of(config) * config.accumulate))
        return min(steps, config.epoch_steps or steps)


def report(config: TrainConfig, sizes: Sizes, data: Data, measured: float | None, notes: Sequence[str]) -> str:
    """All tables, for a terminal; `measured` is the seconds of one optimizer step, where one was measured.

    `config` leaves devices and number types to no machine.
    """
    named = [f"note: {note}" for note in notes]
    tables = (named, _parameters(config, sizes), _memory(config, sizes, data.largest), _epochs(config, data, measured),
              _paper(config, sizes, data), _growth(config, data))  # fmt: skip
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in tables).lstrip()


def _parameters(config: TrainConfig, sizes: Sizes) -> Iterator[str]:
    yield "Parameters"
    yield f"  {'part':<14}  {'parameters':>14}  type  {'GiB':>6}"
    for name, part, kind, what in (
        ("language model", "lm", sizes.quant or config.precision, "frozen"),
        ("encoder", "encoder", sizes.frames.quant or config.encoder_precision, "frozen"),
        ("adapter", "adapter", "fp32", "trained"),
        ("initial state", "initial_states", "fp32", "trained"),
        ("tuned of it", "tuned", "fp32", "trained"),
    ):
        count = sizes.parameters[part]
        frozen = {"lm": (sizes.lm_bytes, config.precision), "encoder": (sizes.encoder_bytes, config.encoder_precision)}
        if part in frozen:
            bytes_of, floats = frozen[part]
            size = bytes_of(torch.bfloat16 if floats == "bf16" else torch.float32)
        else:
            size = 4 * count
        if count:
            yield f"  {name:<14}  {count:>14,}  {kind}  {size / GIB:>6.2f}  {what}"


def _memory(config: TrainConfig, sizes: Sizes, batch: MicroBatch) -> Iterator[str]:
    step, published = Step(sizes, batch, config), Sizes(BASE_MODELS["1.6B"])
    yield f"Memory of each GPU at its worst moment ({ranks_of(config)} x {config.strategy}, grad_cp {config.grad_cp})"
    yield (
        f"  for {batch.utterances} utterances of {batch.seconds:.1f} s with {batch.text_tokens} tokens of text, "
        "the longest of the data"
    )
    yield f"  {'part':<39}  {'GiB':>6}  while     what"
    for name, size, phase, note in (
        *step.parts,
        ("tensors at the worst moment", step.tensors, "", "all held, and the larger of the two"),
        ("needed", step.needed, "", "with the CUDA context and 10 % lost between tensors"),
    ):
        yield f"  {name:<39}  {size / GIB:>6.2f}  {phase:<8}  {note}"
    fits = cost.largest_micro_bsz(sizes, batch, config, _H200)
    small = [cost.largest_micro_bsz(published, batch, replace(config, grad_cp=cp), _SMALL_GPU) for cp in (0, 1)]
    yield (
        f"  of such utterances, {fits} fit a H200 of {_H200 / GIB:.0f} GiB; with the 1.6B model, {small[0]} "
        f"fit a GPU of 24 GB, {small[1]} with --grad_cp 1"
    )


def _epochs(config: TrainConfig, data: Data, measured: float | None) -> Iterator[str]:
    ranks, steps, seconds = ranks_of(config), data.steps(config), data.utterances * data.mean_seconds
    slots, unknown = ranks * config.accumulate, int(np.isnan(data.durations).sum())
    guessed = f" ({unknown:,} of unknown duration, taken as the mean)" if unknown else ""
    yield "Data and steps"
    audio = f"{seconds / 3600:,.1f} h of audio in {data.utterances:,.0f} utterances"
    yield f"  {audio}{guessed}, {data.mean_seconds:.1f} s on average"
    yield (
        f"  {data.micro_batches:,} micro batches, {slots} in an optimizer step; {steps:,} steps an epoch, "
        f"{steps * config.epoch_count:,} in all"
    )
    if measured is None:
        yield f"  a step was not measured: that takes the model, the data and {ranks} GPU(s)"
    else:
        epoch, of_real_time = (
            steps * measured,
            min(1.0, steps * slots / data.micro_batches) * seconds / steps / measured,
        )
        times = f"{duration(epoch)} an epoch, {duration(epoch * config.epoch_count)} in all"
        yield f"  measured {measured:.3f} s a step: {times}, {of_real_time:,.0f} times real time"


def _paper(config: TrainConfig, sizes: Sizes, data: Data) -> Iterator[str]:
    kind = "bfloat16" if config.precision == "bf16" else "float32"
    yield f"On paper, an epoch with these flags in {kind}; the longer of computing and launching counts"
    yield f"  {cost.ASSUMED}"
    heads = ("GPUs", "steps an epoch", "encoder ms", "LM ms", "launches ms", "all-reduce MB", "ms", "idle %",
             "s a step", "an epoch", "GPU hours")  # fmt: skip
    yield "  " + "  ".join(f"{head:>4}" for head in heads)
    for ranks in sorted({*_RANKS, ranks_of(config)}):
        config = replace(config, device=str(ranks), num_nodes=1)
        step, idle, steps = (
            Step(sizes, data.average, config),
            cost.idle_share(data.durations, config),
            data.steps(config),
        )
        seconds = step.seconds / (1 - idle)
        cells = (
            str(ranks), f"{steps:,}", *(f"{1e3 * x:.1f}" for x in (step.encoder, step.lm, step.launches)),
            f"{step.sent / 1e6:,.0f}", f"{1e3 * step.all_reduce:.1f}", f"{100 * idle:.1f}", f"{seconds:.3f}",
            duration(steps * seconds), f"{ranks * steps * seconds / 3600:,.1f}",
        )  # fmt: skip
        yield "  " + "  ".join(cell.rjust(max(4, len(head))) for cell, head in zip(cells, heads, strict=True))


def _growth(config: TrainConfig, data: Data) -> Iterator[str]:
    config = replace(config, device=str(_GROWTH_RANKS), num_nodes=1, precision="bf16")
    audio = _GROWTH_RANKS * config.accumulate * data.average.utterances * data.average.seconds
    yield f"On paper, an epoch of so many hours of audio on {_GROWTH_RANKS} GPUs in bfloat16, with WavLM-Large"
    yield "  base model  GiB a GPU" + "".join(f"{f'{hours:,} h':>11}" for hours in _HOURS)
    for name, lm in BASE_MODELS.items():
        seconds, needed = Step(Sizes(lm), data.average, config).seconds, Step(Sizes(lm), data.largest, config).needed
        times = (duration(hours * 3600 / audio * seconds) for hours in _HOURS)
        yield f"  {name:>10}  {needed / GIB:>9.1f}" + "".join(f"{time:>11}" for time in times)


def duration(seconds: float) -> str:
    """Seconds as a person says them: "4.5 s", "12 min", "3.4 h", "56 days"."""
    unit, size = next((unit, size) for unit, size, below in _UNITS if seconds < below)
    return f"{seconds / size:.{1 if seconds / size < 9.95 else 0}f} {unit}"
