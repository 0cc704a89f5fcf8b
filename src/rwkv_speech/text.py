"""Transcript normalisation: one for the labels that are learned, one for the words that are scored."""

import re
import unicodedata
from collections.abc import Iterable

from rwkv_speech.errors import UserError

LABEL_MODES = ("none", "lower")

# Typographic apostrophes that stand inside words: right and left quotes, the modifier letter, the prime.
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u2018\u02bc\u2032", "'"))

# A letter of a script that is written without blanks between words: Thai, Lao, Burmese, Khmer, Kana, Han.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def join_texts(texts: Iterable[str]) -> str:
    """One text of several, with a blank between two unless letters of a script without blanks meet there."""
    whole = ""
    for text in filter(None, map(str.strip, texts)):
        meet = whole and UNSPACED.match(whole[-1]) and UNSPACED.match(text[0])
        whole += text if meet or not whole else f" {text}"
    return whole


def normalise_label(text: str, mode: str = "none") -> str:
    """Make a training label: NFC and single spaces; mode "lower" also lowers the case.

    Raises UserError for a mode that is neither "none" nor "lower".
    """
    if mode not in LABEL_MODES:
        raise UserError(f"label mode {mode!r} is not known; expected one of: {', '.join(LABEL_MODES)}")
    if mode == "lower":
        text = text.lower()
    return " ".join(unicodedata.normalize("NFC", text).split())


def normalise_score(text: str) -> str:
    """Make the form in which words are compared: NFKC, casefolded, single spaces, no punctuation.

    Punctuation (Unicode categories P*) becomes a space, so "well-known" counts as two words on both sides; an
    apostrophe inside a word stays, whatever its typography. Invisible format characters go.
    """
    # Casefolding can undo a composition ("ΐ"), so the compatibility form is taken again after it.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = "".join(_score_character(character) for character in folded.translate(_APOSTROPHES))
    return " ".join(word for word in (raw.strip("'") for raw in kept.split()) if word)


def _score_character(character: str) -> str:
    if character == "'":
        return character
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    return " " if category.startswith("P") else character
