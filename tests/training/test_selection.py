import json
import random
from pathlib import Path

import pytest

from rwkv_speech.training.selection import BestK, EarlyStop

A, B, C, D = (Path(name) for name in "abcd")


def test_best_k_keeps_the_lowest_and_drops_the_worst():
    best = BestK(2)
    assert best.offer(0.5, A) == (True, ())
    assert best.offer(0.3, B) == (True, ())
    assert best.offer(0.4, C) == (True, (A,))
    assert best.offer(0.9, D) == (False, ())
    assert best.paths == [B, C]


def test_of_equal_ones_the_earlier_stays():
    best = BestK(1)
    best.offer(0.3, A)
    assert best.offer(0.3, B) == (False, ())
    assert best.paths == [A]


def test_one_offered_again_takes_its_own_place():
    best = BestK(2)
    best.offer(0.1, A)
    best.offer(0.2, B)
    assert best.offer(0.4, A) == (True, ())  # the same file, written anew: it must not be dropped
    assert best.paths == [B, A]
    assert best.offer(0.3, C) == (True, (A,))


def test_none_are_kept_with_k_zero_or_without_a_wer():
    assert BestK(0).offer(0.1, A) == (False, ())
    best = BestK(2)
    assert best.offer(float("nan"), A) == (False, ())
    assert best.paths == []


def test_files_on_disk_are_the_best_and_nobody_elses_are_lost(tmp_path: Path):
    """What a trainer does with the verdicts leaves exactly the k lowest of a random course, and other files."""
    (tmp_path / "other.safetensors").touch()
    best, course = BestK(3), random.Random(0)
    wers = {f"epoch-{i}": course.choice([0.1, 0.2, 0.3, 0.4]) for i in range(40)}
    for name, wer in wers.items():
        keep, drop = best.offer(wer, tmp_path / name)
        if keep:
            (tmp_path / name).touch()
        for path in drop:
            path.unlink()
    expected = sorted(wers, key=lambda name: wers[name])[:3]  # stable: the earlier of equal ones
    assert {path.name for path in tmp_path.iterdir()} == {*expected, "other.safetensors"}


def test_best_k_continues_from_its_state():
    course = [(0.4, A), (0.2, B), (0.3, C), (0.1, D)]
    whole, first, second = BestK(2), BestK(2), BestK(2)
    verdicts = [whole.offer(*item) for item in course]
    before = [first.offer(*item) for item in course[:2]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.offer(*item) for item in course[2:]] == verdicts


def test_best_k_with_a_smaller_k_drops_the_surplus():
    large, small = BestK(3), BestK(1)
    for wer, path in ((0.3, A), (0.2, B), (0.1, C)):
        large.offer(wer, path)
    small.load_state_dict(large.state_dict())
    assert small.offer(0.05, D) == (True, (A, B, C))


def test_early_stop_waits_for_patience():
    stop = EarlyStop(patience=2)
    assert [stop.should_stop(wer) for wer in (0.5, 0.4, 0.4, 0.39, 0.5, 0.45)] == [False] * 5 + [True]


def test_an_equal_wer_is_no_improvement():
    stop = EarlyStop(patience=2)
    assert [stop.should_stop(0.5) for _ in range(3)] == [False, False, True]


def test_early_stop_wants_more_than_min_delta():
    stop = EarlyStop(patience=2, min_delta=0.05)
    # 0.46 and 0.45 are too near 0.5; 0.44 would not have been.
    assert [stop.should_stop(wer) for wer in (0.5, 0.46, 0.4501)] == [False, False, True]
    assert not EarlyStop(patience=1, min_delta=0.05).should_stop(0.5)


def test_nan_is_no_improvement():
    stop = EarlyStop(patience=2)
    assert [stop.should_stop(float("nan")) for _ in range(2)] == [False, True]


def test_patience_zero_never_stops():
    stop = EarlyStop(patience=0)
    assert not any(stop.should_stop(0.5) for _ in range(50))


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_early_stop_continues_from_its_state(cut: int):
    course = [0.5, 0.4, 0.6, 0.6, 0.6]
    whole, first, second = (EarlyStop(patience=3) for _ in range(3))
    before = [first.should_stop(wer) for wer in course[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.should_stop(wer) for wer in course[cut:]] == [whole.should_stop(wer) for wer in course]
