"""Which utterances in which order: pure functions of (seed, epoch), the same on every rank."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from rwkv_speech.errors import UserError


class EpochSampler(Sampler[int]):
    """Every index once per epoch: in order, or shuffled by a generator seeded with (seed, epoch) only."""

    def __init__(self, num_items: int, seed: int, shuffle: bool) -> None:
        self.num_items, self.seed, self.shuffle = num_items, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.num_items))
        order: list[int] = torch.randperm(self.num_items, generator=self.generator("items")).tolist()
        return iter(order)

    def __len__(self) -> int:
        return self.num_items

    def generator(self, purpose: str) -> torch.Generator:
        """Seed a generator for one use of this epoch."""
        # torch's CPU generator keeps only 32 bits of its seed, so the parts are hashed together rather than
        # shifted.
        digest = hashlib.sha256(f"{self.seed}/{self.epoch}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


class DurationBatchSampler(Sampler[list[int]]):
    """Batches of up to `micro_batch` indices of like duration, for one rank of `world_size`.

    Shuffling: the epoch's order is cut into pools of `pool` batches per rank, each pool is sorted by
    duration and cut into batches, and the batches of the epoch are shuffled. Without shuffling the batches
    follow the source's order. Consecutive batches of all ranks come from the same stretch, so that ranks
    have alike much to do.

    All ranks have the same number of batches, and of items in each. One rank sees every item exactly once.
    With several, a remainder of fewer than `world_size` items is left out of a shuffled epoch (other ones
    every epoch, so ranks stay disjoint), and filled up with the first items again without shuffling (so
    nothing is left out).

    `durations` are seconds; None (as a whole, or for some items, which then count as 0) where they are not
    known. Lightning calls `set_epoch` on `.sampler` by itself. Raises UserError for fewer items than ranks.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        durations: Sequence[float | None] | None,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        pool: int = 50,
    ) -> None:
        if durations is not None and len(durations) != len(sampler):
            raise ValueError(f"{len(durations)} durations for {len(sampler)} items")
        if micro_batch < 1 or pool < 1 or not 0 <= rank < world_size:
            raise ValueError(f"micro_batch {micro_batch}, pool {pool}, rank {rank} of {world_size}")
        if len(sampler) < world_size:
            raise UserError(
                f"data: {len(sampler)} utterances cannot be shared among {world_size} processes; expected "
                "one each at least: give more data or fewer devices"
            )
        self.sampler = sampler
        self._durations = durations
        self._micro_batch, self._rank, self._world_size, self._pool = micro_batch, rank, world_size, pool

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are given next."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        # Each group holds the batches of all ranks at one step; taking every n-th item shares a sorted
        # group evenly.
        for group in self._groups():
            yield group[self._rank :: self._world_size]

    def __len__(self) -> int:
        return -(-self._num_shared() // (self._micro_batch * self._world_size))

    def _num_shared(self) -> int:
        """Count the items of an epoch over all ranks, a multiple of the number of ranks."""
        remainder = len(self.sampler) % self._world_size
        if remainder == 0:
            return len(self.sampler)
        return len(self.sampler) - remainder + (0 if self.sampler.shuffle else self._world_size)

    def _groups(self) -> list[list[int]]:
        order = list(self.sampler)
        shared = self._num_shared()
        order = (order + order)[:shared]
        size = self._micro_batch * self._world_size
        if not self.sampler.shuffle:
            return [order[i : i + size] for i in range(0, shared, size)]
        groups: list[list[int]] = []
        for start in range(0, shared, size * self._pool):
            pooled = order[start : start + size * self._pool]
            pooled.sort(key=self._duration)
            groups += [pooled[i : i + size] for i in range(0, len(pooled), size)]
        shuffled = torch.randperm(len(groups), generator=self.sampler.generator("batches")).tolist()
        return [groups[i] for i in shuffled]

    def _duration(self, index: int) -> float:
        return (self._durations[index] or 0.0) if self._durations is not None else 0.0
