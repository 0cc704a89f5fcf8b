"""Computes what a feature cache lacks."""

# B batch · S samples · F frames · D encoder width

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from rwkv_speech.batch import Sample
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut, Floats
from rwkv_speech.data.feature_cache import FeatureCache, recording_key
from rwkv_speech.data.loader import BatchSampler, collate, in_processes

# Decoded to tell the size of a cache where no duration is known.
_PROBES = 20

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def fill(
    cache: FeatureCache,
    dataset: SpeechDataset,
    encode: Encode,
    numbers_per_second: float,
    cut: Cut,
    workers: int = 0,
) -> int:
    """Encode this rank's share of the utterances whose frames are not kept yet; returns how many were.

    `dataset` gives plain waveforms: not normalised, augmented or cached. `encode` takes waveforms (B, S) and
    num_samples (B,) and gives frames (B, F, D) and F of each, on any device, with about so many `numbers_per_second`
    of audio. A killed run loses the last, unfinished shard only. What is broken or too long is left out. Raises
    UserError before it starts if the disk is too small.
    """
    cache.clear_unfinished()
    keys: dict[int, str] = {}
    for index in range(cut.rank, len(dataset), cut.world_size):
        key = recording_key(dataset.source, index)  # without one it is broken, or cannot be cached
        if key is not None and key not in cache:
            keys[index] = key
    if not keys:
        return 0
    lacking = list(keys)
    durations = dataset.durations()[lacking]
    count = len(lacking) * cut.world_size
    size = cache.estimate(np.tile(_filled(durations, dataset, lacking), cut.world_size), numbers_per_second)
    if cut.rank == 0:
        print(f"feature cache: {size / 1e9:.2f} GB for about {count} utterances in {cache.folder}")
    num_encoded = 0
    # Of like length, longest first.
    sampler = BatchSampler(durations, Cut(cut.micro_batch, cut.batch_seconds, shuffle=False))
    batches = ([(0, lacking[i]) for _, i in batch] for batch in sampler)
    loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **in_processes(workers))
    for batch in loader:
        # Several utterances may be of one recording.
        new = list({keys[index]: i for i, index in enumerate(batch.indices) if keys[index] not in cache}.values())
        if new:
            frames, lengths = encode(batch.waveforms[new], batch.num_samples[new])
        for row, i in enumerate(new):
            cache.put(keys[batch.indices[i]], frames[row, : lengths[row]], int(batch.num_samples[i]))
        num_encoded += len(new)
    cache.flush()
    return num_encoded


def _filled(durations: Floats, dataset: SpeechDataset, indices: Sequence[int]) -> Floats:
    """The durations; where none is known, that of some utterances, decoded, for all of them."""
    if not np.isnan(durations).all():
        return durations
    probes = (dataset[index] for index in indices[:: -(-len(indices) // _PROBES)])
    seconds = [sample.duration for sample in probes if isinstance(sample, Sample)]
    return np.full(len(durations), np.mean(seconds) if seconds else 0.0, np.float32)
