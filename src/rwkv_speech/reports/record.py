"""What a run leaves in its folder beside the weights, written and read.

run.json              flags, the command, versions, commit, machine, start
validation.jsonl      the rows of the last validation, as decoding/results.py writes and reads them
logs/csv/metrics.csv  a line for each `LogRow`
"""

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rwkv_speech.errors import UserError
from rwkv_speech.files import write_text_atomically

RUN, VALIDATION, METRICS = "run.json", "validation.jsonl", "logs/csv/metrics.csv"
_PACKAGES = ("rwkv-speech", "torch", "pytorch-lightning", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class LogRow:
    """A row of metrics.csv, whose columns are these fields; None, an empty cell, for what was not measured then."""

    step: int  # optimizer steps done
    epoch: int  # counted from 1
    loss: float | None = None  # nats per target token
    lr_adapter: float | None = None
    lr_state: float | None = None
    grad_norm: float | None = None  # before clipping
    target_tokens: float | None = None
    padding: float | None = None  # share of the encoder's input
    audio_seconds: float | None = None
    audio_hours_per_hour: float | None = None
    data_wait: float | None = None  # share of the time
    memory: float | None = None  # of a GPU, peak, GiB
    wer: float | None = None  # a fraction, as all rates in files; people are shown %
    cer: float | None = None


COLUMNS = tuple(field.name for field in fields(LogRow))


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
    """Begin a run's table of metrics: of one that is there the rows of the first `steps_done` steps stay."""
    kept = [row for row in read_metrics(folder) if row.step <= steps_done] if steps_done else []
    (folder / METRICS).parent.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(COLUMNS)
    add_metrics(folder, *kept)


def add_metrics(folder: Path, *rows: LogRow) -> None:
    """Append rows to a run's table of metrics."""
    with (folder / METRICS).open("a", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerows(map(asdict, rows))


def read_metrics(folder: Path) -> list[LogRow]:
    """A run's table of metrics, empty without one; columns of another version are left out.

    Raises UserError naming the file, and the line if one is damaged.
    """
    path, rows = folder / METRICS, list[LogRow]()
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for cells in reader:
                numbers = {name: float(cells[name]) for name in COLUMNS if cells.get(name)}
                place = {name: int(numbers.pop(name)) for name in ("step", "epoch")}
                rows.append(LogRow(**place, **numbers))  # type: ignore[arg-type]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table of metrics ({error}); expected a CSV file") from error
    except (KeyError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}, line {reader.line_num}: found {error}, expected numbers, with step and epoch; delete the line"
        ) from error
    return rows
