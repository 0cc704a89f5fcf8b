"""The result of an evaluation: each task's numbers, their interval, tables by group; what is printed and written."""

import bisect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_speech.decoding.results import Row, write_rows
from rwkv_speech.files import write_text_atomically
from rwkv_speech.scoring.bootstrap import REPLICATIONS, Interval, interval
from rwkv_speech.scoring.error_rates import ErrorRates, edits
from rwkv_speech.scoring.measure import Measure, percent
from rwkv_speech.scoring.measures import by_task, measure
from rwkv_speech.scoring.metrics import Counts, Tally
from rwkv_speech.scoring.reliability import Reliability, reliability, right_words
from rwkv_speech.scoring.speed import Speed
from rwkv_speech.scoring.translation import direction
from rwkv_speech.text import NORMALIZERS, normalise_score, normalizer

_DURATIONS = (2, 5, 10, 20, 30)  # s
_SHOWN = ("direction", "duration", "language", "task", "turn")  # on the screen; speakers may be hundreds


def duration_bin(seconds: float) -> str:
    """The name of the bin that a duration falls into."""
    place = bisect.bisect_right(_DURATIONS, seconds)
    if place == len(_DURATIONS):
        return f"{_DURATIONS[-1]} s and more"
    return f"{(0, *_DURATIONS)[place]} to {_DURATIONS[place]} s"


GROUPS: dict[str, Callable[[Row], str | None]] = {
    "direction": lambda row: direction(row) if row.source_lang else None,
    "duration": lambda row: duration_bin(row.seconds),
    "language": lambda row: row.lang,
    "speaker": lambda row: row.speaker,
    "task": lambda row: row.task,
    "turn": lambda row: None if row.turn is None else str(row.turn),
}


@dataclass(frozen=True)
class TaskResult:
    """A task's rows in the set's order, and what they are measured by."""

    task: str
    rows: Sequence[Row]
    form: str = NORMALIZERS[0]
    seed: int = 1

    @cached_property
    def measure(self) -> Measure:
        """Of all rows."""
        return measure(self.task, self.rows, self.form)

    @cached_property
    def interval(self) -> Interval:
        """The error's, by speakers where all are known."""
        return interval(self.measure.counts, self.measure.rates, [row.speaker for row in self.rows], self.seed)

    @cached_property
    def ctc(self) -> Counts | None:
        """The words of the CTC head alone, where a transcript is asked for and every row has its text."""
        asked = isinstance(self.measure, ErrorRates)
        return self._words([(row.ref, row.ctc) for row in self.rows]) if asked else None

    @cached_property
    def heard(self) -> Counts | None:
        """The words that were written down before the answer, where every row has them and what was really said."""
        return self._words([(row.source_text, row.heard) for row in self.rows])

    def _words(self, pairs: Sequence[tuple[str | None, str | None]]) -> Counts | None:
        """The word errors of references and texts, where all are known."""
        normalise = normalizer(self.form)
        known = [(normalise(ref), normalise(text)) for ref, text in pairs if ref is not None and text is not None]
        if len(known) < len(pairs):
            return None
        refs, texts = map(list, zip(*known, strict=True))
        return Tally.of(refs, texts).scores().words

    @property
    def languages(self) -> tuple[int, int] | None:
        """In how many utterances the right language was found, and in how many of those of known language."""
        known = [row for row in self.rows if row.found_lang is not None and row.lang is not None]
        right = sum(normalise_score(row.found_lang or "") == normalise_score(row.lang or "") for row in known)
        return (right, len(known)) if known else None

    @cached_property
    def reliability(self) -> Reliability | None:
        """How far the probabilities of a transcript's words can be trusted, where every row has its words."""
        judged = list[tuple[float, bool]]()
        if not isinstance(self.measure, ErrorRates):
            return None
        for row in self.rows:
            if row.words is None:
                return None
            right = right_words([word for word, _ in row.words], row.ref)
            judged += [(p, is_right) for (_, p), is_right in zip(row.words, right, strict=True) if is_right is not None]
        return reliability(*zip(*judged, strict=True)) if judged else None

    @cached_property
    def tables(self) -> dict[str, dict[str, tuple[int, Measure]]]:
        """How many utterances each group has, and their measure, by what groups are told apart; of several only."""
        found = {}
        for name, group_of in GROUPS.items():
            groups = [group_of(row) for row in self.rows]
            if len(names := ordered(groups)) > 1:
                places = np.array(groups, dtype=object)
                masks = {group: places == group for group in names}
                found[name] = {group: (int(mask.sum()), self.measure.part(mask)) for group, mask in masks.items()}
        return found

    def summary(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        low, high = self.interval.ends
        return {
            "num_utterances": len(self.rows),
            "error": self.measure.error,
            **self.measure.numbers(),
            "interval": {
                "of": self.measure.name if self.measure.is_error else f"1 - {self.measure.name}",
                "ci95": self.interval.ci95,
                "ci95min": low,
                "ci95max": high,
                "resampled": self.interval.units,
                "units": self.interval.num_units,
                "replications": REPLICATIONS,
                "seed": self.seed,
            },
            "ctc": _rate(self.ctc),
            "heard": _rate(self.heard),
            "language_accuracy": self.languages[0] / self.languages[1] if self.languages else None,
            "confidence": asdict(self.reliability) if self.reliability else None,
            "cut_off": sum(row.cut for row in self.rows),
            "by": {
                name: {group: {"num_utterances": count, **found.numbers()} for group, (count, found) in table.items()}
                for name, table in self.tables.items()
            },
        }

    def heading(self) -> str:
        """How much there is of it."""
        found = self.measure
        if not isinstance(found, ErrorRates):
            return f"{len(self.rows):,} utterances"
        return f"{len(self.rows):,} utterances, {found.scores.words.ref_length:,} words, normalizer {self.form}"

    def lines(self) -> list[str]:
        """What eval.py prints."""
        lines = self.measure.lines(self.interval)
        if self.measure.defined:
            lines.append(
                f"± is the 95 % interval of {REPLICATIONS:,} bootstrap replications of {self.interval.num_units:,} "
                f"{self.interval.units}"
            )
        if self.ctc:
            lines.append(f"WER of the CTC head alone {percent(self.ctc.rate)}   {edits(self.ctc)}")
        if self.heard:
            lines.append(f"WER of what was written down as heard {percent(self.heard.rate)}   {edits(self.heard)}")
        if self.languages:
            right, known = self.languages
            lines.append(f"language found: accuracy {percent(right / known)} of {known:,} utterances")
        if self.reliability:
            lines.append(f"confidence of words: {self.reliability.report()}")
        for name in (name for name in _SHOWN if name in self.tables):
            shown = ", ".join(f"{group} {found.shown(found.error)}" for group, (_, found) in self.tables[name].items())
            lines.append(f"{self.measure.name} by {name}: {shown}")
        return lines


def _rate(words: Counts | None) -> dict[str, Any] | None:
    return {"wer": words.rate if words.ref_length else None, **asdict(words)} if words else None


@dataclass(frozen=True)
class Evaluation:
    """A data set's rows in its order, scored in a form of text.NORMALIZERS; notes for the screen."""

    name: str
    rows: Sequence[Row]
    speed: Speed
    notes: Sequence[str] = ()
    form: str = NORMALIZERS[0]
    seed: int = 1

    @cached_property
    def tasks(self) -> dict[str, TaskResult]:
        """Each task's, those of its languages together."""
        return {task: TaskResult(task, rows, self.form, self.seed) for task, rows in by_task(self.rows).items()}

    def summary(self) -> dict[str, Any]:
        """All numbers, for JSON. Times are under "speed" alone."""
        return {
            "data": self.name,
            "normalizer": self.form,
            "num_utterances": len(self.rows),
            "tasks": {task: found.summary() for task, found in self.tasks.items()},
            "speed": self.speed.summary(),
        }

    def report(self) -> str:
        """What eval.py prints."""
        hours = f"{self.speed.audio_seconds / 3600:.3f} h"
        if len(self.tasks) == 1:
            ((task, only),) = self.tasks.items()
            named = "" if task == "asr" else f"{task}, "
            lines = [f"{self.name}: {named}{only.heading()}, {hours}", *(f"  {line}" for line in only.lines())]
        else:
            lines = [f"{self.name}: {len(self.rows):,} utterances of {len(self.tasks)} tasks, {hours}"]
            for task, found in self.tasks.items():
                lines += [f"  {task}: {found.heading()}", *(f"    {line}" for line in found.lines())]
        return "\n".join([*lines, f"  {self.speed.report()}", *(f"  note: {note}" for note in self.notes)])

    def write(self, folder: Path, stem: str) -> list[Path]:
        """Texts as `stem`.jsonl, numbers as `stem`.json."""
        texts, numbers = folder / f"{stem}.jsonl", folder / f"{stem}.json"
        write_rows(texts, self.rows)
        write_text_atomically(numbers, json.dumps(self.summary(), ensure_ascii=False, indent=2) + "\n")
        return [texts, numbers]


def ordered(groups: Sequence[str | None]) -> list[str]:
    """The names of groups once each: bins of durations by their seconds, others by the alphabet."""

    def key(name: str) -> tuple[int, str]:
        first = name.split()[0] if name else ""
        return (int(first) if first.isdecimal() and len(first) < 9 else 0, name)

    return sorted({group for group in groups if group is not None}, key=key)
