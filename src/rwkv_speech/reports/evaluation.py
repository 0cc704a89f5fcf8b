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
from rwkv_speech.reports.render import cleaned, frequent, in_order_of_errors, render, worst
from rwkv_speech.scoring.errors import Utterance, align
from rwkv_speech.scoring.metrics import Counts, Scores
from rwkv_speech.scoring.result import GROUPS, Evaluation, percent
from rwkv_speech.text import normalizer

# How words that are not equal are marked in the page's data; evaluation.js reads them.
_SUB, _INS, _DEL = "\x01", "\x02", "\x03"
_MOST_GROUPS = 1000
_MOST_OPEN = 12
_WER_BINS = (0, 5, 10, 20, 30, 50, 75, 100)  # %


def write_evaluation(result: Evaluation, path: Path, weights: str) -> Path:
    """Write the page of a result, made with these `weights`, and return its path.

    Raises ModuleNotFoundError where the packages that draw it are missing.
    """
    from markupsafe import Markup

    utterances = align(result.rows, result.form)
    script = files("rwkv_speech.reports").joinpath("evaluation.js").read_text(encoding="utf-8")
    content = {
        "name": result.name,
        "weights": f"weights {weights}",
        "form": result.form,
        "scores": result.scores,
        "interval": result.interval,
        "speed": result.speed.report(),
        "numbers": list(_numbers(result)),
        "charts": list(_charts(result)),
        "tables": list(_tables(result)),
        "worst": worst(utterances),
        "frequent": list(frequent(utterances)),
        "data": _packed(_data(result, utterances, path.parent)),
        "script": Markup(script),
        # The page's one script is known by its content: no other runs, whatever a transcript holds.
        "script_hash": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    }
    write_text_atomically(path, render("evaluation.html.jinja", content))
    return path


def _numbers(result: Evaluation) -> Iterator[tuple[str, ...]]:
    counted = [("words", result.scores.words), ("characters", result.scores.characters)]
    if result.ctc:
        counted.append(("words, CTC head alone", result.ctc))
    for name, x in counted:
        rate = percent(x.rate) if x.ref_length else "-"
        yield name, rate, *(f"{n:,}" for n in (x.hits, x.substitutions, x.insertions, x.deletions, x.ref_length))


def _tables(result: Evaluation) -> Iterator[tuple[str, bool, list[tuple[str, ...]]]]:
    """Title, whether it is open at first, and rows; those of many groups have the worst first."""
    for name, table in result.tables.items():
        groups, title, is_short = list(table.items()), f"By {name}", len(table) <= _MOST_OPEN
        if not is_short:
            groups = sorted(groups, key=lambda item: -item[1].wer)[:_MOST_GROUPS]
            title += f": {len(table):,}, the worst first"
        yield title, is_short, [(group, *_row(scores)) for group, scores in groups]


def _row(scores: Scores) -> Iterator[str]:
    words: Counts = scores.words
    yield from (f"{scores.num_utterances:,}", f"{words.ref_length:,}", percent(scores.wer))
    yield from (f"{n:,}" for n in (words.substitutions, words.insertions, words.deletions))
    yield percent(scores.cer)


def _charts(result: Evaluation) -> Iterator[tuple[str, str]]:
    from rwkv_speech.reports.charts import bar_chart

    if "duration" in result.tables:
        title = "WER by duration"
        rates = {group: 100 * scores.wer for group, scores in result.tables["duration"].items()}
        yield title, bar_chart(title, "duration", "WER, %", rates)
    if result.reliability:
        title = "Right words by their probability"
        shares = {f"{x.confidence:.2f}": 100 * x.right for x in result.reliability.bins if x.words}
        yield title, bar_chart(title, "mean probability", "right words, %", shares)
    title = "Utterances by their WER"
    wers = 100 * result.tally.edits / np.maximum(1, result.tally.ref_words)
    places = np.searchsorted(_WER_BINS, wers, side="left")
    names = ["0", *(f"≤ {end}" for end in _WER_BINS[1:]), f"> {_WER_BINS[-1]}"]
    counts = np.bincount(places, minlength=len(names))
    yield title, bar_chart(title, "WER, %", "utterances", dict(zip(names, counts.tolist(), strict=True)))


def _data(result: Evaluation, utterances: Sequence[Utterance], folder: Path) -> dict[str, Any]:
    """The utterances as columns, the worst first, which is what evaluation.js reads."""
    pairs = sorted(zip(result.rows, utterances, strict=True), key=lambda pair: in_order_of_errors(pair[1]))
    rows, aligned = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    normalise = normalizer(result.form)
    data: dict[str, Any] = {
        "id": [cleaned(row.id) for row in rows],
        "index": [row.index for row in rows],
        "seconds": [round(row.seconds, 2) for row in rows],
        "edits": [utterance.edits for utterance in aligned],
        "refs": [utterance.ref_length for utterance in aligned],
        "words": [" ".join(map(_marked, utterance.words)) for utterance in aligned],
        "audio": [_link(row, folder) for row in rows],
        "offset": [round(row.offset, 3) for row in rows],
        "ctc": [cleaned(normalise(row.ctc or "")) for row in rows] if result.ctc else None,
    }
    for name, table in result.tables.items():
        numbers = {group: number for number, group in enumerate(table)}
        groups = [GROUPS[name](row) for row in rows]
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
