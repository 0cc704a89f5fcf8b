"""Training data that no disk holds: rows of a Hugging Face dataset as they arrive, made into batches.

Rows come through a shuffle buffer into windows, and a window is planned like a small epoch. The files are shared out
over ranks and workers, or rows where there are fewer files than ranks; so the order depends on the numbers of both.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rwkv_speech.batch import BadSample, Batch, Sample
from rwkv_speech.data.augment import Augmenter
from rwkv_speech.data.dataset import SpeechDataset, collate
from rwkv_speech.data.huggingface import Columns, HuggingFaceSource
from rwkv_speech.data.samplers import BatchSampler
from rwkv_speech.errors import UserError

PREFIX = "hf-stream:"
_FORM = "hf-stream:NAME:SPLIT or hf-stream:NAME:CONFIG:SPLIT; NAME may be a folder of Parquet files"


@dataclass(frozen=True)
class Stream:
    """Rows as they arrive, the columns to take from them, and the specification that names them."""

    rows: datasets.IterableDataset
    columns: Columns
    spec: str


@dataclass(frozen=True)
class StreamPlan:
    """How rows are shuffled and cut into batches.

    `buffer` and `window` are numbers of rows, which each worker keeps in memory; `files` are read side by side.
    """

    micro_batch: int
    batch_seconds: float | None = None
    seed: int = 0
    buffer: int = 1_000
    window: int = 512
    files: int = 10


def open_stream(spec: str, columns: Columns) -> Stream:
    """Open `hf-stream:NAME:SPLIT` or `hf-stream:NAME:CONFIG:SPLIT`; raises UserError."""
    parts = spec.removeprefix(PREFIX).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"data source {spec!r}: {len(parts)} parts after {PREFIX!r}; expected {_FORM}")
    config = parts[1] if len(parts) == 3 else None
    try:
        # Not decoded: that is SpeechDataset's work.
        rows = datasets.load_dataset(parts[0], config, split=parts[-1], streaming=True).decode(False)
        first = list(rows.take(1))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"data source {spec!r}: cannot be streamed ({type(error).__name__}: {error}); expected {_FORM}, and for a "
            "name a connection to the hub"
        ) from error
    _source(first, columns, spec)  # wrong columns and an empty stream fail here
    return Stream(rows, columns, spec)


def _source(rows: list[dict[str, Any]], columns: Columns, label: str) -> HuggingFaceSource:
    return HuggingFaceSource(datasets.Dataset.from_list(rows), columns, label=label)


class _Batches(IterableDataset[Batch]):
    """The batches of one rank; worker w of W gives numbers w, w + W ..., empty ones when its rows are used up."""

    def __init__(
        self,
        stream: Stream,
        build: Callable[..., SpeechDataset],
        plan: StreamPlan,
        augment: Augmenter | None,
        num_batches: int,
        rank: int,
        world_size: int,
    ) -> None:
        shuffled = stream.rows.shuffle(seed=plan.seed, buffer_size=plan.buffer, max_buffer_input_shards=plan.files)
        self._rows = split_dataset_by_node(shuffled, rank, world_size)
        self._stream, self._build, self._plan, self._augment = stream, build, plan, augment
        self._num_batches, self._rank = num_batches, rank
        # Shared with persistent workers, which keep their copy of all else: epoch, and the first batch to give.
        self.position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.position.tolist()
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        planned = self._planned(epoch, worker)
        for number in range(worker, self._num_batches, workers):
            samples = next(planned, iter(()))
            if number >= first:  # what was used before is read again, but not decoded
                yield collate(list(samples))

    def _planned(self, epoch: int, worker: int) -> Iterator[Iterator[Sample | BadSample]]:
        """Each batch of this worker, its rows not decoded before they are taken."""
        self._rows.set_epoch(epoch)
        rows = iter(self._rows)
        for number in itertools.count():
            window = list(itertools.islice(rows, self._plan.window))
            if not window:
                return
            name = f"{self._plan.seed}/{epoch}/{self._rank}/{worker}/{number}"
            label = f"{self._stream.spec}, epoch {epoch}, rank {self._rank}, worker {worker}, window {number}"
            source = _source(window, self._stream.columns, label)
            dataset = self._build(source, augment=self._augment.with_seed(name) if self._augment else None)
            plan = BatchSampler(
                dataset.durations(), self._plan.micro_batch, self._plan.batch_seconds, seed=_number(name)
            )
            for indices in plan:
                yield (_sample(dataset, window, epoch, index) for index in indices)


def _sample(dataset: SpeechDataset, window: list[dict[str, Any]], epoch: int, index: int) -> Sample | BadSample:
    """One row of a window; a bad one is known by a number made of its content, which is the same in every epoch."""
    sample = dataset[epoch, index]
    return sample if isinstance(sample, Sample) else replace(sample, index=_number(repr(window[index])))


@dataclass(frozen=True)
class StreamedData:
    """A stream and what its rows are made into: the training data in place of a SpeechDataset."""

    stream: Stream
    build: Callable[..., SpeechDataset]
    augment: Augmenter | None = None

    def loader(self, plan: StreamPlan, steps: int | None, **layout: Any) -> "StreamLoader":
        """Batches for one rank; `layout` as in StreamLoader."""
        return StreamLoader(self.stream, self.build, plan, steps, augment=self.augment, **layout)


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


class StreamLoader:
    """`steps` x `accumulate` batches for one rank in every epoch, as many on every other.

    Every row comes once per epoch at most, over all ranks; exactly once if the steps suffice, and then the last batches
    are empty. `build` makes a data set of a source and `augment`, as functools.partial(SpeechDataset, tokenizer=...)
    does. A resumed epoch gives what an unbroken one gives, with the same numbers of ranks and workers: what was heard
    is read again, but not decoded. Raises UserError if `steps` is None.
    """

    def __init__(
        self,
        stream: Stream,
        build: Callable[..., SpeechDataset],
        plan: StreamPlan,
        steps: int | None,
        *,
        augment: Augmenter | None = None,
        accumulate: int = 1,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if steps is None:
            raise UserError(
                f"--epoch_steps: found nothing, but the length of {stream.spec} is not known beforehand; expected the "
                "number of steps that make an epoch"
            )
        self._accumulate, self._length = accumulate, steps * accumulate
        self._batches = _Batches(stream, build, plan, augment, self._length, rank, world_size)
        files = stream.rows.num_shards
        # A worker without a file of its own would give empty batches only.
        workers = min(workers, files // world_size if files % world_size == 0 else files)
        in_processes: dict[str, Any] = (
            {"persistent_workers": True, "multiprocessing_context": "spawn", "prefetch_factor": 4} if workers else {}
        )
        self._loader: DataLoader[Batch] = DataLoader(
            self._batches, batch_size=None, num_workers=workers, pin_memory=pin_memory, **in_processes
        )

    @property
    def sampler(self) -> "StreamLoader":
        """Itself: `set_epoch` is what Lightning calls, on a loader's `.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are given next, from its start unless it was chosen already."""
        if epoch != int(self._batches.position[0]):
            self.set_state(epoch, 0)

    def set_state(self, epoch: int, step: int) -> None:
        """Continue an epoch behind its first `step` optimizer steps."""
        self._batches.position.copy_(torch.tensor([epoch, step * self._accumulate]))

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)

    def __len__(self) -> int:
        return self._length
