"""What a run will cost, before it starts: parameters, memory of each GPU, data, time. `train.py --plan 1` prints it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rwkv_speech.planning.memory import GIB, Memory, Setup, largest_micro_bsz, memory
from rwkv_speech.planning.sizes import BASE_MODELS, WAVLM_LARGE, Sizes
from rwkv_speech.planning.time import H200, DataPlan, Gpu, all_reduce_bytes, idle_share, step_time

_RANKS = (1, 8, 64)
_HOURS = (100, 1_000, 10_000, 100_000)
_GROWTH_RANKS = 8
_UNITS = (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 86400))
# What a GPU sold with 24 GB has.
_SMALL_GPU = 23.5 * GIB


@dataclass(frozen=True)
class RunPlan:
    """A run on paper.

    `measured` is the seconds of one optimizer step, where one was measured; `notes` say what was assumed.
    """

    sizes: Sizes
    setup: Setup
    data: DataPlan
    gpu: Gpu = H200
    measured: float | None = None
    notes: tuple[str, ...] = ()

    def report(self) -> str:
        """All tables, for a terminal."""
        notes = [[f"note: {note}" for note in self.notes]] if self.notes else []
        sections = (*notes, self._parameters(), self._memory(), self._epochs(), self._paper(), self._growth())
        return "\n\n".join("\n".join(section) for section in sections)

    def _parameters(self) -> list[str]:
        count = self.sizes.parameters
        kinds = {True: ("bf16", 2), False: ("fp32", 4)}
        rows = [
            ("language model", count["lm"], *kinds[self.setup.bf16], "frozen"),
            ("encoder", count["encoder"], *kinds[self.setup.encoder_bf16], "frozen"),
            ("adapter", count["adapter"], "fp32", 4, "trained"),
            ("initial state", count["initial_states"], "fp32", 4, "trained"),
        ]
        head = ("part", "parameters", "type", "GiB", "")
        body = [(name, f"{n:,}", kind, f"{n * width / GIB:.2f}", what) for name, n, kind, width, what in rows]
        return ["Parameters", *table(head, body)]

    def _memory(self) -> list[str]:
        batch, setup, gpu = self.data.largest(self.sizes), self.setup, self.gpu
        fits = largest_micro_bsz(self.sizes, batch, setup, gpu.memory)
        published = Sizes(BASE_MODELS["1.6B"], WAVLM_LARGE)
        small = [largest_micro_bsz(published, batch, replace(setup, grad_cp=cp), _SMALL_GPU) for cp in (False, True)]
        return [
            f"Memory of each GPU at its worst moment ({setup.ranks} x {setup.strategy}, grad_cp {int(setup.grad_cp)})",
            f"  for {batch.utterances} utterances of {batch.seconds:.1f} s with {batch.text_tokens} tokens of text, "
            "the longest of the data",
            *_memory_table(memory(self.sizes, batch, setup)),
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
            lines.append(f"  a step was not measured: that takes the model, the data and {setup.ranks} GPU(s)")
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
        step = step_time(self.sizes, data.average(), setup, self.gpu)
        idle = idle_share(data.durations, data.micro_bsz, data.batch_seconds, setup)
        steps, seconds = data.steps(setup), step.total / (1 - idle)
        return (
            str(setup.ranks),
            f"{steps:,}",
            f"{1e3 * step.encoder:.1f}",
            f"{1e3 * step.lm:.1f}",
            f"{1e3 * step.launches:.1f}",
            f"{all_reduce_bytes(self.sizes, setup) / 1e6:,.0f}",
            f"{1e3 * step.all_reduce:.1f}",
            f"{100 * idle:.1f}",
            f"{seconds:.3f}",
            duration(steps * seconds),
            f"{setup.ranks * steps * seconds / 3600:,.1f}",
        )

    def _growth(self) -> list[str]:
        """Time of an epoch on 8 GPUs, by base model and hours of audio; memory of the largest micro batch."""
        setup = replace(self.setup, ranks=_GROWTH_RANKS, bf16=True)
        batch, largest = self.data.average(), self.data.largest(self.sizes)
        audio = setup.ranks * setup.accumulate * batch.utterances * batch.seconds
        rows = []
        for name, lm in BASE_MODELS.items():
            sizes = Sizes(lm, WAVLM_LARGE)
            seconds = step_time(sizes, batch, setup, self.gpu).total
            times = (duration(hours * 3600 / audio * seconds) for hours in _HOURS)
            rows.append((name, f"{memory(sizes, largest, setup).needed / GIB:.1f}", *times))
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
