"""Two results on the same utterances: how they differ, and whether that may be chance."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv_speech.decoding.results import Row, read_rows
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_text_atomically
from rwkv_speech.scoring.bootstrap import REPLICATIONS, Paired, paired
from rwkv_speech.scoring.metrics import Scores, tally_rows
from rwkv_speech.scoring.result import percent
from rwkv_speech.text import NORMALIZERS

_SHOWN = 5
_VALIDATION = "validation.jsonl"


@dataclass(frozen=True)
class Change:
    """An utterance in which two results have different numbers of wrong words."""

    id: str
    ref: str
    a: str
    b: str
    edits_a: int
    edits_b: int

    @property
    def difference(self) -> int:
        """By how many wrong words B is worse."""
        return self.edits_b - self.edits_a


@dataclass(frozen=True)
class Comparison:
    """Results A and B on the utterances that both have, in a form of text.NORMALIZERS.

    `alone` are the numbers of utterances that one of them has; `changes` the utterances that differ, those first in
    which B is worse.
    """

    files: tuple[Path, Path]
    form: str
    a: Scores
    b: Scores
    paired: Paired
    alone: tuple[int, int]
    changes: Sequence[Change]

    def summary(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        difference = self.paired.difference
        return {
            "a": str(self.files[0]),
            "b": str(self.files[1]),
            "normalizer": self.form,
            "num_utterances": self.a.num_utterances,
            "alone_a": self.alone[0],
            "alone_b": self.alone[1],
            "wer_a": self.a.wer,
            "wer_b": self.b.wer,
            "difference": self.b.wer - self.a.wer,
            "ci95": difference.ci95,
            "ci95min": difference.ends[0],
            "ci95max": difference.ends[1],
            "resampled": difference.units,
            "units": difference.num_units,
            "replications": REPLICATIONS,
            "a_wins": self.paired.a_wins,
            "b_wins": self.paired.b_wins,
        }

    def report(self) -> str:
        """What eval.py prints."""
        difference, (a, b) = self.paired.difference, self.files
        worse = [change for change in self.changes if change.difference > 0]
        better = [change for change in reversed(self.changes) if change.difference < 0]
        lines = [
            f"A {a}\nB {b}",
            f"  {self.a.num_utterances:,} common utterances, {self.a.words.ref_length:,} words, normalizer {self.form}",
            f"  WER of A {percent(self.a.wer)}, of B {percent(self.b.wer)}; "
            f"B - A {100 * (self.b.wer - self.a.wer):+.2f} ± {percent(difference.ci95)}",
            f"  A is better in {percent(self.paired.a_wins)}, B in {percent(self.paired.b_wins)} of {REPLICATIONS:,} "
            f"bootstrap replications of {difference.num_units:,} {difference.units}",
            f"  B is better in {len(better):,} utterances, worse in {len(worse):,}",
        ]
        if any(self.alone):
            lines.insert(2, f"  left out: {self.alone[0]:,} that A alone has, {self.alone[1]:,} that B alone has")
        for head, changes in (("worse in B", worse), ("better in B", better)):
            for change in changes[:_SHOWN]:
                lines.append(f"  {head}, {change.difference:+d} words: {change.id}")
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
    pairs = [(rows_a[key], rows_b[key]) for key in common]
    tally_a, tally_b = tally_rows([pair[0] for pair in pairs], form), tally_rows([pair[1] for pair in pairs], form)
    speakers = [pair[0].speaker for pair in pairs]
    changes = [
        Change(x.id, x.ref, x.hyp, y.hyp, int(edits_a), int(edits_b))
        for (x, y), edits_a, edits_b in zip(pairs, tally_a.edits, tally_b.edits, strict=True)
        if edits_a != edits_b
    ]
    return Comparison(
        files,
        form,
        tally_a.scores(),
        tally_b.scores(),
        paired(tally_a.edits, tally_b.edits, tally_a.ref_words, speakers, seed),
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
