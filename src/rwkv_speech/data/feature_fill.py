"""Computes what a feature cache lacks."""

# B batch · S samples · F frames · D encoder width

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rwkv_speech.batch import BadSample, Batch, Sample
from rwkv_speech.data.dataset import SpeechDataset, collate
from rwkv_speech.data.epoch import Floats
from rwkv_speech.data.feature_cache import FeatureCache, content_key, identity_of
from rwkv_speech.data.samplers import BatchSampler

# Decoded to tell the size of a cache where no duration is known.
_PROBES = 20

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _Names(NamedTuple):
    """What a cache knows an utterance by: its source, if that can tell, and its content."""

    identity: str | None
    key: str


class _Listen(Dataset[tuple[_Names, Sample | BadSample]]):
    """Some utterances of a data set with their names, which are made in the worker."""

    def __init__(self, dataset: SpeechDataset, indices: Sequence[int]) -> None:
        self._dataset, self._indices = dataset, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> tuple[_Names, Sample | BadSample]:
        index = self._indices[position]
        sample = self._dataset[index]
        key = content_key(sample.waveform) if isinstance(sample, Sample) else ""
        return _Names(identity_of(self._dataset.source, index), key), sample


def fill(
    cache: FeatureCache,
    dataset: SpeechDataset,
    encode: Encode,
    width: int,
    micro_batch: int,
    batch_seconds: float | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> int:
    """Encode this rank's share of the utterances whose frames are not kept yet; returns how many were.

    `dataset` gives plain waveforms: not normalised, augmented or cached. `encode` takes waveforms (B, S) and
    num_samples (B,) and gives frames (B, F, D), D = `width`, and F of each, on any device. A killed run loses the last,
    unfinished shard only. What is broken or too long is left out. Raises UserError before it starts if the disk is too
    small.
    """
    cache.clear_unfinished()
    lacking = [
        index
        for index in range(rank, len(dataset), world_size)
        if cache.key_of(identity_of(dataset.source, index)) is None
    ]
    if not lacking:
        return 0
    durations = dataset.durations()[lacking]
    size = cache.estimate(np.tile(_filled(durations, dataset, lacking), world_size), width)
    if rank == 0:
        print(f"feature cache: {size / 1e9:.2f} GB for about {len(lacking) * world_size} utterances in {cache.folder}")
    num_encoded = 0
    for names, batch in _batches(_Listen(dataset, lacking), durations, micro_batch, batch_seconds, workers):
        new = [i for i, (_, key) in enumerate(names) if key not in cache]
        if new:
            frames, lengths = encode(batch.waveforms[new], batch.num_samples[new])
            for row, i in enumerate(new):
                cache.put(names[i].key, frames[row, : lengths[row]], int(batch.num_samples[i]))
        for identity, key in names:
            if identity is not None:
                cache.remember(identity, key)
        num_encoded += len(new)
    cache.flush()
    return num_encoded


def _batches(
    listen: _Listen, durations: Floats, micro_batch: int, batch_seconds: float | None, workers: int
) -> Iterator[tuple[list[_Names], Batch]]:
    """Utterances of like length, longest first, and their padded waveforms."""
    loader: DataLoader[Any] = DataLoader(
        listen,
        batch_sampler=BatchSampler(durations, micro_batch, batch_seconds, shuffle=False),
        collate_fn=_together,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    yield from loader


def _together(heard: Sequence[tuple[_Names, Sample | BadSample]]) -> tuple[list[_Names], Batch]:
    """The names of the usable ones, and their batch."""
    return [names for names, sample in heard if isinstance(sample, Sample)], collate([sample for _, sample in heard])


def _filled(durations: Floats, dataset: SpeechDataset, indices: Sequence[int]) -> Floats:
    """The durations; where none is known, that of some utterances, decoded, for all of them."""
    if not np.isnan(durations).all():
        return durations
    probes = (dataset[index] for index in indices[:: -(-len(indices) // _PROBES)])
    seconds = [sample.duration for sample in probes if isinstance(sample, Sample)]
    return np.full(len(durations), np.mean(seconds) if seconds else 0.0, np.float32)
