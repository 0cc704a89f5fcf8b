"""A finished run as one page, `report.html`, which needs no network and runs no script."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_speech.decoding.results import read_rows
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_text_atomically
from rwkv_speech.reports.record import VALIDATION, LogRow, TaskRow, read_metrics, read_run, read_tasks
from rwkv_speech.reports.render import frequent, render, transcripts, worst
from rwkv_speech.scoring.error_rates import ErrorRates
from rwkv_speech.scoring.errors import align
from rwkv_speech.scoring.measure import Measure, percent
from rwkv_speech.scoring.measures import by_task, mean_error, measures

REPORT = "report.html"
# Column of the metrics, what it is called, its unit, what it is multiplied by.
_SPEED = (
    ("audio_hours_per_hour", "audio per time", "hours per hour", 1.0),
    ("data_wait", "waiting for data", "% of the time", 100.0),
    ("padding", "padding", "% of the encoder's input", 100.0),
    ("target_tokens", "target tokens", "per step", 1.0),
    ("memory", "memory of a GPU, peak", "GiB", 1.0),
    ("grad_norm", "gradient norm", "", 1.0),
)


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Raises UserError naming the folder if it holds nothing to report, and naming a file of it that cannot be read.
    """
    metrics, texts, run = read_metrics(folder), read_rows(folder / VALIDATION), read_run(folder)
    if not (metrics or texts):
        raise UserError(
            f"{folder}: found neither metrics nor {VALIDATION}, expected the --proj_dir of a run; train there first"
        )
    found = measures(texts)
    utterances = align(texts, found=found)
    # A run of an earlier version knew WER alone.
    errors = [x for row in metrics if (x := row.wer if row.error is None else row.error) is not None]
    content = {
        "name": folder.resolve().name,
        "headline": _headline(found, errors, any(row.wer is not None for row in metrics)),
        "found": [(task, f"{len(rows):,}", found[task].report()) for task, rows in by_task(texts).items()],
        "scores": only.scores if isinstance(only := _only(found), ErrorRates) else None,
        "charts": [*_charts(metrics), *_task_charts(read_tasks(folder))],
        "worst": worst(utterances),
        "frequent": list(frequent(transcripts(texts, utterances, found))),
        "tables": [_speed(metrics), *_circumstances(run)],
    }
    write_text_atomically(folder / REPORT, render("report.html.jinja", content))
    return folder / REPORT


def _only(found: Mapping[str, Measure]) -> Measure | None:
    """The measure of a run of one task."""
    return next(iter(found.values())) if len(found) == 1 else None


def _headline(found: Mapping[str, Measure], errors: Sequence[float], words: bool) -> tuple[str, str]:
    """The last validation's main number, of several tasks their mean error, and what to know of it; of `words` WER."""
    only = _only(found)
    if not (errors or found):
        return "no validation", "train with --valid_data to see error rates here"
    name = only.name if only else "WER" if words else "mean error"
    shown = only.shown if only else percent
    if not errors:
        return f"{name} {shown(mean_error(found))}", "of the texts below"
    return f"{name} {shown(errors[-1])}", f"last of {len(errors)} validations; best {shown(min(errors))}"


def _task_charts(rows: Sequence[TaskRow]) -> Iterator[tuple[str, str]]:
    """The errors of tasks, where they are not word errors alone."""
    from rwkv_speech.reports.charts import Point, line_chart

    if any(row.wer is None for row in rows) or len({row.task for row in rows}) > 1:
        lines: dict[str, list[Point]] = {}
        for row in rows:
            lines.setdefault(row.task, []).append((row.epoch, 100 * row.error))
        title = "Errors by task"
        yield title, line_chart(title, "epoch", "WER, 1 - chrF, 1 - F1, 1 - accuracy, %", lines)


def _charts(rows: Sequence[LogRow]) -> Iterator[tuple[str, str]]:
    # Imported here: training must not wait for a library that draws until there is something to draw.
    from rwkv_speech.reports.charts import Point, line_chart

    def by(x: str, name: str, scale: float = 1.0) -> list[Point]:
        return [(getattr(row, x), scale * y) for row in rows if (y := getattr(row, name)) is not None]

    rates = {"WER": by("epoch", "wer", 100.0), "CER": by("epoch", "cer", 100.0)}
    steps = (
        ("Loss", "nats per target token", "loss", True),
        ("Learning rate, adapter", "learning rate", "lr_adapter", False),
        ("Learning rate, initial state", "learning rate", "lr_state", False),
        ("Learning rate, language model", "learning rate", "lr_lm", False),
        ("Gradient norm", "norm", "grad_norm", True),
    )
    title = "Error rates"
    charts = [(title, line_chart(title, "epoch", "% of words or characters", rates))]
    for title, unit, name, trend in steps:
        charts.append((title, line_chart(title, "optimizer step", unit, {"": by("step", name)}, trend)))
    return ((title, chart) for title, chart in charts if chart)


def _speed(rows: Sequence[LogRow]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]], int]:
    lines = []
    for name, title, unit, scale in _SPEED:
        values = [scale * value for row in rows if (value := getattr(row, name)) is not None]
        if any(values):  # on a CPU the memory is 0 throughout
            numbers = (statistics.median(values), min(values), max(values), values[-1])
            lines.append((title, unit, *(f"{number:,.4g}" for number in numbers)))
    return "Speed", ("", "unit", "median", "least", "most", "last"), lines, 4


def _circumstances(run: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, Any]], int]]:
    flags, versions = (run.get(key) for key in ("flags", "versions"))
    about = [(name, run[name]) for name in ("commit", "started", "device", "machine") if run.get(name)]
    if isinstance(run.get("command"), list):
        about.append(("command", " ".join(map(str, run["command"]))))
    if isinstance(versions, dict):
        about += [(f"{name} version", value) for name, value in versions.items()]
    yield "Where it ran", (), about, 0
    given = sorted(flags.items()) if isinstance(flags, dict) else []
    yield "Flags", ("flag", "value"), [(f"--{name}", value) for name, value in given], 0
