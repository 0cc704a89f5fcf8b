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
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.huggingface import HuggingFaceSource
from rwkv_speech.data.loader import BatchSampler, StepLoader, collate, in_processes
from rwkv_speech.data.source import Columns
from rwkv_speech.errors import UserError

PREFIX = "hf-stream:"
_FORM = "hf-stream:NAME:SPLIT or hf-stream:NAME:CONFIG:SPLIT; NAME may be a folder of Parquet files"


@dataclass(frozen=True)
class Stream:
    """Rows as they arrive, the columns to take from them, and the specification that names them."""

    rows: datasets.IterableDataset
    columns: Columns
    spec: str


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

    def __init__(self, data: "StreamedData", cut: Cut, steps: int) -> None:
        self._data, self._cut, self.steps = data, cut, steps
        rows = data.stream.rows.shuffle(seed=cut.seed, buffer_size=data.buffer, max_buffer_input_shards=data.files)
        self._rows = split_dataset_by_node(rows, cut.rank, cut.world_size)
        # Shared with persistent workers, which keep their copy of all else: epoch, and the first batch to give.
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are given next, from its start unless it was chosen already."""
        if epoch != int(self._position[0]):
            self.set_state(epoch, 0)

    def set_state(self, epoch: int, step: int) -> None:
        """Continue an epoch behind its first `step` optimizer steps."""
        self._position.copy_(torch.tensor([epoch, step * self._cut.accumulate]))
        # Here and not in the workers, which share this number: it is changed by a difference, two of which add up.
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self._position.tolist()
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        planned = self._planned(epoch, worker)
        for number in range(worker, self.steps * self._cut.accumulate, workers):
            samples = next(planned, iter(()))
            if number >= first:  # what was used before is read again, but not decoded
                yield collate(list(samples))

    def _planned(self, epoch: int, worker: int) -> Iterator[Iterator[Sample | BadSample]]:
        """Each batch of this worker, its rows not decoded before they are taken."""
        data, cut, rows = self._data, self._cut, iter(self._rows)
        for number in itertools.count():
            window = list(itertools.islice(rows, data.window))
            if not window:
                return
            name = f"{cut.seed}/{epoch}/{cut.rank}/{worker}/{number}"
            label = f"{data.stream.spec}, epoch {epoch}, rank {cut.rank}, worker {worker}, window {number}"
            source = _source(window, data.stream.columns, label)
            dataset = data.build(source, augment=data.augment.with_seed(name) if data.augment else None)
            for keys in BatchSampler(dataset.durations(), Cut(cut.micro_batch, cut.batch_seconds, _number(name))):
                yield (_sample(dataset, window, epoch, index) for _, index in keys)


def _sample(dataset: SpeechDataset, window: list[dict[str, Any]], epoch: int, index: int) -> Sample | BadSample:
    """One row of a window; a bad one is known by a number made of its content, which is the same in every epoch."""
    sample = dataset[epoch, index]
    return sample if isinstance(sample, Sample) else replace(sample, index=_number(repr(window[index])))


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class StreamedData:
    """A stream and what its rows are made into: training data in place of a SpeechDataset.

    `build` makes a data set of a source and `augment`, as functools.partial(SpeechDataset, tokenizer=...) does.
    `buffer` and `window` are numbers of rows, which each worker keeps in memory; `files` are read side by side.
    """

    stream: Stream
    build: Callable[..., SpeechDataset]
    augment: Augmenter | None = None
    buffer: int = 1_000
    window: int = 512
    files: int = 10

    def __len__(self) -> int:
        """0: not known."""
        return 0

    def fingerprint(self) -> str:
        """What can be known of it beforehand: its configuration and split, the number of its files, its first row."""
        first = _source(list(self.stream.rows.take(1)), self.stream.columns, "").fingerprint()
        _, *names = self.stream.spec.removeprefix(PREFIX).split(":")
        return f"{self.stream.rows.num_shards} files of {':'.join(names)}, {first[:16]}"

    def loader(self, cut: Cut, steps: int | None = None, workers: int = 0, pin_memory: bool = False) -> StepLoader:
        """One rank's batches, `steps` x `accumulate` of them in every epoch; raises UserError without `steps`.

        Every row comes once per epoch at most, over all ranks; exactly once if the steps suffice, and then the last
        batches are empty. A resumed epoch gives what an unbroken one gives, with the same numbers of ranks and workers.
        """
        if steps is None:
            raise UserError(
                f"--epoch_steps: found nothing, but the length of {self.stream.spec} is not known beforehand; expected "
                "the number of steps that make an epoch"
            )
        rows = _Batches(self, cut, steps)
        files = self.stream.rows.num_shards
        # A worker without a file of its own would give empty batches only.
        workers = min(workers, files // cut.world_size if files % cut.world_size == 0 else files)
        batches = DataLoader(rows, batch_size=None, pin_memory=pin_memory, **in_processes(workers))
        return StepLoader(batches, rows, cut.accumulate)
