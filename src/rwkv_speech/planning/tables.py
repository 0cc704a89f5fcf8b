"""What a run will cost, before it starts: parameters, memory of each GPU, data, time. `train.py --plan 1` prints it."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rwkv_speech.data.epoch import Cut, EpochPlan, Floats
from rwkv_speech.data.source import Part
from rwkv_speech.errors import UserError
from rwkv_speech.planning.compute import H200, Gpu, all_reduce_bytes, idle_share, step_time
from rwkv_speech.planning.memory import GIB, Memory, largest_micro_bsz, memory
from rwkv_speech.planning.sizes import BASE_MODELS, WAVLM_LARGE, MicroBatch, ModelSizes, Setup

# Read speech of LibriSpeech's pace in World tokens.
TEXT_TOKENS_PER_SECOND = 4.0
# Taken where no duration is known.
_UNKNOWN_SECONDS = 12.0
_RANKS = (1, 8, 64)
_HOURS = (100, 1_000, 10_000, 100_000)
_GROWTH_RANKS = 8
_UNITS = (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 86400))
_WARM_UP = 2
_FEWEST_MEASURED = 3
# What a GPU sold with 24 GB has.
_SMALL_GPU = 23.5 * GIB
_PUBLISHED = {name: ModelSizes(sizes, WAVLM_LARGE) for name, sizes in BASE_MODELS.items()}


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

    def largest(self, model: ModelSizes) -> MicroBatch:
        """The micro batch that needs most memory: the longest utterances, as far as the context reaches."""
        bound = (self.ctx_len - 1) / (model.audio_tokens(100.0) / 100 + TEXT_TOKENS_PER_SECOND)
        longest = bound if self.unknown() else min(bound, float(self.durations.max()))
        return _micro_batch(
            max(1, int(self.batch_seconds // longest)) if self.batch_seconds else self.micro_bsz, longest
        )

    def average(self) -> MicroBatch:
        """The micro batch that takes the average time."""
        return _micro_batch(max(1, round(self.utterances / self.micro_batches)), self.mean_seconds)


def _micro_batch(utterances: int, seconds: float) -> MicroBatch:
    return MicroBatch(utterances, seconds, round(seconds * TEXT_TOKENS_PER_SECOND))


def measure(step: Callable[[], None], seconds: float) -> float:
    """The median time of `step` in seconds, called for about so many seconds after two calls that do not count.

    On a GPU, `step` must wait for the device. Three calls are counted at least.
    """
    for _ in range(_WARM_UP):
        step()
    times: list[float] = []
    while sum(times) < seconds or len(times) < _FEWEST_MEASURED:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclass(frozen=True)
class RunPlan:
    """A run on paper. `measured` is the seconds of one optimizer step, where one was measured."""

    model: ModelSizes
    setup: Setup
    data: DataPlan
    gpu: Gpu = H200
    measured: float | None = None

    def report(self) -> str:
        """All tables, for a terminal."""
        sections = (self._parameters(), self._memory(), self._epochs(), self._paper(), self._growth())
        return "\n\n".join("\n".join(section) for section in sections)

    def _parameters(self) -> list[str]:
        kinds = {True: ("bf16", 2), False: ("fp32", 4)}
        rows = [
            ("language model", self.model.lm_parameters(), *kinds[self.setup.bf16], "frozen"),
            ("encoder", self.model.encoder.parameters, *kinds[self.setup.encoder_bf16], "frozen"),
            ("adapter", self.model.adapter_parameters(), "fp32", 4, "trained"),
            ("initial state", self.model.state_parameters(), "fp32", 4, "trained"),
        ]
        head = ("part", "parameters", "type", "GiB", "")
        body = [(name, f"{n:,}", kind, f"{n * width / GIB:.2f}", what) for name, n, kind, width, what in rows]
        return ["Parameters", *table(head, body)]

    def _memory(self) -> list[str]:
        batch, setup, gpu = self.data.largest(self.model), self.setup, self.gpu
        fits = largest_micro_bsz(self.model, batch, setup, gpu.memory)
        small = [
            largest_micro_bsz(_PUBLISHED["1.6B"], batch, replace(setup, grad_cp=cp), _SMALL_GPU) for cp in (False, True)
        ]
        return [
            f"Memory of each GPU at its worst moment ({setup.ranks} x {setup.strategy}, grad_cp {int(setup.grad_cp)})",
            f"  for {batch.utterances} utterances of {batch.seconds:.1f} s with {batch.text_tokens} tokens of text, "
            "the longest of the data",
            *_memory_table(memory(self.model, batch, setup)),
            f"  of such utterances, {fits} fit a {gpu.name} of {gpu.memory / GIB:.0f} GiB; with the 1.6B model, "
            f"{small[0]} fit a GPU of 24 GB, {small[1]} with --grad_cp 1",
        ]

    def _epochs(self) -> list[str]:
        data, setup = self.data, self.setup
        steps, slots = data.steps(setup), setup.ranks * setup.accumulate
        unknown = f" ({data.unknown():,} of unknown duration, taken as the mean)" if data.unknown() else ""
        lines = [
            "Data and steps",
            f"  {data.hours:,.1f} h of audio in {data.utterances:,.0f} utterances{unknown}, "
            f"{data.mean_seconds:.1f} s on average",
            f"  {data.micro_batches:,} micro batches, {slots} in an optimizer step; {steps:,} steps an epoch, "
            f"{steps * data.epochs:,} in all",
        ]
        if self.measured is not None:
            epoch = steps * self.measured
            heard = min(1.0, steps * slots / data.micro_batches) * data.hours * 3600
            lines.append(
                f"  measured {self.measured:.3f} s a step: {duration(epoch)} an epoch, "
                f"{duration(epoch * data.epochs)} in all, {heard / epoch:,.0f} times real time"
            )
        else:
            lines.append(f"  not measured: this machine does not have {setup.ranks} GPU(s)")
        return lines

    def _paper(self) -> list[str]:
        head = ("GPUs", "steps an epoch", "encoder ms", "LM ms", "launches ms", "all-reduce MB", "ms", "idle %",
                "s a step", "an epoch", "GPU hours")  # fmt: skip
        rows = [self._paper_row(replace(self.setup, ranks=ranks)) for ranks in sorted({*_RANKS, self.setup.ranks})]
        kind = "bfloat16" if self.setup.bf16 else "float32"
        title = f"On paper, an epoch with these flags in {kind}; the longer of computing and launching counts"
        return [title, f"  {self.gpu.assumptions()}", *table(head, rows)]

    def _paper_row(self, setup: Setup) -> tuple[str, ...]:
        data = self.data
        step = step_time(self.model, data.average(), setup, self.gpu)
        idle = idle_share(data.durations, data.micro_bsz, data.batch_seconds, setup)
        steps, seconds = data.steps(setup), step.total / (1 - idle)
        return (
            str(setup.ranks),
            f"{steps:,}",
            f"{1e3 * step.encoder:.1f}",
            f"{1e3 * step.lm:.1f}",
            f"{1e3 * step.launches:.1f}",
            f"{all_reduce_bytes(self.model, setup) / 1e6:,.0f}",
            f"{1e3 * step.all_reduce:.1f}",
            f"{100 * idle:.1f}",
            f"{seconds:.3f}",
            duration(steps * seconds),
            f"{setup.ranks * steps * seconds / 3600:,.1f}",
        )

    def _growth(self) -> list[str]:
        """Time of an epoch on 8 GPUs, by base model and hours of audio; memory of the largest micro batch."""
        setup = replace(self.setup, ranks=_GROWTH_RANKS, bf16=True)
        batch, largest = self.data.average(), self.data.largest(self.model)
        audio = setup.ranks * setup.accumulate * batch.utterances * batch.seconds
        rows = []
        for name, model in _PUBLISHED.items():
            seconds = step_time(model, batch, setup, self.gpu).total
            times = (duration(hours * 3600 / audio * seconds) for hours in _HOURS)
            rows.append((name, f"{memory(model, largest, setup).needed / GIB:.1f}", *times))
        title = f"On paper, an epoch of so many hours of audio on {_GROWTH_RANKS} GPUs in bfloat16, with WavLM-Large"
        return [title, *table(("base model", "GiB a GPU", *(f"{hours:,} h" for hours in _HOURS)), rows)]


def _memory_table(found: Memory) -> list[str]:
    phases = (("", found.held), ("encoding", found.encoding), ("learning", found.learning))
    rows = [(part.name, f"{part.bytes / GIB:.2f}", when, part.note) for when, parts in phases for part in parts]
    rows.append(
        ("tensors at the worst moment", f"{found.tensors / GIB:.2f}", "", "all held, and the larger of the two")
    )
    rows.append(("needed", f"{found.needed / GIB:.2f}", "", "with the CUDA context and 10 % lost between tensors"))
    return table(("part", "GiB", "while", "what"), rows)


def duration(seconds: float) -> str:
    """Seconds as a person says them: "4.5 s", "12 min", "3.4 h", "56 days"."""
    unit, size = next(((unit, size) for unit, size, below in _UNITS if seconds < below), ("days", 86400))
    value = seconds / size
    return f"{value:.{1 if value < 9.95 else 0}f} {unit}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines: a column of numbers to the right, any other to the left."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    lines = []
    for row in (head, *rows):
        cells = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines
