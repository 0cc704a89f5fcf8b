"""The phones of all languages that the small models read and hear: eSpeak NG's IPA names in fewer symbols."""

import random
import re
from collections.abc import Sequence
from functools import cache

from rwkv_speech.synthetic.espeak import Speech, Voice

SILENCE = "_"
PHONES = (
    "_ p b t d k ɡ f v θ ð s z ʃ ʒ x h ts tʃ dʒ m n ŋ ɲ l ʎ r ɾ ɹ ʁ j w "
    "i ɪ e ɛ æ a ɑ ɔ o ʊ u ʌ ə ɜ y ø œ ɨ ɛ\u0303 ɑ\u0303 ɔ\u0303"
).split()
# eSpeak NG's voices of each language; those of English in many accents.
ACCENTS = {
    "en": ("en-us", "en-us", "en-us", "en-us-nyc", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-gb-x-gbclan"),
    "es": ("es", "es-419"),
    "fr": ("fr", "fr-ch", "fr-be"),
    "it": ("it",),
    "ru": ("ru",),
}
LANGUAGES = tuple(ACCENTS)

_NASALS = {"ɛ\u0303": "ɛ\u0303", "œ\u0303": "ɛ\u0303", "ɑ\u0303": "ɑ\u0303", "ɔ\u0303": "ɔ\u0303"}
# What no phone of ours tells apart: stress, length, aspiration, a place of the tongue.
_DROPPED = re.compile('[ˈˌː\u032a\u0329ʰ\u0325\u032cˑ()|^"\u200d\u0303-]')
_SAME = {
    "ʔ": "t", "ɬ": "l", "ɫ": "l", "ɭ": "l", "ʍ": "w", "ɥ": "j", "ʝ": "j", "ʲ": "j", "β": "b", "ɣ": "ɡ", "ç": "ʃ",
    "ɕ": "ʃ", "ʂ": "ʃ", "ʑ": "ʒ", "ʐ": "ʒ", "χ": "x", "g": "ɡ", "ɱ": "m", "ʀ": "ʁ", "ɐ": "ə", "ᵻ": "ɪ", "ɒ": "ɑ",
    "ʉ": "u", "ɚ": "ɜ", "ɵ": "o", "ʏ": "y", "ɯ": "ɨ", "ɘ": "ə", "ɞ": "ɜ",
}  # fmt: skip
_PAIRS = ("tʃ", "dʒ", "ts")


@cache
def phones_of(ipa: str, lang: str = "en") -> tuple[str, ...]:
    """The plain phones of an eSpeak name such as "ˈaɪ"; none for a pause or a change of language."""
    if ipa.startswith("("):
        return ()
    if lang == "ru":
        ipa = ipa.replace("y", "ɨ")
    if nasal := next((plain for name, plain in _NASALS.items() if name in ipa), None):
        return (nasal,)
    found = list[str]()
    left = _DROPPED.sub("", ipa).replace("tɕ", "tʃ").replace("dz", "dʒ")
    while left:
        size = 2 if left[:2] in _PAIRS else 1
        plain = left[:size]
        plain = _SAME.get(plain, plain)
        if plain in PHONES and plain != SILENCE and found[-1:] != [plain]:
            found.append(plain)
        left = left[size:]
    return tuple(found)


def spoken(speech: Speech, lang: str) -> list[tuple[int, float]]:
    """Each phone of `speech` as its index in PHONES and its seconds, pauses too; they follow each other."""
    starts = [start for _, start in speech.phonemes]
    found = list[tuple[int, float]]()
    for (name, start), end in zip(speech.phonemes, [*starts[1:], len(speech.samples)], strict=True):
        names: Sequence[str] = phones_of(name, lang) or (SILENCE,)
        seconds = max(0, end - start) / speech.sample_rate / len(names)
        found += [(PHONES.index(phone), seconds) for phone in names]
    return found


def voice_of(rng: random.Random, lang: str, variants: Sequence[str]) -> Voice:
    """A speaker of a language, drawn from `variants`, with an accent, a rate and a pitch of its own."""
    return Voice(
        f"{rng.choice(ACCENTS[lang])}+{rng.choice(variants)}",
        rate=rng.randint(110, 230),
        pitch=rng.randint(15, 85),
        pitch_range=rng.randint(20, 80),
    )
