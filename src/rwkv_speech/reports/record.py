"""What a run leaves in its folder beside the weights, for a report: `run.json`, `validation.jsonl`, `metrics.csv`.

run.json          flags, the command, versions, commit, machine, start
validation.jsonl  a line for each utterance of the last validation: id, ref, hyp, wer (a fraction)
metrics.csv       Lightning's: columns come and go, cells are empty; also under logs/csv/
"""

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rwkv_speech.errors import UserError
from rwkv_speech.files import write_text_atomically
from rwkv_speech.scoring.metrics import score
from rwkv_speech.text import normalise_score

RUN, VALIDATION = "run.json", "validation.jsonl"
_METRICS = ("metrics.csv", "logs/csv/metrics.csv")
_PACKAGES = ("rwkv-speech", "torch", "pytorch-lightning", "deepspeed", "transformers", "numpy")


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


def write_validation(folder: Path, texts: Iterable[tuple[str, str, str]]) -> Path:
    """Write validation.jsonl from (id, reference, hypothesis) of each utterance; each line gets its own WER."""
    rows = []
    for name, ref, hyp in texts:
        wer = score([normalise_score(ref)], [normalise_score(hyp)]).wer
        rows.append({"id": name, "ref": ref, "hyp": hyp, "wer": round(wer, 6)})
    lines = "".join(_json(row) + "\n" for row in rows)
    write_text_atomically(folder / VALIDATION, lines)
    return folder / VALIDATION


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json, empty without one; raises UserError naming the file for anything but an object."""
    path = folder / RUN
    if not path.is_file():
        return {}
    record = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(record, dict):
        raise UserError(f"{path}: found {type(record).__name__}, expected a JSON object; delete it or train again")
    return record


def read_texts(path: Path) -> list[dict[str, Any]]:
    """The rows of validation.jsonl, or of an evaluation's; none without the file.

    Raises UserError naming file and line for a row without the strings id, ref and hyp.
    """
    if not path.is_file():
        return []
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            row = _parse(line, f"{path}, line {number}")
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("id", "ref", "hyp")):
                raise UserError(
                    f"{path}, line {number}: found {line[:80]!r}, expected an object with the strings id, ref and hyp; "
                    "delete the line or the file"
                )
            rows.append(row)
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error}), found {text[:80]!r}; delete it or write it again") from error


def find_metrics(folder: Path) -> Path | None:
    """The table of a run, if there is one."""
    return next((folder / name for name in _METRICS if (folder / name).is_file()), None)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The numbers of each row by column; cells that are empty or no number are left out.

    A row may be shorter or longer than the head; a resumed run may have written another head in between.
    Raises UserError naming the file if it cannot be read as text.
    """
    rows: list[dict[str, float]] = []
    head: list[str] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for cells in csv.reader(file):
                found = {name: x for name, cell in zip(head, cells, strict=False) if (x := _number(cell)) is not None}
                if found:
                    rows.append(found)
                elif "step" in cells or not head:
                    head = cells
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table of metrics ({error}); expected a CSV file") from error
    return rows


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
