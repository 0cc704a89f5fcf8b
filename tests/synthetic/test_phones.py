import random

import pytest

from rwkv_speech.synthetic.espeak import Synthesizer, Voice
from rwkv_speech.synthetic.phones import ACCENTS, LANGUAGES, PHONES, phones_of, spoken, voice_of
from rwkv_speech.synthetic.voices import TEST_VARIANTS, TRAIN_VARIANTS

SAID = {
    "en": ("the judge measures", "ðədʒʌdʒmɛʒɜz"),
    "es": ("guerra, llave", "ɡera__ʎabe"),
    "fr": ("un vin blanc", "ɛ̃vɛ̃blɑ̃"),
    "it": ("gli gnocchi", "ʎɪɲokɪ"),
    "ru": ("ты рыба", "tɨ_rɨba"),
}


@pytest.fixture(scope="module")
def synthesizer() -> Synthesizer:
    return Synthesizer()


def test_phones_are_their_own_names_and_differ():
    assert len(set(PHONES)) == len(PHONES)
    assert all(phones_of(name) == (name,) for name in PHONES[1:])


def test_phones_of_long_stressed_and_joined_names():
    assert phones_of("ˈaɪ") == ("a", "ɪ") and phones_of("ɑːɹ") == ("ɑ", "ɹ") and phones_of("tʃʲ") == ("tʃ", "j")
    assert phones_of("") == phones_of("(en)") == () and phones_of("œ̃") == ("ɛ̃",)
    assert phones_of("ˈy", "ru") == ("ɨ",) and phones_of("ˈy", "fr") == ("y",)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_spoken_gives_phones_that_fill_the_time(synthesizer: Synthesizer, lang: str):
    text, expected = SAID[lang]
    speech = synthesizer.say(text, Voice(ACCENTS[lang][0]))
    found = spoken(speech, lang)
    assert "".join(PHONES[i] for i, _ in found).strip("_") == expected
    assert sum(seconds for _, seconds in found) == pytest.approx(len(speech.samples) / speech.sample_rate, abs=0.1)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_accent_speaks(synthesizer: Synthesizer, lang: str):
    rng = random.Random(0)
    names = {voice_of(rng, lang, TEST_VARIANTS).name.split("+")[0] for _ in range(200)}
    assert names == set(ACCENTS[lang])
    for name in names:
        assert len(spoken(synthesizer.say(SAID[lang][0], Voice(f"{name}+{TRAIN_VARIANTS[0]}")), lang)) > 5
