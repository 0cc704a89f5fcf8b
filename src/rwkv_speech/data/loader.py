"""From samples to what one optimizer step takes: the micro batches of one rank."""

# B batch · S samples

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.batch import BadSample, Batch, Sample
from rwkv_speech.data.epoch import Cut, EpochPlan, Floats
from rwkv_speech.data.source import Part
from rwkv_speech.errors import UserError

_SECONDS_TO_END = 10


class Position(Protocol):
    """Where in the data a loader is; Lightning calls `set_epoch` on a loader's `.sampler`."""

    steps: int  # of every epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are given next, from its start unless it was chosen already."""
        ...

    def set_state(self, epoch: int, step: int) -> None:
        """Continue an epoch behind its first `step` optimizer steps."""
        ...


class StepLoader:
    """One rank's share of an epoch: each item is the micro batches that one optimizer step accumulates.

    The length is that of a whole epoch, wherever this one starts.
    """

    batch_sampler = None  # Lightning looks for one, then takes `sampler`
    _iterator: Iterator[Batch] | None = None  # whose worker processes Lightning ends

    def __init__(self, batches: Iterable[Batch], sampler: Position, accumulate: int) -> None:
        self._batches, self.sampler, self._accumulate = batches, sampler, accumulate

    def __len__(self) -> int:
        return self.sampler.steps

    def __iter__(self) -> Iterator[list[Batch]]:
        with _no_interrupts():
            self._iterator = iter(self._batches)
        while step := [batch for _, batch in zip(range(self._accumulate), self._iterator, strict=False)]:
            yield step

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are given next, from its start unless it was chosen already."""
        self.sampler.set_epoch(epoch)

    def set_state(self, epoch: int, step: int) -> None:
        """Continue an epoch behind its first `step` optimizer steps."""
        self.sampler.set_state(epoch, step)


class SpeechData(Protocol):
    """What can be trained on or validated with."""

    def __len__(self) -> int:
        """The number of utterances, 0 where it is not known."""
        ...

    def fingerprint(self) -> str:
        """What tells the data from other data, wherever it lies."""
        ...

    def loader(self, cut: Cut, steps: int | None = None, workers: int = 0, pin_memory: bool = False) -> StepLoader:
        """One rank's batches; an epoch has `steps` optimizer steps, by default all that the data makes."""
        ...


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C goes to all processes of a terminal; those started meanwhile never see it, and end with their parent."""
    resource_tracker.ensure_running()  # started later it would undo the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """One rank's share of an EpochPlan, each utterance as (epoch, index), for persistent workers to know the epoch.

    Micro batch `a` of a step is the step's slot a * world_size + rank. So the same `cut.slots` micro batches make each
    optimizer step however they are dealt: one rank that accumulates four sees what two ranks see that accumulate two.
    Over all ranks every utterance comes exactly once per epoch (or as often as its part's weight says), shuffled or
    not; all ranks have equally many micro batches, some of them empty if there are fewer utterances than slots.

    `durations` (N,) seconds, NaN where unknown; `parts` as in EpochPlan; an epoch ends after `steps` optimizer steps if
    given. Raises UserError for fewer utterances than ranks, and for fewer steps than `steps`.
    """

    def __init__(
        self, durations: Floats, cut: Cut, parts: Sequence[Part] | None = None, steps: int | None = None
    ) -> None:
        if len(durations) < cut.world_size:
            raise UserError(
                f"data: {len(durations)} utterances cannot be shared among {cut.world_size} processes; expected "
                "one each at least: give more data or fewer devices"
            )
        self._plan, self._cut = EpochPlan(durations, cut, parts), cut
        if steps and steps > self._plan.steps:
            size = cut.micro_batch if cut.batch_seconds is None else f"{cut.batch_seconds:g} s"
            raise UserError(
                f"--epoch_steps: given {steps}, but {len(durations)} utterances in batches of {size} on "
                f"{cut.world_size} device(s) make {self._plan.steps}; leave it empty, or give at most that"
            )
        self.steps = steps or self._plan.steps
        self._epoch = self._first_step = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are given next, from its start unless it was chosen already."""
        if epoch != self._epoch:
            self.set_state(epoch, 0)

    def set_state(self, epoch: int, step: int) -> None:
        """Continue an epoch behind its first `step` optimizer steps; nothing of them is read."""
        if not 0 <= step <= self.steps:
            raise ValueError(f"step {step} of {self.steps}")
        self._epoch, self._first_step = epoch, step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        planned, epoch = self._plan.epoch(self._epoch), self._epoch
        for step in range(self._first_step, self.steps):
            for slot in range(self._cut.rank, self._cut.slots, self._cut.world_size):
                yield [(epoch, index) for index in planned.batch(step, slot)]

    def __len__(self) -> int:
        return self.steps * self._cut.accumulate


def _end_late(_: int) -> None:
    """SIGTERM may go to all processes of a run, whose main one needs batches until the end of its step."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_TO_END))


def in_processes(workers: int) -> dict[str, Any]:
    """A DataLoader's options for so many worker processes: spawned, as threads (OpenMP, CUDA) do not survive a fork."""
    if not workers:
        return {}
    return {
        "num_workers": workers,
        "persistent_workers": True,
        "multiprocessing_context": "spawn",
        "worker_init_fn": _end_late,
        "prefetch_factor": 4,
    }


def collate(samples: Sequence[Sample | BadSample]) -> Batch:
    """Pad the usable samples into a Batch, conversations turn by turn, and pass the others on in `bad`."""
    good = [turn for sample in samples if isinstance(sample, Sample) for turn in (sample, *sample.then)]
    kept = next((sample.frames for sample in good if sample.frames is not None), None)
    frames = [] if kept is None else [kept[:0] if sample.frames is None else sample.frames for sample in good]
    read, turns = [sample.input_ids for sample in good], [sample.turn for sample in good]
    taught = [sample.teacher_ids for sample in good]
    return Batch(
        indices=[sample.index for sample in good],
        ids=[sample.id for sample in good],
        tasks=[sample.task for sample in good],
        langs=[sample.lang for sample in good],
        source_langs=[sample.source_lang for sample in good],
        source_texts=[sample.source_text for sample in good],
        answers=[sample.answers for sample in good],
        prompt_ids=[sample.prompt_ids for sample in good],
        waveforms=_padded([sample.waveform for sample in good]) if good else torch.empty(0, 0),
        num_samples=torch.tensor([round(sample.duration * SAMPLE_RATE) for sample in good], dtype=torch.int64),
        text_ids=torch.tensor([token for sample in good for token in sample.ids], dtype=torch.int64),
        text_lengths=torch.tensor([len(sample.ids) for sample in good], dtype=torch.int64),
        texts=[sample.text for sample in good],
        bad=[sample for sample in samples if isinstance(sample, BadSample)],
        normalised=all(sample.normalised for sample in good),
        frames=_padded(frames) if frames else None,
        frame_lengths=torch.tensor([len(rows) for rows in frames], dtype=torch.int64) if frames else None,
        input_ids=read if any(ids is not None for ids in read) else None,
        turns=turns if any(turns) else None,
        teacher_ids=taught if any(taught) else None,
    )


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """B of (S, ...) -> (B, S_max, ...), zero after each one's own S."""
    first = tensors[0]
    padded = first.new_empty(len(tensors), max(map(len, tensors)), *first.shape[1:])
    for row, tensor in zip(padded, tensors, strict=True):
        row[: len(tensor)] = tensor
        row[len(tensor) :] = 0
    return padded
