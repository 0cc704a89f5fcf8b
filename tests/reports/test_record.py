import csv
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_speech.errors import UserError
from rwkv_speech.reports import record as run_record
from rwkv_speech.reports.record import (
    METRICS,
    LogRow,
    add_metrics,
    read_metrics,
    read_run,
    start_metrics,
    write_run,
)


def test_run_comes_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--seed", "7"])
    flags: dict[str, Any] = {"seed": 7, "train_data": "größe.jsonl", "epoch_steps": None, "place": Path("x")}
    write_run(tmp_path / "new", flags, "1 x cpu")
    record = read_run(tmp_path / "new")
    assert record["flags"] == {**flags, "place": "x"}
    assert record["command"] == ["train.py", "--seed", "7"]
    assert record["device"] == "1 x cpu"
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["started"].endswith("+00:00")


def test_commit_is_gits_own():
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    whole = done.stdout.strip()
    assert run_record.commit().removesuffix("-dirty") in ("", whole[: len(run_record.commit().removesuffix("-dirty"))])
    assert bool(run_record.commit()) == (done.returncode == 0)


def test_commit_is_empty_without_git(monkeypatch: pytest.MonkeyPatch):
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert run_record.commit() == ""


def test_a_run_without_a_record_has_none(tmp_path: Path):
    assert read_run(tmp_path) == {}
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "found"), [(b"[1]", "found list"), (b"{", "not JSON"), (b'{"a": "\xff"}', "not JSON")]
)
def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path, content: bytes, found: str):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"run.json: {found}"):
        read_run(tmp_path)


ROWS = [
    LogRow(step=9, epoch=1, loss=0.1 + 0.2, lr_adapter=1e-4, target_tokens=12.0),
    LogRow(step=10, epoch=1, wer=0.25, cer=1 / 3),
    LogRow(step=11, epoch=2, loss=math.inf),
]


def test_metrics_come_back_as_they_were_written(tmp_path: Path):
    start_metrics(tmp_path)
    assert read_metrics(tmp_path) == []
    for row in ROWS:
        add_metrics(tmp_path, row)
    assert read_metrics(tmp_path) == ROWS
    table = list(csv.DictReader((tmp_path / "logs/csv/metrics.csv").open()))
    assert (table[1]["step"], table[1]["epoch"], table[1]["wer"], table[1]["loss"]) == ("10", "1", "0.25", "")


@pytest.mark.parametrize(("done", "kept"), [(0, 0), (8, 0), (9, 1), (10, 2), (99, 3)])
def test_a_resumed_run_keeps_the_rows_of_the_steps_it_has_done(tmp_path: Path, done: int, kept: int):
    start_metrics(tmp_path)
    add_metrics(tmp_path, *ROWS)
    start_metrics(tmp_path, steps_done=done)
    assert read_metrics(tmp_path) == ROWS[:kept]


def test_metrics_of_another_version_and_a_torn_last_row_are_read(tmp_path: Path):
    path = tmp_path / METRICS
    path.parent.mkdir(parents=True)
    path.write_text("loss,speed,epoch,step,wer\n1.5,7,1,1,\n2.5,7,1,2")
    assert read_metrics(tmp_path) == [LogRow(step=1, epoch=1, loss=1.5), LogRow(step=2, epoch=1, loss=2.5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,epoch,loss\n\xff\xfe\x00,1\n", "metrics.csv: cannot be read as a table of metrics"),
        (b"step,epoch,loss\n1,1,2.5\n2,1,n/a\n", "metrics.csv, line 3: found .*'n/a', expected numbers"),
        (b"step,epoch,loss\ninf,1,2.5\n", "metrics.csv, line 2: found .*infinity"),
        (b"loss\n2.5\n", "metrics.csv, line 2: found 'step', expected numbers, with step and epoch"),
    ],
)
def test_damaged_metrics_are_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / METRICS
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_metrics(tmp_path)
