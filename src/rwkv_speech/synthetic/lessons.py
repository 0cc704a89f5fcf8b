"""Lessons: what a small language model is pretrained to do with what it reads or "hears"."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from rwkv_speech.synthetic.phones import LANGUAGES
from rwkv_speech.synthetic.texts import Lines

SEPARATOR = "#"  # between what is said and the text
NAMES = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian"}


@dataclass(frozen=True)
class Turn:
    """What is said in a language, as phones if it is `heard`, else as text; and the text that follows."""

    said: str
    lang: str
    text: str
    heard: bool = True


@dataclass(frozen=True)
class Lesson:
    """An instruction, which may be empty, and the turns under it; plain text is one turn in which nothing is said."""

    instruction: str
    turns: tuple[Turn, ...]


class Lessons(Protocol):
    """A source of lessons."""

    def draw(self, rng: random.Random, held_out: bool = False) -> Lesson:
        """One lesson; of what is held out it is for scoring alone."""
        ...

    def texts(self) -> Iterator[str]:
        """The texts that a vocabulary is made for, the frequent ones more often."""
        ...


class TextLessons:
    """Lessons of real text: plain text, and its lines heard or read and written in their language or in another.

    The instruction "LANG: " names the language to write; a line may be written in its own without one. "lang: " asks
    for the name of its language.
    """

    def __init__(self, texts: Sequence[Lines]) -> None:
        self._kept, self._held = [lines.kept() for lines in texts], [lines.held_out() for lines in texts]

    def draw(self, rng: random.Random, held_out: bool = False) -> Lesson:
        """One lesson; of the held-out lines it is for scoring alone."""
        lines, row = _draw_row(self._held if held_out else self._kept, rng)
        there = [(lang, text) for lang, text in zip(lines.langs, row, strict=True) if text]
        lang, said = rng.choice(there)
        kind = rng.random()
        if kind < 0.1 or lang not in LANGUAGES:
            return Lesson("", (Turn("", lang, self._more(lines, lang, said, rng)),))
        others = [pair for pair in there if pair[0] != lang]
        if kind < 0.28 and others:
            target, text = rng.choice(others)
            return Lesson(f"{target}: ", (Turn(said, lang, text, heard=kind < 0.19),))
        if kind < 0.3:
            return Lesson("lang: ", (Turn(said, lang, NAMES[lang]),))
        return Lesson(rng.choice(["", f"{lang}: "]), (Turn(said, lang, said),))

    def texts(self) -> Iterator[str]:
        """All lines that are trained on, those of a larger weight several times."""
        for lines in self._kept:
            for row in lines.rows:
                for text in filter(None, row):
                    for _ in range(max(1, round(lines.weight))):
                        yield text
                        yield f" {text}"

    def _more(self, lines: Lines, lang: str, said: str, rng: random.Random) -> str:
        """A line and some that follow it."""
        column = lines.langs.index(lang)
        start = rng.randrange(len(lines.rows))
        following = [row[column] for row in lines.rows[start : start + rng.randint(0, 4)]]
        return " ".join(filter(None, [said, *following]))[:400]


class MixedLessons:
    """Lessons of several sources, each so often."""

    def __init__(self, sources: Sequence[tuple[Lessons, float]]) -> None:
        self._sources, self._shares = [source for source, _ in sources], [share for _, share in sources]

    def draw(self, rng: random.Random, held_out: bool = False) -> Lesson:
        """One lesson of a source that is drawn first."""
        (source,) = rng.choices(self._sources, self._shares)
        return source.draw(rng, held_out)

    def texts(self) -> Iterator[str]:
        """The texts of all sources."""
        for source in self._sources:
            yield from source.texts()


def _draw_row(texts: Sequence[Lines], rng: random.Random) -> tuple[Lines, tuple[str, ...]]:
    """A row of one of the texts, which is drawn by its number of rows and its weight."""
    (lines,) = rng.choices(texts, cum_weights=list(accumulate(len(lines.rows) * lines.weight for lines in texts)))
    return lines, rng.choice(lines.rows)
