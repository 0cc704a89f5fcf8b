"""An evaluation as one page, which needs no network: its numbers, and every utterance with its errors and its audio."""

# U utterances

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from rwkv_speech.decoding.results import Row
from rwkv_speech.files import write_text_atomically
from rwkv_speech.reports.render import cleaned, frequent, in_order_of_errors, render, transcripts, worst
from rwkv_speech.scoring.classes import NO_CLASS, Classes
from rwkv_speech.scoring.error_rates import ErrorRates
from rwkv_speech.scoring.errors import Utterance, align
from rwkv_speech.scoring.measure import Measure, percent
from rwkv_speech.scoring.result import GROUPS, Evaluation, TaskResult, ordered
from rwkv_speech.text import normalizer

# How words that are not equal are marked in the page's data; evaluation.js reads them.
_SUB, _INS, _DEL = "\x01", "\x02", "\x03"
_MOST_GROUPS = 1000
_MOST_OPEN = 24
_MOST_CLASSES = 40
_BINS = (0, 5, 10, 20, 30, 50, 75, 100)  # %


def write_evaluation(result: Evaluation, path: Path, weights: str) -> Path:
    """Write the page of a result, made with these `weights`, and return its path.

    Raises ModuleNotFoundError where the packages that draw it are missing.
    """
    from markupsafe import Markup

    measures = {task: found.measure for task, found in result.tasks.items()}
    utterances = align(result.rows, result.form, measures)
    script = files("rwkv_speech.reports").joinpath("evaluation.js").read_text(encoding="utf-8")
    content = {
        "name": result.name,
        "weights": f"weights {weights}",
        "speed": result.speed.report(),
        "tasks": [_section(found) for found in result.tasks.values()],
        "count": len(result.rows),
        "worst": worst(utterances),
        "frequent": list(frequent(transcripts(result.rows, utterances, measures))),
        "data": _packed(_data(result, utterances, path.parent)),
        "script": Markup(script),
        # The page's one script is known by its content: no other runs, whatever a transcript holds.
        "script_hash": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    }
    write_text_atomically(path, render("evaluation.html.jinja", content))
    return path


def _section(found: TaskResult) -> dict[str, Any]:
    """What the page says of a task."""
    measure, numbers = found.measure, list(_numbers(found))
    return {
        "task": found.task,
        "heading": found.heading(),
        "defined": measure.defined,
        "name": measure.name,
        "main": measure.shown(measure.error),
        "lines": [] if numbers and measure.defined else measure.lines(found.interval),
        "interval": found.interval,
        "ends": sorted(measure.shown(end) for end in found.interval.ends),
        "unit": measure.unit,
        "numbers": numbers,
        "charts": list(_charts(found)),
        "matrix": _matrix(measure),
        "head": ("", "utterances", *measure.head),
        "tables": list(_tables(found)),
    }


def _numbers(found: TaskResult) -> Iterator[tuple[str, ...]]:
    if not isinstance(found.measure, ErrorRates):
        return
    scores = found.measure.scores
    counted = [("words", scores.words), ("characters", scores.characters)]
    if found.ctc:
        counted.append(("words, CTC head alone", found.ctc))
    for name, x in counted:
        rate = percent(x.rate) if x.ref_length else "-"
        yield name, rate, *(f"{n:,}" for n in (x.hits, x.substitutions, x.insertions, x.deletions, x.ref_length))


def _matrix(measure: Measure) -> dict[str, Any] | None:
    """The confusion of so many classes as a page has room for: of each class its cells, and the share of each cell."""
    if not isinstance(measure, Classes) or len(measure.names) > _MOST_CLASSES:
        return None
    columns = [*measure.names, *([NO_CLASS] if measure.no_class else [])]
    counts = measure.confusion[:, : len(columns)]
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    cells = [list(zip(*row, strict=True)) for row in zip(counts.tolist(), shares.tolist(), strict=True)]
    return {"columns": columns, "rows": list(zip(measure.names, cells, strict=True))}


def _tables(found: TaskResult) -> Iterator[tuple[str, bool, list[tuple[str, ...]]]]:
    """Title, whether it is open at first, and rows; those of many groups have the worst first."""
    for name, table in found.tables.items():
        groups, title, is_short = list(table.items()), f"By {name}", len(table) <= _MOST_OPEN
        if not is_short:
            groups = sorted(groups, key=lambda item: -item[1][1].error)[:_MOST_GROUPS]
            title += f": {len(table):,}, the worst first"
        yield title, is_short, [(group, f"{count:,}", *x.cells()) for group, (count, x) in groups]


def _charts(found: TaskResult) -> Iterator[tuple[str, str]]:
    from rwkv_speech.reports.charts import bar_chart

    measure, label = found.measure, f"{found.measure.name}{found.measure.unit.replace(' ', ', ')}"
    if "duration" in found.tables:
        title = f"{measure.name} by duration"
        errors = {group: x.error for group, (_, x) in found.tables["duration"].items()}
        bars = {group: 100 * (error if measure.is_error else 1 - error) for group, error in errors.items()}
        yield title, bar_chart(title, "duration", label, bars)
    if found.reliability:
        title = "Right words by their probability"
        shares = {f"{x.confidence:.2f}": 100 * x.right for x in found.reliability.bins if x.words}
        yield title, bar_chart(title, "mean probability", "right words, %", shares)
    if isinstance(measure, Classes):
        return
    title = f"Utterances by their {measure.name}"
    numbers = 100 * (measure.errors if measure.is_error else 1 - measure.errors)
    places = np.searchsorted(_BINS, numbers, side="left")
    names = ["0", *(f"≤ {end}" for end in _BINS[1:]), *([f"> {_BINS[-1]}"] if measure.is_error else [])]
    counts = np.bincount(places, minlength=len(names))
    yield title, bar_chart(title, label, "utterances", dict(zip(names, counts.tolist(), strict=True)))


def _data(result: Evaluation, utterances: Sequence[Utterance], folder: Path) -> dict[str, Any]:
    """The utterances as columns, the worst first, which is what evaluation.js reads."""
    pairs = sorted(zip(result.rows, utterances, strict=True), key=lambda pair: in_order_of_errors(pair[1]))
    rows, aligned = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    normalise = normalizer(result.form)
    data: dict[str, Any] = {
        "id": [cleaned(row.id) for row in rows],
        "index": [row.index for row in rows],
        "seconds": [round(row.seconds, 2) for row in rows],
        "wrong": [utterance.error > 0 for utterance in aligned],
        "edits": [utterance.edits for utterance in aligned],
        "verdict": [utterance.verdict for utterance in aligned],
        "words": [" ".join(map(_marked, utterance.words)) for utterance in aligned],
        "audio": [_link(row, folder) for row in rows],
        "offset": [round(row.offset, 3) for row in rows],
        "ctc": [cleaned(normalise(row.ctc or "")) for row in rows] if any(row.ctc for row in rows) else None,
    }
    for name, group_of in GROUPS.items():
        groups = [group_of(row) for row in rows]
        numbers = {group: number for number, group in enumerate(ordered(groups))}
        if len(numbers) < 2:
            continue
        data[name] = {
            "names": [cleaned(group) for group in numbers],
            "of": [-1 if group is None else numbers[group] for group in groups],
        }
    return data


def _marked(word: tuple[str, str, str]) -> str:
    kind, ref, hyp = word[0], cleaned(word[1]), cleaned(word[2])
    return {"equal": ref, "sub": f"{_SUB}{ref}{_SUB}{hyp}", "ins": f"{_INS}{hyp}", "del": f"{_DEL}{ref}"}[kind]


def _link(row: Row, folder: Path) -> str | None:
    """The audio's address for the page, relative to it, so that they may be moved together."""
    return quote(os.fsencode(os.path.relpath(row.audio, folder))) if row.audio else None


def _packed(data: dict[str, Any]) -> str:
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()
