"""The result of an evaluation: its numbers with their interval, tables by group, what is printed and written."""

# U utterances

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
from rwkv_speech.scoring.metrics import Counts, Scores, Tally, tally_rows
from rwkv_speech.scoring.reliability import Reliability, reliability, right_words
from rwkv_speech.scoring.speed import Speed
from rwkv_speech.text import NORMALIZERS, normalizer

_DURATIONS = (2, 5, 10, 20, 30)  # s
_SHOWN = ("duration", "language", "task", "turn")  # on the screen; speakers may be hundreds


def duration_bin(seconds: float) -> str:
    """The name of the bin that a duration falls into."""
    place = bisect.bisect_right(_DURATIONS, seconds)
    if place == len(_DURATIONS):
        return f"{_DURATIONS[-1]} s and more"
    return f"{(0, *_DURATIONS)[place]} to {_DURATIONS[place]} s"


GROUPS: dict[str, Callable[[Row], str | None]] = {
    "duration": lambda row: duration_bin(row.seconds),
    "language": lambda row: row.lang,
    "speaker": lambda row: row.speaker,
    "task": lambda row: row.task,
    "turn": lambda row: None if row.turn is None else str(row.turn),
}


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
    def tally(self) -> Tally:
        """What was counted for each row."""
        return tally_rows(self.rows, self.form)

    @cached_property
    def scores(self) -> Scores:
        """Of the whole set."""
        return self.tally.scores()

    @cached_property
    def interval(self) -> Interval:
        """The WER's, by speakers where all are known."""
        return interval(self.tally.edits, self.tally.ref_words, [row.speaker for row in self.rows], self.seed)

    @cached_property
    def ctc(self) -> Counts | None:
        """The words of the CTC head alone, where every row has its text."""
        normalise, texts = normalizer(self.form), [row.ctc for row in self.rows]
        known = [normalise(text) for text in texts if text is not None]
        if len(known) < len(texts):
            return None
        return Tally.of([normalise(row.ref) for row in self.rows], known).scores().words

    @cached_property
    def reliability(self) -> Reliability | None:
        """How far the probabilities of words can be trusted, where every row has its words, and there are any."""
        judged = list[tuple[float, bool]]()
        for row in self.rows:
            if row.words is None:
                return None
            right = right_words([word for word, _ in row.words], row.ref)
            judged += [(p, is_right) for (_, p), is_right in zip(row.words, right, strict=True) if is_right is not None]
        return reliability(*zip(*judged, strict=True)) if judged else None

    @cached_property
    def tables(self) -> dict[str, dict[str, Scores]]:
        """The scores of each group of utterances, by what the groups are told apart; only where there are several."""
        found = {}
        for name, group_of in GROUPS.items():
            groups = [group_of(row) for row in self.rows]
            names = sorted({group for group in groups if group is not None}, key=_in_order)
            if len(names) > 1:
                places = np.array(groups, dtype=object)
                found[name] = {group: self.tally.where(places == group).scores() for group in names}
        return found

    def summary(self) -> dict[str, Any]:
        """All numbers, for JSON; a rate is null where the references have no word. Times are under "speed" alone."""
        scores = self.scores
        return {
            "data": self.name,
            "normalizer": self.form,
            **_numbers(scores),
            "interval": {
                "ci95": self.interval.ci95,
                "ci95min": self.interval.ends[0],
                "ci95max": self.interval.ends[1],
                "resampled": self.interval.units,
                "units": self.interval.num_units,
                "replications": REPLICATIONS,
                "seed": self.seed,
            },
            "mean_utterance_wer": scores.mean_utterance_wer,
            "ctc": {"wer": _rate(self.ctc), **asdict(self.ctc)} if self.ctc else None,
            "confidence": asdict(self.reliability) if self.reliability else None,
            "cut_off": sum(row.cut for row in self.rows),
            "by": {name: {group: _numbers(x) for group, x in table.items()} for name, table in self.tables.items()},
            "speed": self.speed.summary(),
        }

    def report(self) -> str:
        """What eval.py prints."""
        s, hours = self.scores, self.speed.audio_seconds / 3600
        lines = [
            f"{self.name}: {s.num_utterances:,} utterances, {s.words.ref_length:,} words, {hours:.3f} h, normalizer "
            f"{self.form}"
        ]
        if s.words.ref_length:
            lines += [
                f"  WER {percent(s.wer)} ± {percent(self.interval.ci95)}   {_counted(s.words)}",
                f"  CER {percent(s.cer)}   {_counted(s.characters)}",
                f"  ± is the 95 % interval of {REPLICATIONS:,} bootstrap replications of {self.interval.num_units:,} "
                f"{self.interval.units}",
                f"  mean of per-utterance WER {percent(s.mean_utterance_wer)}   (to compare with older reports)",
            ]
        else:
            lines.append(f"  WER is not defined: the references have no words; {s.words.insertions:,} were recognised")
        if self.ctc:
            lines.append(f"  WER of the CTC head alone {percent(self.ctc.rate)}   {_counted(self.ctc)}")
        if self.reliability:
            lines.append(f"  confidence of words: {self.reliability.report()}")
        for name in (name for name in _SHOWN if name in self.tables):
            rates = ", ".join(f"{group} {percent(x.wer)}" for group, x in self.tables[name].items())
            lines.append(f"  WER by {name}: {rates}")
        lines.append(f"  {self.speed.report()}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def write(self, folder: Path, stem: str) -> list[Path]:
        """Texts as `stem`.jsonl, numbers as `stem`.json."""
        texts, numbers = folder / f"{stem}.jsonl", folder / f"{stem}.json"
        write_rows(texts, self.rows)
        write_text_atomically(numbers, json.dumps(self.summary(), ensure_ascii=False, indent=2) + "\n")
        return [texts, numbers]


def percent(fraction: float) -> str:
    """A rate as people are shown it."""
    return f"{100 * fraction:.2f} %"


def _in_order(name: str) -> tuple[int, str]:
    """Bins of durations by their seconds, other names by the alphabet."""
    first = name.split()[0] if name else ""
    return (int(first) if first.isdecimal() and len(first) < 9 else 0, name)


def _numbers(scores: Scores) -> dict[str, Any]:
    return {
        "wer": _rate(scores.words),
        "cer": _rate(scores.characters),
        "num_utterances": scores.num_utterances,
        "words": {**asdict(scores.words), "ref_length": scores.words.ref_length},
        "characters": {**asdict(scores.characters), "ref_length": scores.characters.ref_length},
    }


def _rate(counts: Counts) -> float | None:
    return counts.rate if counts.ref_length else None


def _counted(counts: Counts) -> str:
    return f"(substitutions {counts.substitutions:,}, insertions {counts.insertions:,}, deletions {counts.deletions:,})"
