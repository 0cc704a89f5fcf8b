"""What a run leaves in its folder beside the weights, written and read.

run.json              flags, the command, versions, commit, machine, start
validation.jsonl      the rows of the last validation, as decoding/results.py writes and reads them
logs/csv/metrics.csv  a line for each `LogRow`
logs/csv/tasks.csv    a line for each `TaskRow`
"""

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from rwkv_speech.errors import UserError
from rwkv_speech.files import write_text_atomically

RUN, VALIDATION, METRICS, TASKS = "run.json", "validation.jsonl", "logs/csv/metrics.csv", "logs/csv/tasks.csv"
_PACKAGES = ("rwkv-speech", "torch", "pytorch-lightning", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class LogRow:
    """A row of metrics.csv, whose columns are these fields; None, an empty cell, for what was not measured then."""

    step: int  # optimizer steps done
    epoch: int  # counted from 1
    loss: float | None = None  # nats per target token
    lr_adapter: float | None = None
    lr_state: float | None = None
    lr_lm: float | None = None
    grad_norm: float | None = None  # before clipping
    target_tokens: float | None = None
    padding: float | None = None  # share of the encoder's input
    audio_seconds: float | None = None
    audio_hours_per_hour: float | None = None
    data_wait: float | None = None  # share of the time
    memory: float | None = None  # of a GPU, peak, GiB
    wer: float | None = None  # a fraction, as all rates in files; people are shown %
    cer: float | None = None
    error: float | None = None  # the mean of the tasks' errors, by which checkpoints are chosen


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """A row of tasks.csv: what a validation measured of one task; None where its measure is another."""

    step: int
    epoch: int
    task: str
    num_utterances: int
    error: float  # WER, 1 - chrF, 1 - F1 or 1 - accuracy
    wer: float | None = None
    cer: float | None = None
    chrf: float | None = None  # 0 to 100, as BLEU
    bleu: float | None = None
    f1: float | None = None
    exact_match: float | None = None
    accuracy: float | None = None
    weighted_f1: float | None = None
    mean_recall: float | None = None


RowT = TypeVar("RowT", LogRow, TaskRow)


def write_run(folder: Path, flags: Mapping[str, Any], device: str) -> Path:
    """Write run.json: `flags` as given and derived, `device` in words."""
    record = {
        "flags": dict(flags),
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit(),
        "machine": platform.platform(),
        "device": device,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text_atomically(folder / RUN, _json(record, indent=2) + "\n")
    return folder / RUN


def _json(value: Any, indent: int | None = None) -> str:
    """Readable letters; half a surrogate pair, which a file's name may hold, stays the escape that JSON has for it."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the code in use, marked if files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json, empty without one; raises UserError naming the file for anything but an object."""
    path = folder / RUN
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}), expected an object; delete it or train again") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: found {type(record).__name__}, expected a JSON object; delete it or train again")
    return record


def start_metrics(folder: Path, steps_done: int = 0) -> None:
    """Begin a run's tables of metrics: of those that are there the rows of the first `steps_done` steps stay."""
    _start(folder, LogRow, [row for row in read_metrics(folder) if row.step <= steps_done] if steps_done else [])
    _start(folder, TaskRow, [row for row in read_tasks(folder) if row.step <= steps_done] if steps_done else [])


def add_metrics(folder: Path, *rows: LogRow | TaskRow) -> None:
    """Append rows to a run's tables of metrics."""
    for kind, name in _TABLES.items():
        with (folder / name).open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, columns(kind)).writerows(asdict(row) for row in rows if isinstance(row, kind))


def columns(kind: type[LogRow] | type[TaskRow]) -> list[str]:
    """The names of a table's columns."""
    return [field.name for field in fields(kind)]


def read_metrics(folder: Path) -> list[LogRow]:
    """A run's table of metrics, empty without one; columns of another version are left out.

    Raises UserError naming the file, and the line if one is damaged.
    """
    return _read(folder, LogRow)


def read_tasks(folder: Path) -> list[TaskRow]:
    """The same of what validations measured of each task."""
    return _read(folder, TaskRow)


_TABLES: dict[type[LogRow] | type[TaskRow], str] = {LogRow: METRICS, TaskRow: TASKS}
_WORDS, _WHOLE = ("task",), ("step", "epoch", "num_utterances")


def _start(folder: Path, kind: type[RowT], kept: Sequence[RowT]) -> None:
    path = folder / _TABLES[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns(kind))
        writer.writeheader()
        writer.writerows(map(asdict, kept))


def _read(folder: Path, kind: type[RowT]) -> list[RowT]:
    path, rows, names = folder / _TABLES[kind], list[RowT](), columns(kind)
    required = [field.name for field in fields(kind) if field.default is MISSING]
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for cells in reader:
                known: dict[str, Any] = {name: cells[name] for name in names if cells.get(name)}
                known |= {name: float(text) for name, text in known.items() if name not in _WORDS}
                known |= {name: int(number) for name, number in known.items() if name in _WHOLE}
                rows.append(kind(**{name: known[name] for name in required} | known))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table of metrics ({error}); expected a CSV file") from error
    except (KeyError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}, line {reader.line_num}: found {error}, expected numbers, with step and epoch; delete the line"
        ) from error
    return rows
