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
    keys: dict[int, list[str | None]] = {}  # of each turn of what lacks any
    for index in range(cut.rank, len(dataset), cut.world_size):
        # Without a key a recording is broken, or cannot be cached; text has none.
        found = [recording_key(turn) for turn in dataset.source.utterance(index).turns]
        if any(key is not None and key not in cache for key in found):
            keys[index] = found
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
        of_row = [keys[sample.index][max(0, sample.turn - 1)] for sample in batch.samples()]
        new = {key: i for i, key in enumerate(of_row) if key is not None and key not in cache}
        if new:
            rows = list(new.values())
            frames, lengths = encode(batch.waveforms[rows], batch.num_samples[rows])
        for row, (key, i) in enumerate(new.items()):
            cache.put(key, frames[row, : lengths[row]], int(batch.num_samples[i]))
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
