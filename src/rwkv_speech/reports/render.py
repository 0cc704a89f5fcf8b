"""What the pages of a run and of an evaluation have in common: how they are rendered, and which errors they list."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.error_rates import ErrorRates
from rwkv_speech.scoring.errors import Utterance, most_frequent
from rwkv_speech.scoring.measure import Measure
from rwkv_speech.tasks import base_of

_WORST = 25
_MOST_FREQUENT = 15
_MOST_WORDS = 80  # of an utterance: a hypothesis that repeats itself fills no page
_MOST_LETTERS = 120  # of a word, which is a whole sentence where no blanks are written

# What no page may hold: control characters and halves of surrogate pairs.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def cleaned(text: str) -> str:
    """Text that a page may hold."""
    return _NO_TEXT.sub("\ufffd", text)


def render(template: str, content: dict[str, Any]) -> str:
    """A page of a template in this folder; everything in it that is not Markup is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def finalized(value: object) -> object:
        return value if isinstance(value, Markup) else cleaned(str(value))

    page = Environment(
        loader=PackageLoader("rwkv_speech.reports", ""),
        autoescape=True,
        finalize=finalized,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = files("rwkv_speech.reports").joinpath("report.css").read_text(encoding="utf-8")
    page.filters["percent"] = lambda fraction, digits=2: f"{100 * fraction:.{digits}f} %"
    page.filters["word"] = _word
    return page.get_template(template).render(style=Markup(style), most_words=_MOST_WORDS, **content)


def _word(word: str) -> str:
    if len(word) > _MOST_LETTERS:
        word = f"{word[:_MOST_LETTERS]}…"
    return word or "·"


def worst(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Those with the largest error."""
    return sorted((u for u in utterances if u.error), key=in_order_of_errors)[:_WORST]


def in_order_of_errors(utterance: Utterance) -> tuple[float, int, str]:
    """A key that sorts the worst utterances first."""
    return -utterance.error, -utterance.edits, utterance.name


def transcripts(
    rows: Sequence[Row], utterances: Sequence[Utterance], measures: Mapping[str, Measure]
) -> list[Utterance]:
    """The utterances whose words are scored."""
    return [x for row, x in zip(rows, utterances, strict=True) if isinstance(measures[base_of(row.task)], ErrorRates)]


def frequent(utterances: Sequence[Utterance]) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str | int, ...]]]]:
    """The commonest errors of each kind: a title, the names of the columns, the rows."""
    kinds = (
        ("sub", "Substitutions", ("said", "recognised")),
        ("ins", "Insertions", ("word",)),
        ("del", "Deletions", ("word",)),
    )
    for kind, title, head in kinds:
        if found := most_frequent(utterances, kind, _MOST_FREQUENT):
            yield title, (*head, "times"), [(*(_word(word) for word in pair if word), times) for *pair, times in found]
