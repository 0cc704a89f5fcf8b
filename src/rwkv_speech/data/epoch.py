"""Which utterances make which micro batch of an epoch: the same on every rank.

N utterances · M micro batches · K optimizer steps · slots: the micro batches of one step, ranks x accumulation
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, repeat, takewhile

import numpy as np
from numpy.typing import NDArray

from rwkv_speech.data.source import Part
from rwkv_speech.errors import UserError

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

# Utterances within 2 % of each other's length are interchangeable: that costs 1 % of padding, and mixes the batches
# again in every epoch. Multiplied one by one, because numpy's logarithm may differ between processors.
_WIDTH = 1.02
_EDGES = np.array(
    list(takewhile(lambda edge: edge < 1e9, accumulate(repeat(_WIDTH), lambda a, b: a * b, initial=0.1))), np.float32
)
_UNKNOWN = len(_EDGES) + 1


@dataclass(frozen=True)
class Cut:
    """How data is cut into micro batches, and which of them are one rank's.

    A micro batch holds at most `micro_batch` utterances; or, with `batch_seconds`, as many as fit when each is padded
    to the longest of them, and at least one. An optimizer step takes `slots` of them: `accumulate` from each of
    `world_size` ranks. `seed` chooses the order of a shuffle. Raises UserError for limits that cannot be used.
    """

    micro_batch: int
    batch_seconds: float | None = None
    seed: int = 0
    shuffle: bool = True
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise UserError(f"--micro_bsz: found {self.micro_batch}, expected 1 utterance or more")
        if self.batch_seconds is not None and not 0 < self.batch_seconds < float("inf"):
            raise UserError(f"--batch_seconds: found {self.batch_seconds}, expected a number of seconds above 0")
        if self.accumulate < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}, accumulate {self.accumulate}")

    @property
    def slots(self) -> int:
        """Micro batches of an optimizer step, over all ranks."""
        return self.world_size * self.accumulate


@dataclass(frozen=True)
class Epoch:
    """One epoch: micro batch m holds the utterances order[bounds[m] : bounds[m + 1]].

    order  (N,) utterances
    bounds (M + 1,)
    costs  (M,) padded seconds of every micro batch; an utterance of unknown duration counts 1 s
    steps  (K, slots) the micro batches of every optimizer step, the costliest first
    """

    order: Ints
    bounds: Longs
    costs: Floats
    steps: Longs

    def batch(self, step: int, slot: int) -> list[int]:
        """The utterances of one micro batch; none where the step has fewer utterances than slots."""
        m = self.steps[step, slot]
        found: list[int] = self.order[self.bounds[m] : self.bounds[m + 1]].tolist()
        return found


@dataclass(frozen=True)
class _Ring:
    """The utterances of one part and one bucket; every epoch takes the next stretch, `weight` times around."""

    items: Ints
    weight: Fraction

    def stretch(self, epoch: int) -> Ints:
        """What epoch number `epoch` takes: with weight 1/2 two epochs take every utterance once."""
        start, end = (int(self.weight * len(self.items) * number) for number in (epoch, epoch + 1))
        return self.items.take(np.arange(start, end), mode="wrap")

    def most(self) -> int:
        """The most utterances that any epoch takes."""
        return math.ceil(self.weight * len(self.items))


class EpochPlan:
    """Cuts every epoch into `steps` optimizer steps of `cut.slots` micro batches of like cost.

    `durations` (N,) float32 in seconds, NaN where unknown. `parts` say how often each run of utterances is taken per
    epoch; by default all are, once.

    Utterances are sorted into buckets of like length, shuffled within them by (seed, epoch), and cut into batches; the
    batches are sorted by cost, which is their padded seconds, and every `slots` neighbours make a step. Then the steps
    are shuffled. Without `shuffle` the costliest come first, in the source's order where lengths are alike or unknown.
    Some batches are halved to fill the last step; a slot stays empty only where none is left to halve.

    `steps` is the same for every epoch. Raises UserError for `batch_seconds` where a duration is unknown.
    """

    def __init__(self, durations: Floats, cut: Cut, parts: Sequence[Part] | None = None) -> None:
        self._durations, self.cut = durations.astype(np.float32, copy=False), cut
        unknown = int(np.isnan(self._durations).sum())
        if unknown and cut.batch_seconds is not None:
            raise UserError(
                f"--batch_seconds: {unknown} of {len(durations)} utterances have no known duration, expected one "
                "for each: add 'duration' to the manifest or dataset, or leave --batch_seconds out"
            )
        self._buckets = self._sort_into_buckets([Part(len(durations))] if parts is None else parts)
        self._longest = [max(float(self._durations[ring.items].max()) for ring in rings) for rings in self._buckets]
        # The most that any epoch can hold: cutting fewer utterances never makes more batches.
        most = self._sizes([sum(ring.most() for ring in rings) for rings in self._buckets])
        self.steps = -(-len(most) // cut.slots)

    def epoch(self, number: int) -> Epoch:
        """Plan one epoch, counted from 0."""
        rng = self._generator(f"epoch {number}")
        buckets = [np.concatenate([ring.stretch(number) for ring in rings]) for rings in self._buckets]
        if self.cut.shuffle:
            for bucket in buckets:
                rng.shuffle(bucket)
        sizes = _halve_until(self._sizes([len(bucket) for bucket in buckets]), self.steps * self.cut.slots)
        order = np.concatenate(buckets)
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        # Stable, like every sort here: equal costs must not fall differently on another rank's processor.
        costs = self._costs(order, sizes, bounds)
        steps = np.argsort(-costs, kind="stable").reshape(self.steps, self.cut.slots)
        return Epoch(order, bounds, costs, rng.permutation(steps) if self.cut.shuffle else steps)

    def _sort_into_buckets(self, parts: Sequence[Part]) -> list[list[_Ring]]:
        """The utterances, longest bucket first, each bucket part by part."""
        if sum(part.size for part in parts) != len(self._durations):
            raise ValueError(f"{len(self._durations)} durations for parts of {[part.size for part in parts]}")
        bucket_of = (len(_EDGES) - np.searchsorted(_EDGES, self._durations)).astype(np.uint16)
        bucket_of[np.isnan(self._durations)] = _UNKNOWN
        rng = self._generator("rings")
        buckets = defaultdict[int, list[_Ring]](list)
        start = 0
        for part in parts:
            items = np.arange(start, start + part.size, dtype=np.int32)
            start += part.size
            if self.cut.shuffle:
                rng.shuffle(items)
            items = items[np.argsort(bucket_of[items], kind="stable")]
            for ring in np.split(items, np.flatnonzero(np.diff(bucket_of[items])) + 1):
                if len(ring):
                    buckets[int(bucket_of[ring[0]])].append(_Ring(ring, part.weight))
        return [buckets[bucket] for bucket in sorted(buckets)]

    def _sizes(self, counts: Sequence[int]) -> Longs:
        """The sizes of the batches when each bucket holds so many utterances."""
        if self.cut.batch_seconds is None:
            return _pieces(sum(counts), self.cut.micro_batch)
        sizes: list[Longs] = []
        room = 0  # of the last batch, which a longer bucket began
        for count, seconds in zip(counts, self._longest, strict=True):
            taken = min(room, count)
            if taken:
                sizes[-1][-1] += taken
                room -= taken
            if taken < count:
                capacity = max(1, int(self.cut.batch_seconds // seconds))
                sizes.append(_pieces(count - taken, capacity))
                room = capacity - int(sizes[-1][-1])
        return np.concatenate([np.zeros(0, np.int64), *sizes])

    def _costs(self, order: Ints, sizes: Longs, bounds: Longs) -> Floats:
        """Padded seconds of every batch, or its size where durations are unknown; 0 for an empty one."""
        seconds = self._durations[order]
        seconds[np.isnan(seconds)] = 1.0
        longest = np.zeros(len(sizes), np.float32)
        filled = np.flatnonzero(sizes)
        longest[filled] = np.maximum.reduceat(seconds, bounds[filled])
        return longest * sizes.astype(np.float32)

    def _generator(self, purpose: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.cut.seed}/{purpose}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest))


def _pieces(total: int, size: int) -> Longs:
    """`total` in pieces of `size`, the last of which may be smaller."""
    pieces = np.full(-(-total // size), size, np.int64)
    pieces[-1:] -= len(pieces) * size - total
    return pieces


def _halve_until(sizes: Longs, wanted: int) -> Longs:
    """Halve the largest batches until there are `wanted`; when none can be halved any more, add empty ones."""
    while len(sizes) < wanted and sizes.max(initial=0) > 1:
        largest = np.argsort(-sizes, kind="stable")[: wanted - len(sizes)]
        largest = np.sort(largest[sizes[largest] > 1])
        halves = sizes[largest] // 2
        sizes[largest] -= halves
        sizes = np.insert(sizes, largest + 1, halves)
    return np.pad(sizes, (0, wanted - len(sizes)))
