"""What hearing is worth: a task done directly, beside reading what was recognised and reading what was really said.

direct       the states of the task hear
cascade      the state of recognition hears, then a text run's states of the task read its text
text alone   the text run reads the manifest's source_text: a ceiling
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rwkv_speech import tasks
from rwkv_speech.config import TEXT, EvalConfig
from rwkv_speech.decoding.results import Row, write_rows
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_text_atomically
from rwkv_speech.scoring.measure import Measure
from rwkv_speech.scoring.measures import measure, measures
from rwkv_speech.scoring.processes import Progress, decode_all
from rwkv_speech.scoring.result import Evaluation
from rwkv_speech.scoring.share import Role

DIRECT, CASCADE, TEXT_ALONE = "direct", "cascade", "text alone"


@dataclass(frozen=True)
class Cascade:
    """The measures of each way of each task, the cascade's rows, and how well was recognised, where that is known."""

    ways: Mapping[str, Mapping[str, Measure]]
    rows: Sequence[Row]
    recognised: Measure | None

    def report(self) -> str:
        """What eval.py prints: a table of each task."""
        lines = list[str]()
        for task, ways in self.ways.items():
            head = ways[DIRECT].head
            table = [(f"{task}:", *head), *((way, *x.cells()) for way, x in ways.items())]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            for first, *cells in table:
                shown = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
                lines.append("  ".join([f"  {first:<{widths[0]}}", *shown]))
            if TEXT_ALONE in ways and ways[TEXT_ALONE].error < 1:
                share = (1 - ways[DIRECT].error) / (1 - ways[TEXT_ALONE].error)
                lines.append(f"  direct is {share:.2f} of text alone by {ways[DIRECT].name}")
        if self.recognised:
            lines.append(f"  what the cascade reads: {self.recognised.report()}")
        return "\n".join(lines)

    def write(self, folder: Path, stem: str) -> list[Path]:
        """The cascade's texts as `stem`.jsonl, all numbers as `stem`.json."""
        texts, numbers = folder / f"{stem}.jsonl", folder / f"{stem}.json"
        found: dict[str, Any] = {
            "tasks": {task: {way: x.numbers() for way, x in ways.items()} for task, ways in self.ways.items()},
            "recognised": self.recognised.numbers() if self.recognised else None,
        }
        write_rows(texts, self.rows)
        write_text_atomically(numbers, json.dumps(found, ensure_ascii=False, indent=2) + "\n")
        return [texts, numbers]


def cascade(config: EvalConfig, direct: Evaluation) -> Cascade:
    """Both other ways of what a data set asks for besides transcripts, with the text run in --cascade.

    Raises UserError for a set of transcripts alone, and for weights without the states that it takes.
    """
    rows = [row for row in direct.rows if tasks.task_named(row.task).measure != "wer" and row.turn is None]
    if not rows:
        raise UserError(f"--cascade: {direct.name} asks for transcripts alone, expected translations, questions, ...")
    places = [row.index for row in rows]
    hearing = replace(config, eval_data=direct.name, task=tasks.DEFAULT, word_timestamps=0)
    heard = _decoded(hearing, Role(places, [tasks.DEFAULT] * len(rows)))
    reading = replace(hearing, task="", state="", proj_dir=config.cascade, checkpoint="", input=TEXT)
    names = [row.task for row in rows]
    texts = {CASCADE: [heard[place] for place in range(len(rows))]}
    if all(row.source_text for row in rows):
        texts[TEXT_ALONE] = [row.source_text or "" for row in rows]
    found = {DIRECT: rows}
    for way, read in texts.items():
        answers = _decoded(reading, Role(places, names, read))
        found[way] = [replace(row, hyp=answers[place], ctc=None) for place, row in enumerate(rows)]
    recognised = None
    if TEXT_ALONE in texts:
        said = [replace(row, task=tasks.DEFAULT, ref=row.source_text or "") for row in rows]
        pairs = [replace(row, hyp=text) for row, text in zip(said, texts[CASCADE], strict=True)]
        recognised = measure(tasks.DEFAULT, pairs, config.normalizer)
    scores = {way: measures(of, config.normalizer) for way, of in found.items()}
    ways = {task: {way: scores[way][task] for way in found} for task in scores[DIRECT]}
    return Cascade(ways, found[CASCADE], recognised)


def _decoded(config: EvalConfig, role: Role) -> dict[int, str]:
    """The text of each of the role's utterances, by its place; none of what could not be used."""
    return dict.fromkeys(range(len(role.places)), "") | {row.index: row.hyp for row in _rows(config, role)}


def _rows(config: EvalConfig, role: Role) -> Iterator[Row]:
    for message in decode_all(config, role):
        if not isinstance(message, Progress):
            yield from (row for part in message for row in part.rows)
