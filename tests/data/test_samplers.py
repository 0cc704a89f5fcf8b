import itertools

import numpy as np
import pytest

from rwkv_speech.data.epoch import Floats
from rwkv_speech.data.samplers import BatchSampler
from rwkv_speech.errors import UserError

LIMITS: list[tuple[int, float | None]] = [(1, None), (4, None), (4, 30.0)]


def seconds(count: int) -> Floats:
    return np.random.default_rng(0).uniform(1, 20, count).astype(np.float32)


def batches(sampler: BatchSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_share_an_epoch_disjointly(limit: tuple[int, float | None], world_size: int, shuffle: bool):
    for count, accumulate in ((64, 1), (97, 2), (301, 1)):
        shards = [
            batches(
                BatchSampler(
                    seconds(count), *limit, shuffle=shuffle, rank=rank, world_size=world_size, accumulate=accumulate
                )
            )
            for rank in range(world_size)
        ]
        assert len({len(shard) for shard in shards}) == 1 and len(shards[0]) % accumulate == 0
        assert sorted(i for shard in shards for batch in shard for i in batch) == list(range(count))


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_steps_are_the_same_however_they_are_dealt(limit: tuple[int, float | None]):
    def steps(world_size: int, accumulate: int) -> list[list[list[int]]]:
        """For every step its micro batches."""
        shards = [
            batches(BatchSampler(seconds(203), *limit, rank=rank, world_size=world_size, accumulate=accumulate), 5)
            for rank in range(world_size)
        ]
        number = len(shards[0]) // accumulate
        return [
            sorted(itertools.chain(*(shard[step * accumulate : (step + 1) * accumulate] for shard in shards)))
            for step in range(number)
        ]

    alone = steps(1, 4)
    assert len(alone) > 3 and steps(2, 2) == alone and steps(4, 1) == alone
    # Slot a * world_size + rank.
    dealt = batches(BatchSampler(seconds(203), *limit, rank=1, world_size=2, accumulate=2), 5)
    whole = batches(BatchSampler(seconds(203), *limit, accumulate=4), 5)
    assert dealt == whole[1::2]


def test_set_state_continues_where_a_run_stopped():
    whole = batches(BatchSampler(seconds(100), 3, rank=1, world_size=2, accumulate=2), 4)
    resumed = BatchSampler(seconds(100), 3, rank=1, world_size=2, accumulate=2)
    resumed.set_state(4, step=3)
    resumed.sampler.set_epoch(4)  # as Lightning does when it continues
    assert list(resumed) == whole[6:] and len(resumed) == len(whole)
    resumed.sampler.set_epoch(5)
    assert len(list(resumed)) == len(whole)
    resumed.set_state(4, step=resumed.steps_per_epoch)
    assert list(resumed) == []
    with pytest.raises(ValueError, match=f"step {resumed.steps_per_epoch + 1} of"):
        resumed.set_state(4, resumed.steps_per_epoch + 1)


def test_every_epoch_has_its_own_batches_and_the_same_length():
    sampler = BatchSampler(seconds(100), 4, 40.0)
    found = [batches(sampler, epoch) for epoch in range(4)]
    assert len({str(epoch) for epoch in found}) == 4
    assert len({len(epoch) for epoch in found}) == 1 and sampler.steps_per_epoch == len(sampler)
    assert all(type(i) is int for batch in found[0] for i in batch)


def test_sampler_rejects_what_cannot_be_shared():
    with pytest.raises(UserError, match="3 utterances cannot be shared among 4 processes"):
        BatchSampler(seconds(3), 1, world_size=4)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        BatchSampler(seconds(3), 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="accumulate 0"):
        BatchSampler(seconds(3), 1, accumulate=0)
