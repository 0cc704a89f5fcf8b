import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jiwer
import pytest
import torch

from rwkv_speech.errors import UserError
from rwkv_speech.reports import record as run_record
from rwkv_speech.reports.record import (
    find_metrics,
    read_metrics,
    read_run,
    read_texts,
    write_run,
    write_validation,
)

TEXTS = [
    ("a", "The weather is good.", "the weather is god"),
    ("b", "天气 很好", "天气 很好"),
    ("c\udcff", "", "hello you"),
]


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
    assert read_texts(tmp_path / "validation.jsonl") == []
    assert find_metrics(tmp_path) is None


@pytest.mark.parametrize(("text", "found"), [("[1]", "found list"), ("{", "not JSON")])
def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path, text: str, found: str):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=rf"run.json: {found}"):
        read_run(tmp_path)


def test_validation_holds_each_utterances_own_wer(tmp_path: Path):
    rows = read_texts(write_validation(tmp_path, TEXTS))
    assert [(row["id"], row["ref"], row["hyp"]) for row in rows] == TEXTS
    assert rows[0]["wer"] == jiwer.wer("the weather is good", "the weather is god") == 0.25
    assert rows[1]["wer"] == 0.0
    assert rows[2]["wer"] == 2.0  # two words where none was said


@pytest.mark.parametrize("line", ['{"id": "a", "ref": "b"}', '{"id": 1, "ref": "b", "hyp": "c"}', "[]", "{"])
def test_a_bad_line_of_texts_is_named(tmp_path: Path, line: str):
    path = write_validation(tmp_path, TEXTS[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"validation.jsonl, line 2: "):
        read_texts(path)


def test_texts_of_an_evaluation_can_be_read(tmp_path: Path):
    path = tmp_path / "eval-test.jsonl"
    path.write_text(json.dumps({"id": "a", "ref": "b", "hyp": "c", "cut": False}) + "\n")
    assert read_texts(path)[0]["cut"] is False


def metrics(tmp_path: Path, text: str) -> list[dict[str, float]]:
    path = tmp_path / "metrics.csv"
    path.write_bytes(text.encode())
    return read_metrics(path)


def test_metrics_leave_out_empty_cells(tmp_path: Path):
    rows = metrics(tmp_path, "step,loss,wer\n9,2.5,\n19,1e-1,\n19,,0.25\n")
    assert rows == [{"step": 9, "loss": 2.5}, {"step": 19, "loss": 0.1}, {"step": 19, "wer": 0.25}]


def test_metrics_take_ragged_rows_and_words(tmp_path: Path):
    rows = metrics(tmp_path, "step,loss,wer\r\n9\r\n19,0.5,0.1,7,8\r\n\r\nhello,0.25,n/a\r\n")
    assert rows == [{"step": 9}, {"step": 19, "loss": 0.5, "wer": 0.1}, {"loss": 0.25}]


def test_metrics_take_a_second_head(tmp_path: Path):
    rows = metrics(tmp_path, "step,loss\n1,2.5\nloss,step,wer\n1.5,2,0.3\n")
    assert rows == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5, "wer": 0.3}]


def test_metrics_of_an_empty_file_are_none(tmp_path: Path):
    assert metrics(tmp_path, "") == []


def test_metrics_that_are_no_text_are_an_error(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,loss\n\xff\xfe\x00,1\n")
    with pytest.raises(UserError, match="metrics.csv: cannot be read as a table of metrics"):
        read_metrics(path)


def test_metrics_are_found_where_lightning_writes_them(tmp_path: Path):
    (tmp_path / "logs" / "csv").mkdir(parents=True)
    (tmp_path / "logs" / "csv" / "metrics.csv").touch()
    assert find_metrics(tmp_path) == tmp_path / "logs" / "csv" / "metrics.csv"
    (tmp_path / "metrics.csv").touch()
    assert find_metrics(tmp_path) == tmp_path / "metrics.csv"
