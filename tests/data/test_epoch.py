import itertools
from fractions import Fraction

import numpy as np
import pytest

from rwkv_speech.data.epoch import Cut, Epoch, EpochPlan, Floats
from rwkv_speech.data.source import Part
from rwkv_speech.errors import UserError

LIMITS: list[dict[str, float]] = [{"micro_batch": 1}, {"micro_batch": 3}, {"batch_seconds": 50.0}]


def speech(count: int, seed: int = 0) -> Floats:
    """Durations (s) such as LibriSpeech's: most about 14 s, from 1.5 to 35."""
    rng = np.random.default_rng(seed)
    kind = rng.random(count)
    seconds = np.where(kind < 0.65, rng.normal(14.3, 1.3, count), rng.uniform(1.5, 15, count))
    seconds[kind > 0.995] = rng.uniform(17, 35, int((kind > 0.995).sum()))
    return seconds.clip(1.5, 35).astype(np.float32)


def plan_of(durations: Floats, micro_batch: float = 4, batch_seconds: float | None = None, **more) -> EpochPlan:
    parts, slots = more.pop("parts", None), more.pop("slots", 1)
    return EpochPlan(durations, Cut(int(micro_batch), batch_seconds, world_size=slots, **more), parts)


def batches_of(epoch: Epoch) -> list[list[int]]:
    steps, slots = epoch.steps.shape
    return [epoch.batch(step, slot) for step in range(steps) for slot in range(slots)]


def padded(durations: Floats, batch: list[int]) -> float:
    return len(batch) * float(durations[batch].max()) if batch else 0.0


def idle(durations: Floats, epoch: Epoch, ranks: int, overhead: float = 0.0) -> float:
    """Share of the ranks' time that is spent waiting for the slowest of them, step by step."""
    costs = np.array([overhead + padded(durations, batch) for batch in batches_of(epoch)])
    times = costs.reshape(len(epoch.steps), -1, ranks).sum(axis=1)
    return float(1 - times.mean(axis=1).sum() / times.max(axis=1).sum())


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("slots", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_utterance_comes_exactly_once(limit: dict[str, float], slots: int, shuffle: bool):
    for count in (1, 2, 7, 24, 63, 64, 65, 191, 193, 500):
        durations = speech(count)
        plan = plan_of(durations, **limit, slots=slots, shuffle=shuffle)
        for number in (0, 1):
            epoch = plan.epoch(number)
            batches = batches_of(epoch)
            assert epoch.steps.shape == (plan.steps, slots) and len(batches) == plan.steps * slots
            assert sorted(itertools.chain(*batches)) == list(range(count))
            # No slot is empty that an utterance could have filled.
            assert sum(not batch for batch in batches) == max(0, len(batches) - count)


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_keep_their_limit(shuffle: bool):
    durations = speech(3_000)
    for micro_batch in (1, 5, 16):
        found = batches_of(plan_of(durations, micro_batch, slots=8, shuffle=shuffle).epoch(3))
        assert max(map(len, found)) == micro_batch
    for seconds in (10.0, 40.0, 300.0):
        found = batches_of(plan_of(durations, batch_seconds=seconds, slots=8, shuffle=shuffle).epoch(3))
        assert all(padded(durations, batch) <= seconds or len(batch) == 1 for batch in found)
        assert any(padded(durations, batch) > seconds for batch in found) == (seconds < durations.max())
        # Batches are as full as the next utterance allows, but for the few that were halved for the last step.
        short = [batch for batch in found if padded(durations, batch) + 1.05 * durations[batch].max() <= seconds]
        assert len(short) <= 2 * 8 + 1


def test_one_utterance_of_any_length_is_a_batch():
    durations = np.array([0.001, 0.05, 3.0, 5_000.0, 9e8], np.float32)
    plan = plan_of(durations, batch_seconds=6.0, shuffle=False)
    assert batches_of(plan.epoch(0)) == [[4], [3], [2, 0], [1]]


@pytest.mark.parametrize("limit", [{"micro_batch": 4}, {"micro_batch": 16}, {"batch_seconds": 120.0}], ids=str)
def test_sixty_four_ranks_wait_little_and_pad_little(limit: dict[str, float]):
    durations = speech(60_000)
    epoch = plan_of(durations, **limit, slots=64).epoch(0)
    total = sum(padded(durations, batch) for batch in batches_of(epoch))
    assert 1 - durations.sum(dtype=float) / total < 0.012
    assert idle(durations, epoch, ranks=64) < 0.015
    assert idle(durations, epoch, ranks=64, overhead=20.0) < 0.015


def test_accumulation_deals_alike_to_all_ranks():
    durations = speech(20_000)
    epoch = plan_of(durations, 4, slots=32).epoch(0)
    assert idle(durations, epoch, ranks=8) < 0.003


def test_plan_depends_on_seed_and_epoch_only():
    durations = speech(400)

    def found(seed: int, number: int) -> list[list[int]]:
        return batches_of(plan_of(durations, 4, slots=3, seed=seed).epoch(number))

    plans = [found(seed, number) for seed in (-1, 0, 1, 2**64) for number in range(3)]
    assert len({str(plan) for plan in plans}) == len(plans)
    plan = plan_of(durations, 4, slots=3)
    plan.epoch(7)  # leaves no trace
    assert batches_of(plan.epoch(2)) == found(0, 2)


def test_epochs_mix_their_batches_differently():
    durations = speech(5_000)
    plan = plan_of(durations, 4)

    def neighbours(number: int) -> set[tuple[int, int]]:
        pairs = (itertools.combinations(sorted(batch), 2) for batch in batches_of(plan.epoch(number)))
        return set(itertools.chain(*pairs))

    first, second = neighbours(0), neighbours(1)
    assert len(first & second) < 0.1 * len(first)


def test_steps_come_in_no_order_of_length():
    durations = speech(20_000)
    longest = [max(durations[batch]) for batch in batches_of(plan_of(durations, 4).epoch(0))]
    tenth = len(longest) // 10
    assert abs(np.mean(longest[:tenth]) - np.mean(longest)) < 0.7


def test_unknown_durations_are_cut_by_count():
    unknown = np.full(1_000, np.nan, np.float32)
    plan = plan_of(unknown, 4, slots=5)
    batches = batches_of(plan.epoch(0))
    assert sorted(itertools.chain(*batches)) == list(range(1_000)) and {len(batch) for batch in batches} == {4}
    assert batches != batches_of(plan.epoch(1))
    # Shuffled all over, not among neighbours.
    assert np.mean([max(batch) - min(batch) for batch in batches]) > 300
    some = unknown.copy()
    some[::2] = 5.0
    mixed = [batch for batch in batches_of(plan_of(some, 4, slots=5).epoch(0)) if len({i % 2 for i in batch}) > 1]
    assert len(mixed) <= 1


def test_without_shuffling_the_order_is_the_sources_or_longest_first():
    unknown = np.full(5, np.nan, np.float32)
    assert batches_of(plan_of(unknown, 2, shuffle=False).epoch(3)) == [[0, 1], [2, 3], [4]]
    known = np.array([5, 1, 4, 2, 3], np.float32)
    assert batches_of(plan_of(known, 2, shuffle=False).epoch(0)) == [[0, 2], [4, 3], [1]]


def parts_of(*weights: str) -> list[Part]:
    return [Part(40 * (i + 1), Fraction(weight)) for i, weight in enumerate(weights)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_weights_say_how_often_an_utterance_comes(limit: dict[str, float], shuffle: bool):
    parts = parts_of("1", "2", "0.5", "0.3")
    plan = plan_of(speech(400), **limit, parts=parts, slots=4, shuffle=shuffle)
    counts = np.array(
        [np.bincount(list(itertools.chain(*batches_of(plan.epoch(number)))), minlength=400) for number in range(10)]
    )  # (epoch, utterance)
    first, second, third, fourth = np.split(counts, [40, 120, 240], axis=1)
    assert (first == 1).all() and (second == 2).all()
    assert (third[0::2] + third[1::2] == 1).all() and (third.sum(axis=1) > 0).all()
    assert (fourth.sum(axis=0) == 3).all() and fourth.max() == 1
    # A half in each bucket of length, so the epochs are alike in length too.
    assert abs(third[0].sum() - 60) < 20


def test_a_weighted_part_is_not_taken_in_the_sources_order():
    alike = np.full(100, 5.0, np.float32)
    first = batches_of(plan_of(alike, parts=[Part(100, Fraction(1, 2))]).epoch(0))
    assert 15 < sum(i < 50 for i in itertools.chain(*first)) < 35


def test_weights_leave_the_number_of_steps_constant():
    rng = np.random.default_rng(0)
    for seed in range(20):
        sizes = rng.integers(1, 60, 4)
        parts = [Part(int(n), Fraction(int(rng.integers(1, 30)), 10)) for n in sizes]
        for limit in LIMITS:
            plan = plan_of(speech(int(sizes.sum()), seed), **limit, parts=parts, slots=int(rng.integers(1, 9)))
            for number in range(6):
                epoch = plan.epoch(number)
                assert len(epoch.steps) == plan.steps and epoch.bounds[-1] == len(epoch.order)


def test_a_rare_part_may_leave_epochs_empty():
    plan = plan_of(speech(1), parts=[Part(1, Fraction(1, 3))], slots=2)
    assert [batches_of(plan.epoch(number)) for number in range(3)] == [[[], []], [[], []], [[0], []]]


def test_plan_names_the_flag_that_cannot_be():
    durations = speech(4)
    with pytest.raises(UserError, match="--micro_bsz: found 0, expected 1"):
        plan_of(durations, 0)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"--batch_seconds: found {seconds}, expected a number"):
            plan_of(durations, batch_seconds=seconds)
    durations[1:3] = np.nan
    with pytest.raises(UserError, match="--batch_seconds: 2 of 4 utterances have no known duration"):
        plan_of(durations, batch_seconds=9.0)
    with pytest.raises(ValueError, match="4 durations for parts of"):
        plan_of(durations, parts=[Part(3)])
