"""A list of phrases that decoding is to expect, from a file or from Python."""

import math
from pathlib import Path

from rwkv_speech.config import DecodeFlags
from rwkv_speech.errors import UserError
from rwkv_speech.text import normalise_label

_LONGEST = 200  # characters of a phrase
_HEAVIEST = 20.0


def read_phrases(flags: DecodeFlags) -> dict[str, float]:
    """The phrases of --keywords with their weights; those without one have --keyword_weight.

    Raises UserError naming file and line for what is no phrase or weight.
    """
    if isinstance(flags.keywords, str):
        lines, place = _lines(Path(flags.keywords)) if flags.keywords else [], flags.keywords
    else:
        lines, place = list(flags.keywords), "keywords"
    found: dict[str, float] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            phrase, weight = _phrase(line, flags.keyword_weight)
            if found.setdefault(phrase, weight) != weight:
                raise ValueError(f"a second weight of {phrase!r}, expected one; delete the other line")
        except ValueError as error:
            raise UserError(f"{place}, line {number}: found {error}") from error
    if flags.keywords and not found:
        raise UserError(f"{place}: found no phrase, expected one a line; leave --keywords out for none")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"--keywords: {path}: {error.strerror}; expected a text file of one phrase a line") from error
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {number}: found bytes that are not UTF-8; save the file as UTF-8") from error


def _phrase(line: str, default: float) -> tuple[str, float]:
    text, tab, number = line.partition("\t")
    phrase, weight = normalise_label(text), default
    if not any(character.isalnum() for character in phrase):
        raise ValueError(f"{line[:80]!r}, expected a phrase of letters or digits")
    if len(phrase) > _LONGEST:
        raise ValueError(f"{len(phrase)} characters, expected a phrase of at most {_LONGEST}")
    if tab:
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not 0 < weight <= _HEAVIEST:
            raise ValueError(f"{number[:80]!r} behind the tab, expected a weight above 0 and at most {_HEAVIEST:g}")
    return phrase, weight
