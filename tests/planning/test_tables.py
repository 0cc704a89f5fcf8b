"""Tables of a plan."""

import re

import numpy as np
import pytest

from rwkv_speech.planning import tables
from rwkv_speech.planning.memory import GIB, Setup, memory
from rwkv_speech.planning.sizes import BASE_MODELS, WAVLM_LARGE, Sizes
from rwkv_speech.planning.tables import RunPlan, duration, table
from rwkv_speech.planning.time import DataPlan

PUBLISHED = Sizes(BASE_MODELS["3B"], WAVLM_LARGE)


def data_plan(durations: list[float], epoch_steps: int | None = None) -> DataPlan:
    return DataPlan(np.array(durations, np.float32), 4, None, 1024, 3, epoch_steps)


def row_of(report: str, name: str, column: int) -> str:
    """A cell of the row that begins with `name`; columns are two blanks apart."""
    line = next(line for line in report.splitlines() if line.strip().startswith(name))
    return re.split(r"\s{2,}", line.strip())[column]


def test_report_of_the_published_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "largest_micro_bsz", lambda *_: 77)  # takes seconds
    rng = np.random.default_rng(0)
    data = data_plan(list(rng.uniform(2, 22.6, 20_000)))
    setup = Setup(grad_cp=True, strategy="ddp", ranks=4)
    report = RunPlan(PUBLISHED, setup, data, measured=0.5, notes=("assumed",)).report()
    assert report.startswith("note: assumed\n")
    assert row_of(report, "language model", 1) == "3,099,863,040"
    assert row_of(report, "initial state", 1) == "5,242,880"
    needed = memory(PUBLISHED, data.largest(PUBLISHED), setup).needed / GIB
    assert float(row_of(report, "needed", 1)) == pytest.approx(needed, abs=0.01)
    assert "of such utterances, 77 fit a H200 of 139 GiB" in report
    assert "20,000 utterances" in report and "5,000 micro batches, 4 in an optimizer step; 1,250 steps" in report
    assert "3,750 in all" in report
    assert f"measured 0.500 s a step: {duration(625)} an epoch, {duration(1875)} in all" in report
    assert [row_of(report, ranks + " ", 1) for ranks in ("1", "4", "8", "64")] == ["5,000", "1,250", "625", "79"]
    assert all(row_of(report, name, 0) == name for name in BASE_MODELS)
    assert max(map(len, report.splitlines())) < 160


def test_report_says_real_time_of_what_is_heard():
    # 100 of 250 steps of 4 x 10 s: 4000 s of audio in 50 s.
    data = data_plan([10.0] * 1000, epoch_steps=100)
    assert "80 times real time" in "".join(RunPlan(PUBLISHED, Setup(), data, measured=0.5)._epochs())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.51, "4.5 s"), (59, "59 s"), (60, "1.0 min"), (725, "12 min"), (3600, "1.0 h"), (86400 * 2.45, "2.5 days")],
)
def test_duration_in_words(seconds: float, text: str):
    assert duration(seconds) == text


def test_table_puts_numbers_to_the_right():
    lines = table(("name", "count", "note"), [("a", "1", "x"), ("bcdef", "1,000", "")])
    assert lines == ["  name   count  note", "  a          1  x", "  bcdef  1,000"]
