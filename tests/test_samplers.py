import random

import pytest

from rwkv_speech.data.samplers import DurationBatchSampler, EpochSampler
from rwkv_speech.errors import UserError


def batches(
    num_items: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    epoch: int = 0,
    seed: int = 1,
    shuffle: bool = True,
    durations: list[float | None] | None = None,
    pool: int = 3,
) -> list[list[int]]:
    sampler = DurationBatchSampler(
        EpochSampler(num_items, seed, shuffle), durations, micro_batch, rank, world_size, pool
    )
    sampler.sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def test_epoch_sampler_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(100, seed, shuffle=True)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(seed, epoch) for seed in (0, 1, 2**32, 2**40) for epoch in range(4)]
    assert all(sorted(found) == list(range(100)) for found in orders)
    assert len({tuple(found) for found in orders}) == len(orders)
    assert order(1, 2) == order(1, 2)


def test_epoch_sampler_without_shuffling_keeps_the_order():
    sampler = EpochSampler(5, 0, shuffle=False)
    sampler.set_epoch(3)
    assert list(sampler) == [0, 1, 2, 3, 4] and len(sampler) == 5


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_items", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("micro_batch", [1, 3, 40])
def test_one_process_sees_every_item_once(num_items: int, micro_batch: int, shuffle: bool):
    found = batches(num_items, micro_batch, shuffle=shuffle)
    assert sorted(i for batch in found for i in batch) == list(range(num_items))
    assert all(1 <= len(batch) <= micro_batch for batch in found)


@pytest.mark.parametrize("num_items", [4, 5, 7, 24, 25, 31, 97])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_a_shuffled_epoch_disjointly(num_items: int, world_size: int):
    shards = [batches(num_items, 3, rank, world_size) for rank in range(world_size)]
    assert len({tuple(map(len, shard)) for shard in shards}) == 1  # the same sizes at the same step
    seen = [i for shard in shards for batch in shard for i in batch]
    assert len(seen) == len(set(seen)) == num_items - num_items % world_size


@pytest.mark.parametrize("num_items", [4, 5, 7, 25, 31])
def test_ranks_leave_nothing_out_without_shuffling(num_items: int):
    shards = [batches(num_items, 3, rank, 4, shuffle=False) for rank in range(4)]
    assert len({tuple(map(len, shard)) for shard in shards}) == 1
    seen = [i for shard in shards for batch in shard for i in batch]
    assert set(seen) == set(range(num_items)) and len(seen) - num_items < 4


def test_items_left_out_differ_between_epochs():
    def left_out(epoch: int) -> set[int]:
        seen = {i for rank in range(4) for batch in batches(27, 3, rank, 4, epoch=epoch) for i in batch}
        return set(range(27)) - seen

    assert len(set.union(*(left_out(epoch) for epoch in range(6)))) > 3


def test_without_shuffling_batches_follow_the_source():
    durations: list[float | None] = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert batches(5, 2, shuffle=False, durations=durations) == [[0, 1], [2, 3], [4]]


def test_batches_are_a_pure_function_of_seed_and_epoch():
    rng = random.Random(0)
    durations: list[float | None] = [rng.uniform(1, 20) for _ in range(60)]
    first = batches(60, 4, durations=durations, epoch=2)
    assert batches(60, 4, durations=durations, epoch=2) == first
    assert batches(60, 4, durations=durations, epoch=3) != first
    assert batches(60, 4, durations=durations, epoch=2, seed=2) != first


def padding(found: list[list[int]], durations: list[float]) -> float:
    total = sum(max(durations[i] for i in batch) * len(batch) for batch in found)
    return 1 - sum(durations) / total


def test_sorting_by_duration_cuts_padding_but_keeps_batches_mixed():
    rng = random.Random(0)
    known = [rng.uniform(1, 20) for _ in range(2_000)]
    sorted_batches = batches(2_000, 8, durations=list(known), pool=50)
    assert padding(batches(2_000, 8, pool=50), known) > 0.3
    assert padding(sorted_batches, known) < 0.05
    # Short and long batches alternate: the first tenth of the epoch is as long as all of it.
    firsts = [known[i] for batch in sorted_batches[:25] for i in batch]
    assert abs(sum(firsts) / len(firsts) - sum(known) / len(known)) < 3


def test_ranks_get_alike_durations_at_each_step():
    rng = random.Random(0)
    known: list[float | None] = [rng.uniform(1, 20) for _ in range(1_600)]
    shards = [batches(1_600, 4, rank, 4, durations=known, pool=50) for rank in range(4)]
    longest = [[max(known[i] or 0 for i in batch) for batch in shard] for shard in shards]
    assert all(max(step) - min(step) < 2 for step in zip(*longest, strict=True))


def test_unknown_durations_count_as_zero():
    durations: list[float | None] = [None if i % 2 else 5.0 for i in range(12)]
    found = batches(12, 3, durations=durations, pool=4)
    assert sorted(i for batch in found for i in batch) == list(range(12))
    assert all(len({i % 2 for i in batch}) == 1 for batch in found)


def test_sampler_rejects_what_cannot_be_shared():
    with pytest.raises(UserError, match="3 utterances cannot be shared among 4 processes"):
        DurationBatchSampler(EpochSampler(3, 0, True), None, 1, 0, 4)
    with pytest.raises(ValueError, match="2 durations for 3 items"):
        DurationBatchSampler(EpochSampler(3, 0, True), [1.0, 2.0], 1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        DurationBatchSampler(EpochSampler(3, 0, True), None, 1, 2, 2)
