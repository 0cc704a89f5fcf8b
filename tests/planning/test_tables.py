"""Tables of a plan."""

import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from rwkv_speech.data.epoch import Cut, EpochPlan
from rwkv_speech.data.source import Part
from rwkv_speech.errors import UserError
from rwkv_speech.planning import tables as plan
from rwkv_speech.planning.memory import GIB, memory
from rwkv_speech.planning.sizes import BASE_MODELS, WAVLM_LARGE, ModelSizes, Setup
from rwkv_speech.planning.tables import (
    DataPlan,
    RunPlan,
    duration,
    measure,
    table,
)

PUBLISHED = ModelSizes(BASE_MODELS["3B"], WAVLM_LARGE)


def data_plan(durations: list[float], **changed: Any) -> DataPlan:
    settings: dict[str, Any] = {"micro_bsz": 4, "batch_seconds": None, "ctx_len": 1024, "epochs": 3}
    return DataPlan(np.array(durations, np.float32), **{**settings, **changed})


def test_steps_are_those_of_the_sampler():
    seconds = np.random.default_rng(0).uniform(1, 30, 1001).astype(np.float32)
    for batch_seconds in (None, 60.0):
        for setup in (Setup(), Setup(ranks=8), Setup(ranks=4, accumulate=3)):
            slots = setup.ranks * setup.accumulate
            found = data_plan(list(seconds), batch_seconds=batch_seconds)
            assert found.steps(setup) == EpochPlan(found.durations, Cut(4, batch_seconds, world_size=slots)).steps


def test_epoch_steps_limit_the_steps():
    assert data_plan([1.0] * 100, epoch_steps=7).steps(Setup()) == 7
    assert data_plan([1.0] * 100, epoch_steps=70).steps(Setup()) == 25


def test_hours_count_parts_as_often_as_they_are_heard():
    parts = [Part(2, Fraction(3)), Part(1)]
    found = data_plan([10.0, 20.0, 90.0], parts=parts)
    assert found.utterances == 7
    assert found.hours * 3600 == pytest.approx(3 * 30 + 90)


def test_unknown_durations_are_taken_as_the_mean():
    found = data_plan([10.0, float("nan"), 20.0])
    assert (found.unknown(), found.mean_seconds, found.hours) == (1, 15.0, 45 / 3600)
    assert data_plan([float("nan")] * 2).mean_seconds == 12.0


def test_largest_micro_batch_holds_the_longest_utterances():
    batch = data_plan([3.0, 35.0, 8.0]).largest(PUBLISHED)
    assert (batch.utterances, batch.seconds, batch.text_tokens) == (4, 35.0, 140)
    assert data_plan([3.0, 35.0], batch_seconds=80.0).largest(PUBLISHED).utterances == 2


@pytest.mark.parametrize("seconds", [300.0, float("nan")])
def test_largest_micro_batch_ends_at_the_context(seconds: float):
    batch = data_plan([3.0, seconds], ctx_len=512).largest(PUBLISHED)
    assert 0.97 * 512 <= batch.positions(PUBLISHED) / batch.utterances <= 512


def test_no_data_is_an_error():
    with pytest.raises(UserError, match="--train_data: found no utterance"):
        data_plan([])


class Clock:
    """Time that passes only in `step`, so many seconds a call."""

    def __init__(self, seconds: list[float]) -> None:
        self.now, self.calls, self._seconds = 0.0, 0, seconds

    def perf_counter(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += self._seconds[self.calls]
        self.calls += 1


def test_measure_gives_the_median_of_the_calls_after_the_first_two(monkeypatch: pytest.MonkeyPatch):
    clock = Clock([90, 80, 2, 3, 9, 2, 3, 3, 1, 1])
    monkeypatch.setattr(plan, "time", clock)
    assert measure(clock.step, 18.5) == 3  # of 2 3 9 2 3, after which 18.5 s have passed
    assert clock.calls == 7


def test_measure_counts_three_calls_at_least(monkeypatch: pytest.MonkeyPatch):
    clock = Clock([1.0] * 9)
    monkeypatch.setattr(plan, "time", clock)
    assert (measure(clock.step, 0.0), clock.calls) == (1.0, 5)


def row_of(report: str, name: str, column: int) -> str:
    """A cell of the row that begins with `name`; columns are two blanks apart."""
    line = next(line for line in report.splitlines() if line.strip().startswith(name))
    return re.split(r"\s{2,}", line.strip())[column]


def test_report_of_the_published_setting():
    rng = np.random.default_rng(0)
    data = data_plan(list(rng.uniform(2, 22.6, 20_000)))
    setup = Setup(grad_cp=True, strategy="ddp", ranks=4)
    report = RunPlan(PUBLISHED, setup, data, measured=0.5).report()
    assert row_of(report, "language model", 1) == "3,099,863,040"
    assert row_of(report, "initial state", 1) == "5,242,880"
    needed = memory(PUBLISHED, data.largest(PUBLISHED), setup).needed / GIB
    assert float(row_of(report, "needed", 1)) == pytest.approx(needed, abs=0.01)
    assert "20,000 utterances" in report and "5,000 micro batches, 4 in an optimizer step; 1,250 steps" in report
    assert "3,750 in all" in report
    assert f"measured 0.500 s a step: {duration(625)} an epoch, {duration(1875)} in all" in report
    assert [row_of(report, ranks + " ", 1) for ranks in ("1", "4", "8", "64")] == ["5,000", "1,250", "625", "79"]
    assert all(row_of(report, name, 0) == name for name in BASE_MODELS)
    assert max(map(len, report.splitlines())) < 160


def test_report_says_real_time_of_what_is_heard():
    # 100 of 250 steps of 4 x 10 s: 4000 s of audio in 50 s.
    data = data_plan([10.0] * 1000, epoch_steps=100)
    assert "80 times real time" in RunPlan(PUBLISHED, Setup(), data, measured=0.5).report()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.51, "4.5 s"), (59, "59 s"), (60, "1.0 min"), (725, "12 min"), (3600, "1.0 h"), (86400 * 2.45, "2.5 days")],
)
def test_duration_in_words(seconds: float, text: str):
    assert duration(seconds) == text


def test_table_puts_numbers_to_the_right():
    lines = table(("name", "count", "note"), [("a", "1", "x"), ("bcdef", "1,000", "")])
    assert lines == ["  name   count  note", "  a          1  x", "  bcdef  1,000"]
