"""Points to resume an interrupted run from: whole or not there, checked by SHA-256, the newest usable one first.

A point is a folder `step-N` of files that training wrote, and beside them `complete.json`, which names each file with
its size and SHA-256, and what the run must know before it loads anything. It is filled under another name and renamed
when everything is on the disk: a process killed at any moment leaves the earlier points as they were.
"""

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_speech.files import sha256_file, sync, write_text_atomically

logger = logging.getLogger(__name__)

_COMPLETE = "complete.json"
_NAME = re.compile(r"step-(\d+)")
_PENDING = ".pending-"


@dataclass(frozen=True)
class ResumePoint:
    """A point whose files were all found as they were written."""

    path: Path
    step: int
    info: dict[str, Any]


def begin_point(folder: Path, step: int) -> Path:
    """An empty folder for the files of the point after optimizer step `step`; one process of all calls this."""
    pending = folder / f"{_PENDING}step-{step}"
    if pending.exists():
        shutil.rmtree(pending)  # of a process that was killed while it wrote
    pending.mkdir(parents=True)
    return pending


def finish_point(pending: Path, info: dict[str, Any], keep: int = 2) -> Path:
    """Make the point valid once all its files are written; then all but the newest `keep` points are removed."""
    files = sorted(path for path in pending.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    listed = {
        path.relative_to(pending).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }
    write_text_atomically(pending / _COMPLETE, json.dumps({"files": listed, "info": info}, indent=2))
    for folder in {path.parent for path in files} | {pending}:
        sync(folder)
    point = pending.parent / pending.name.removeprefix(_PENDING)
    if point.exists():  # the same step again, after a resume from before it
        shutil.rmtree(point)
    os.replace(pending, point)
    sync(point.parent)
    for old in _points(point.parent)[keep:]:
        shutil.rmtree(old)
    return point


def newest_point(folder: Path) -> ResumePoint | None:
    """The newest point whose files are as they were written; damaged ones are named and passed over."""
    for path in _points(folder):
        fault, info = _check(path)
        if fault is None:
            return ResumePoint(path, _step(path), info)
        logger.warning("%s: %s; it is left out, an earlier point serves if there is one", path, fault)
    return None


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def _points(folder: Path) -> list[Path]:
    """Newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _step(path) >= 0), key=_step, reverse=True)


def _check(path: Path) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a point, if anything, and its info."""
    try:
        content = json.loads((path / _COMPLETE).read_text())
        files, info = dict(content["files"]), dict(content["info"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_COMPLETE} cannot be read ({error})", {}
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", {}
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}", {}
        if sha256_file(file) != expected["sha256"]:
            return f"{name} is damaged (its SHA-256 is another)", {}
    return None, info
