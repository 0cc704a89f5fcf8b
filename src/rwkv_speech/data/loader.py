"""From a source of utterances to batches: what training and evaluation iterate over."""

from typing import Any

from torch.utils.data import DataLoader

from rwkv_speech.data.dataset import Batch, SpeechDataset, collate
from rwkv_speech.data.samplers import DurationBatchSampler, EpochSampler


def make_loader(
    dataset: SpeechDataset,
    micro_batch: int,
    *,
    shuffle: bool,
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Batches of `micro_batch` utterances for one rank; the order of a shuffle depends on seed and epoch only."""
    sampler = EpochSampler(len(dataset), seed, shuffle)
    batches = DurationBatchSampler(sampler, dataset.durations(), micro_batch, rank, world_size)
    # Spawned, not forked: the parent's threads (OpenMP, CUDA) do not survive a fork.
    in_processes: dict[str, Any] = (
        {"persistent_workers": True, "multiprocessing_context": "spawn", "prefetch_factor": 4} if workers else {}
    )
    # torch types a loader by its samples, though it gives what `collate_fn` makes of them.
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, pin_memory=pin_memory, num_workers=workers, **in_processes
    )
    return loader
