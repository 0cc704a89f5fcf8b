"""From a source of utterances to batches: what training and evaluation iterate over."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from rwkv_speech.batch import Batch
from rwkv_speech.data.dataset import SpeechDataset, collate
from rwkv_speech.data.samplers import BatchSampler


class WithEpoch(Sampler[list[tuple[int, int]]]):
    """Batches of indices as batches of (epoch, index), so that the epoch reaches persistent workers."""

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler  # where Lightning sets the epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.sampler.epoch
        for batch in self.sampler:
            yield [(epoch, index) for index in batch]

    def __len__(self) -> int:
        return len(self.sampler)


def make_loader(
    dataset: SpeechDataset,
    micro_batch: int,
    batch_seconds: float | None = None,
    *,
    shuffle: bool,
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Batches for one rank, as BatchSampler makes them; the order of a shuffle depends on seed and epoch only.

    `workers` processes decode, augment, normalise and tokenise; without any, the caller's process does. The sampler is
    `loader.batch_sampler.sampler`.
    """
    sampler = BatchSampler(
        dataset.durations(),
        micro_batch,
        batch_seconds,
        parts=dataset.parts(),
        shuffle=shuffle,
        seed=seed,
        rank=rank,
        world_size=world_size,
        accumulate=accumulate,
    )
    # Spawned, not forked: the parent's threads (OpenMP, CUDA) do not survive a fork.
    in_processes: dict[str, Any] = (
        {"persistent_workers": True, "multiprocessing_context": "spawn", "prefetch_factor": 4} if workers else {}
    )
    # torch types a loader by its samples, though it gives what `collate_fn` makes of them.
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=WithEpoch(sampler),
        collate_fn=collate,
        pin_memory=pin_memory,
        num_workers=workers,
        **in_processes,
    )
    return loader
