"""Speakers of the tiny default, and the phones that eSpeak NG reports for them."""

import random
import re

from rwkv_speech.synthetic.espeak import Voice

ACCENTS = ("en-us", "en-us", "en-us", "en-us-nyc", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-gb-x-gbclan")

# Variants that pretraining, training and test may use; an unseen speaker is in the test set alone.
TRAIN_VARIANTS = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike "
    "Nguyen Reed RicishayMax RicishayMax2 Storm adam anika announcer antonio aunty belinda benjamin boris caleb croak "
    "david ed edward edward2 f1 f2 f4 f5 grandma grandpa gustave iven iven2 iven3 kaukovalta klatt klatt2 klatt3 "
    "klatt4 klatt6 m1 m2 m4 m5 m6 m8 marcelo max michel miguel mike2 paul pedro quincy rob robosoft robosoft3 "
    "robosoft4 robosoft6 robosoft8 sandro shelby steph steph2 travis victor zac"
).split()
TEST_VARIANTS = "f3 m3 m7 linda robert klatt5 steph3 iven4".split()

SILENCE = "_"
PHONES = (
    "_ p b t d k ɡ f v θ ð s z ʃ ʒ h tʃ dʒ m n ŋ l ɹ w j i ɪ ɛ æ ɑ ɔ ʊ u ʌ ə ɜ eɪ aɪ ɔɪ oʊ aʊ ɪɹ ɛɹ ɑɹ ɔɹ ʊɹ"
).split()
_DROPPED = re.compile("[ˈˌː̪̩ʰ̃ʲ\u200d̥̬ˑ()|]")
# Phones of rarer accents, written with the symbols of the common ones.
_SAME = {
    "r": "ɹ", "ɾ": "t", "ʔ": "t", "x": "k", "ɬ": "l", "ɫ": "l", "əl": "l", "n̩": "n", "ʍ": "w",
    "əʊ": "oʊ", "o": "oʊ", "ʌʊ": "oʊ", "e": "eɪ", "ei": "i", "əɪ": "aɪ", "aɪə": "aɪ", "aɪɚ": "aɪ",
    "æʊ": "aʊ", "ʌʉ": "aʊ",
    "ɐ": "ə", "ᵻ": "ɪ", "ɒ": "ɑ", "a": "æ", "aa": "æ", "a:": "æ", "ʉ": "u", "əu": "u",
    "ɚ": "ɜ", "ɜɹ": "ɜ", "ʌɹ": "ɜ", "əɹ": "ɜ", "iə": "ɪɹ", "iɹ": "ɪɹ", "ɪə": "ɪɹ", "ɛə": "ɛɹ", "eə": "ɛɹ",
    "oɹ": "ɔɹ", "oə": "ɔɹ", "ɔə": "ɔɹ", "ɑə": "ɑɹ", "ʊə": "ʊɹ", "ʉɹ": "ʊɹ",
}  # fmt: skip


def phone(ipa: str) -> str:
    """The plain phone of an eSpeak name: no stress, no length; all else is a pause, "_"."""
    plain = _DROPPED.sub("", ipa).strip()
    plain = _SAME.get(plain, plain)
    return plain if plain in PHONES else SILENCE


def voice(rng: random.Random, variants: list[str]) -> Voice:
    """A speaker drawn from `variants` with an accent, a rate and a pitch of its own."""
    return Voice(
        f"{rng.choice(ACCENTS)}+{rng.choice(variants)}",
        rate=rng.randint(110, 230),
        pitch=rng.randint(15, 85),
        pitch_range=rng.randint(20, 80),
    )
