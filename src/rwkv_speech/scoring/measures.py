"""Which measure a task has, and the tasks of a data set."""

from collections.abc import Callable, Mapping, Sequence

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.answers import Answers
from rwkv_speech.scoring.classes import Classes
from rwkv_speech.scoring.error_rates import ErrorRates
from rwkv_speech.scoring.measure import Measure, percent
from rwkv_speech.scoring.translation import Translation
from rwkv_speech.tasks import base_of, task_named
from rwkv_speech.text import NORMALIZERS

_MEASURES: dict[str, Callable[[Sequence[Row], str], Measure]] = {
    "wer": ErrorRates.of,
    "bleu": Translation.of,
    "answer": Answers.of,
    "accuracy": Classes.of,
}


def by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each task, those of a task's languages together, in the order in which tasks first come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(base_of(row.task), []).append(row)
    return found


def measure(task: str, rows: Sequence[Row], form: str = NORMALIZERS[0]) -> Measure:
    """What a task's rows are measured by; `form` of text.NORMALIZERS is that of word errors."""
    return _MEASURES[task_named(task).measure](rows, form)


def measures(rows: Sequence[Row], form: str = NORMALIZERS[0]) -> dict[str, Measure]:
    """Of each task of the rows."""
    return {task: measure(task, found, form) for task, found in by_task(rows).items()}


def mean_error(found: Mapping[str, Measure]) -> float:
    """The mean of the tasks' errors: WER, 1 - chrF, 1 - F1, 1 - accuracy."""
    return sum(x.error for x in found.values()) / len(found)


def said(found: Mapping[str, Measure]) -> str:
    """The main numbers in a line: of one task its own, of several the mean of their errors, too."""
    if len(found) == 1:
        return next(iter(found.values())).report()
    return f"mean error {percent(mean_error(found))} ({', '.join(f'{task} {x.report()}' for task, x in found.items())})"
