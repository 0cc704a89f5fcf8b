"""Tables of a plan."""

import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from rwkv_speech.config import TrainConfig
from rwkv_speech.data.epoch import Cut, EpochPlan
from rwkv_speech.data.source import Part
from rwkv_speech.errors import UserError
from rwkv_speech.planning import cost, tables
from rwkv_speech.planning.cost import GIB, Step
from rwkv_speech.planning.measure import BASE_MODELS, Sizes
from rwkv_speech.planning.tables import Data, _epochs, duration, report

PUBLISHED = Sizes(BASE_MODELS["3B"])
CONFIG = TrainConfig(
    device="4", precision="bf16", encoder_precision="fp32", micro_bsz=4, epoch_count=3, strategy="ddp", plan=1
)


def data_of(durations: list[float], parts: list[Part] | None = None, **flags: Any) -> Data:
    array = np.array(durations, np.float32)
    return Data.of(array, [Part(len(array))] if parts is None else parts, replace(CONFIG, **flags), PUBLISHED)


def row_of(text: str, name: str, column: int) -> str:
    """A cell of the row that begins with `name`; columns are two blanks apart."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return re.split(r"\s{2,}", line.strip())[column]


def test_report_of_the_published_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cost, "largest_micro_bsz", lambda *_: 77)  # takes seconds
    monkeypatch.setattr(tables, "BASE_MODELS", {name: BASE_MODELS[name] for name in ("1.6B", "3B")})
    config = replace(CONFIG, grad_cp=1)
    data = data_of(list(np.random.default_rng(0).uniform(2, 22.6, 20_000)))
    text = report(config, PUBLISHED, data, 0.5, ["assumed"])
    assert text.startswith("note: assumed\n\nParameters\n")
    assert row_of(text, "language model", 1) == "3,099,863,040"
    assert row_of(text, "initial state", 1) == "5,242,880"
    assert float(row_of(text, "needed", 1)) == pytest.approx(
        Step(PUBLISHED, data.largest, config).needed / GIB, abs=0.01
    )
    assert "of such utterances, 77 fit a H200 of 139 GiB" in text
    assert "20,000 utterances" in text and "5,000 micro batches, 4 in an optimizer step; 1,250 steps" in text
    assert "3,750 in all" in text
    assert f"measured 0.500 s a step: {duration(625)} an epoch, {duration(1875)} in all" in text
    assert [row_of(text, ranks + " ", 1) for ranks in ("1", "4", "8", "64")] == ["5,000", "1,250", "625", "79"]
    assert all(row_of(text, name, 0) == name for name in ("1.6B", "3B"))
    assert max(map(len, text.splitlines())) < 160


def test_the_assumptions_on_the_screen_are_those_of_the_numbers():
    (bf16, fp32), (high, low) = cost.REACHED.values(), cost.OPERATIONS.values()
    assert f"{100 * bf16:.0f} % of {high / 1e12:.0f} TFLOP/s reached in bfloat16" in cost.ASSUMED
    assert f"{100 * fp32:.0f} % of {low / 1e12:.0f} in float32" in cost.ASSUMED
    assert f"{cost._INSIDE / 1e9:.0f} GB/s within 8 GPUs, {cost._BETWEEN / 1e9:.0f} GB/s beyond" in cost.ASSUMED


def test_report_says_real_time_of_what_is_heard():
    # 100 of 250 steps of 4 x 10 s: 4000 s of audio in 50 s.
    flags = {"device": "1", "epoch_steps": 100}
    lines = _epochs(replace(CONFIG, **flags), data_of([10.0] * 1000, **flags), 0.5)
    assert "80 times real time" in "".join(lines)


def test_steps_are_those_of_the_sampler():
    seconds = np.random.default_rng(0).uniform(1, 30, 1001).astype(np.float32)
    for batch_seconds in (None, 60.0):
        for ranks, accumulate in ((1, 1), (8, 1), (4, 3)):
            flags = {"device": str(ranks), "accumulate": accumulate, "batch_seconds": batch_seconds}
            cut = Cut(4, batch_seconds, world_size=ranks * accumulate)
            assert data_of(list(seconds), **flags).steps(replace(CONFIG, **flags)) == EpochPlan(seconds, cut).steps


def test_epoch_steps_limit_the_steps():
    assert [data_of([1.0] * 100).steps(replace(CONFIG, device="1", epoch_steps=n)) for n in (7, 70)] == [7, 25]


def test_parts_count_as_often_as_they_are_heard():
    found = data_of([10.0, 20.0, 90.0], [Part(2, Fraction(3)), Part(1)])
    assert found.utterances == 7
    assert found.mean_seconds == pytest.approx((3 * 30 + 90) / 7)


def test_unknown_durations_are_taken_as_the_mean():
    assert data_of([10.0, float("nan"), 20.0]).mean_seconds == 15.0
    assert data_of([float("nan")] * 2).mean_seconds == 12.0


def test_largest_micro_batch_holds_the_longest_utterances():
    assert data_of([3.0, 35.0, 8.0]).largest == (4, 35.0, 140)
    assert data_of([3.0, 35.0], batch_seconds=80.0).largest.utterances == 2


@pytest.mark.parametrize("seconds", [300.0, float("nan")])
def test_largest_micro_batch_ends_at_the_context(seconds: float):
    batch = data_of([3.0, seconds], ctx_len=512).largest
    assert 0.97 * 512 <= PUBLISHED.positions(batch) / batch.utterances <= 512


def test_no_data_is_an_error():
    with pytest.raises(UserError, match="--train_data: found no utterance"):
        data_of([])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.51, "4.5 s"), (59, "59 s"), (60, "1.0 min"), (725, "12 min"), (3600, "1.0 h"), (86400 * 2.45, "2.5 days")],
)
def test_duration_in_words(seconds: float, text: str):
    assert duration(seconds) == text
