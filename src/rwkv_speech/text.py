"""Texts: normalised, one way for the labels that are learned, several for the words that are scored; and prompts."""

import json
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from importlib.resources import files

import regex

from rwkv_speech.errors import UserError

# How a language model is asked by text. "user" and "instruction" are what the World models are used to.
PROMPT_FORMS = {
    "user": "User: {text}\n\nAssistant:",
    "instruction": "Instruction: Answer the question.\n\nInput: {text}\n\nResponse:",
    "continue": "{text}",
}
LABEL_MODES = ("none", "lower")

# Typographic apostrophes that stand inside words: right and left quotes, the modifier letter, the prime.
_APOSTROPHES = dict.fromkeys(map(ord, "\u2019\u2018\u02bc\u2032"), "'")
# A character with its marks, of the scripts that are written without blanks between words.
UNSPACED = regex.compile(r"(?=[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Lao}\p{scx=Mymr}\p{scx=Khmr}])\X")


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


def as_prompt(form: str, text: str, before: str = "") -> str:
    """The prompt for a text, and what stands `before` it, by a name of PROMPT_FORMS or a template that holds {text}.

    An empty line would end the turn: within the text it becomes a line break. No blank stands at the end: the
    vocabulary's words begin with theirs.
    """
    whole = regex.sub(r"\s*\n\s*", "\n", "\n".join(filter(None, (before.strip(), text.strip()))))
    template = PROMPT_FORMS.get(form, form.replace("\\n", "\n"))
    return template.replace("{text}", whole).rstrip(" ")


def as_continuation(form: str, answer: str) -> str:
    """An answer as it follows the prompt of this form: with a blank after a colon, and between words of the text."""
    template = PROMPT_FORMS.get(form, form).rstrip(" ")
    between_words = template.endswith("{text}") and answer[:1].isalnum() and not UNSPACED.match(answer)
    return f" {answer}" if answer and (between_words or template.endswith(":")) else answer


def normalise_score(text: str) -> str:
    """Make the form in which words are compared: NFKC, casefolded, single spaces, no punctuation.

    Punctuation (Unicode categories P*) becomes a space, so "well-known" counts as two words on both sides; an
    apostrophe inside a word stays, whatever its typography. Invisible format characters go.
    """
    # Casefolding can undo a composition ("ΐ"), so the compatibility form is taken again after it.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(word for word in (raw.strip("'") for raw in folded.translate(_SCORED).split()) if word)


class _Scored(dict[int, str]):
    """What each character becomes in a score's texts, looked up once: str.translate is far faster than a loop."""

    def __missing__(self, code: int) -> str:
        character = _APOSTROPHES.get(code, chr(code))
        category = unicodedata.category(character)
        if category == "Cf":
            character = ""
        elif category.startswith("P") and character != "'":
            character = " "
        self[code] = character
        return character


_SCORED = _Scored()


def split_unspaced(text: str) -> str:
    """normalise_score, with blanks around every character of Han, Kana, Thai, Lao, Burmese and Khmer.

    Other words stay whole. Marks stay with their character.
    """
    return " ".join(UNSPACED.sub(r" \g<0> ", normalise_score(text)).split())


NORMALIZERS = ("casefold", "characters", "basic", "whisper-english", "none")


@cache
def normalizer(name: str = NORMALIZERS[0]) -> Callable[[str], str]:
    """What makes the form of a text in which words are compared, one of NORMALIZERS.

    "casefold" is normalise_score, "characters" split_unspaced; "basic" and "whisper-english" are whisper's, the latter
    with its map of British to American spelling; "none" takes texts as they are. Raises UserError for other names.
    """
    if name not in NORMALIZERS:
        raise UserError(f"--normalizer: found {name!r}, expected one of {', '.join(NORMALIZERS)}")
    own: dict[str, Callable[[str], str]] = {"casefold": normalise_score, "characters": split_unspaced, "none": str}
    if name in own:
        return own[name]
    # Imported here: transformers takes a second.
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    # transformers has the rules, but not the spelling map without which "colour" is not "color".
    spelling = json.loads(files("rwkv_speech").joinpath("english_spelling.json").read_bytes())["spelling"]
    whisper: Callable[[str], str] = BasicTextNormalizer() if name == "basic" else EnglishTextNormalizer(spelling)
    return whisper
