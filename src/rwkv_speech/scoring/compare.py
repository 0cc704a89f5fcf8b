"""Two results on the same utterances: how they differ, and whether that may be chance."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rwkv_speech.decoding.results import Row, read_rows
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_text_atomically
from rwkv_speech.scoring.bootstrap import REPLICATIONS, Paired, paired
from rwkv_speech.scoring.measure import Measure, percent
from rwkv_speech.scoring.measures import by_task, measure
from rwkv_speech.tasks import base_of
from rwkv_speech.text import NORMALIZERS

_SHOWN = 5
_VALIDATION = "validation.jsonl"


@dataclass(frozen=True)
class Change:
    """An utterance in which two results have different errors: a number of words, else from 0 to 1."""

    id: str
    task: str
    ref: str
    a: str
    b: str
    error_a: float
    error_b: float

    @property
    def difference(self) -> float:
        """By how much B is worse."""
        return self.error_b - self.error_a


@dataclass(frozen=True)
class TaskComparison:
    """A task's measures of A and B, and how they differ."""

    a: Measure
    b: Measure
    paired: Paired
    num_utterances: int

    @property
    def difference(self) -> float:
        """B's main number less A's."""
        return (self.b.error - self.a.error) * (1 if self.a.is_error else -1)

    def summary(self) -> dict[str, Any]:
        """All numbers, for JSON: those of the interval are of B's error less A's."""
        interval = self.paired.difference
        return {
            "measure": self.a.name,
            "num_utterances": self.num_utterances,
            "a": self.a.numbers(),
            "b": self.b.numbers(),
            "difference": self.b.error - self.a.error,
            "ci95": interval.ci95,
            "ci95min": interval.ends[0],
            "ci95max": interval.ends[1],
            "resampled": interval.units,
            "units": interval.num_units,
            "replications": REPLICATIONS,
            "a_wins": self.paired.a_wins,
            "b_wins": self.paired.b_wins,
        }

    def lines(self) -> list[str]:
        """What eval.py prints."""
        a, b, interval = self.a, self.b, self.paired.difference
        return [
            f"{a.name} of A {a.shown(a.error)}, of B {b.shown(b.error)}; B - A {100 * self.difference:+.2f} ± "
            f"{100 * interval.ci95:.2f}{a.unit}",
            f"A is better in {percent(self.paired.a_wins)}, B in {percent(self.paired.b_wins)} of {REPLICATIONS:,} "
            f"bootstrap replications of {interval.num_units:,} {interval.units}",
        ]


@dataclass(frozen=True)
class Comparison:
    """Results A and B on the utterances that both have, in a form of text.NORMALIZERS.

    `alone` are the numbers of utterances that one of them has; `changes` the utterances that differ, those first in
    which B is worse.
    """

    files: tuple[Path, Path]
    form: str
    tasks: Mapping[str, TaskComparison]
    alone: tuple[int, int]
    changes: Sequence[Change]

    def summary(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "a": str(self.files[0]),
            "b": str(self.files[1]),
            "normalizer": self.form,
            "alone_a": self.alone[0],
            "alone_b": self.alone[1],
            "tasks": {task: found.summary() for task, found in self.tasks.items()},
        }

    def report(self) -> str:
        """What eval.py prints."""
        a, b = self.files
        lines = [f"A {a}\nB {b}"]
        if any(self.alone):
            lines.append(f"  left out: {self.alone[0]:,} that A alone has, {self.alone[1]:,} that B alone has")
        for task, found in self.tasks.items():
            lines.append(f"  {task}: {found.num_utterances:,} common utterances, normalizer {self.form}")
            lines += [f"  {line}" for line in found.lines()]
        worse = [change for change in self.changes if change.difference > 0]
        better = [change for change in reversed(self.changes) if change.difference < 0]
        lines.append(f"  B is better in {len(better):,} utterances, worse in {len(worse):,}")
        for head, changes in (("worse in B", worse), ("better in B", better)):
            for change in changes[:_SHOWN]:
                cost = self.tasks[change.task].a.cost(change.difference)
                lines.append(f"  {head}, {cost}: {change.id}")
                lines += [
                    f"      {name:<4} {text}" for name, text in (("said", change.ref), ("A", change.a), ("B", change.b))
                ]
        return "\n".join(lines)

    def write(self, folder: Path) -> list[Path]:
        """The numbers as JSON, the utterances that differ as JSON lines."""
        names = "\n".join(str(file.resolve()) for file in self.files)
        stem = f"compare-{hashlib.sha256(names.encode(errors='surrogateescape')).hexdigest()[:6]}"
        numbers, changes = folder / f"{stem}.json", folder / f"{stem}.jsonl"
        write_text_atomically(numbers, json.dumps(self.summary(), indent=2) + "\n")
        write_text_atomically(changes, "".join(json.dumps(asdict(change)) + "\n" for change in self.changes))
        return [numbers, changes]


def compare(a: str, b: str, form: str = NORMALIZERS[0], seed: int = 1) -> Comparison:
    """Compare two results, each a file of rows or the folder of a run that holds one.

    Raises UserError where one cannot be read, or where their utterances or references are not the same.
    """
    files = _result(a), _result(b)
    rows_a, rows_b = (_by_key(read_rows(file)) for file in files)
    common = [key for key in rows_a if key in rows_b]
    if not common:
        raise UserError(
            f"--compare: {files[0]} and {files[1]} have no utterance in common, expected results of the same data: "
            "score both on one data set"
        )
    for key in common:
        if rows_a[key].ref != rows_b[key].ref:
            raise UserError(
                f"--compare: {key[0]!r} has the reference {rows_a[key].ref!r:.200} in {files[0]}, but "
                f"{rows_b[key].ref!r:.200} in {files[1]}; expected results of the same data: score both on one data set"
            )
    tasks, changes = dict[str, TaskComparison](), list[Change]()
    for task, rows in by_task([rows_a[key] for key in common]).items():
        keys = [key for key in common if base_of(rows_a[key].task) == task]
        others = [replace(rows_a[key], hyp=rows_b[key].hyp) for key in keys]
        one, other = measure(task, rows, form), measure(task, others, form)
        speakers = [row.speaker for row in rows]
        tasks[task] = TaskComparison(one, other, paired(one.counts, other.counts, one.rates, speakers, seed), len(keys))
        changes += [
            Change(x.id, task, x.ref, x.hyp, y.hyp, float(error_a), float(error_b))
            for x, y, error_a, error_b in zip(rows, others, one.costs, other.costs, strict=True)
            if error_a != error_b
        ]
    return Comparison(
        files,
        form,
        tasks,
        (len(rows_a) - len(common), len(rows_b) - len(common)),
        sorted(changes, key=lambda change: (-change.difference, change.id)),
    )


def _by_key(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    """The rows by their ids, of which the same may come several times, and that number."""
    times: Counter[str] = Counter()
    found = {}
    for row in sorted(rows, key=lambda row: row.place):
        found[row.id, times[row.id]] = row
        times[row.id] += 1
    return found


def _result(name: str) -> Path:
    """A file of rows, or the one in a run's folder: of its evaluation, else of its validation."""
    path = Path(name)
    if path.is_file():
        return path
    found = sorted(path.glob("eval-*.jsonl")) or sorted(path.glob(_VALIDATION))
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found) or "none"
    raise UserError(
        f"--compare: found {names} in {name!r}, expected one result; score first, or name one file such as "
        "eval-best-test-1c9a04.jsonl"
    )
