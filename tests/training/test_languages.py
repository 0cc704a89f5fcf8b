import math
from collections.abc import Iterable

import pytest
import torch
from torch.nn import functional as F

from rwkv_speech.batch import Sample
from rwkv_speech.data.folder import FileSource
from rwkv_speech.data.loader import collate
from rwkv_speech.data.source import Utterance
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.training.languages import Languages, byte_entropy, text_bits

ENGLISH = ["seven four three", "one nine", "two two eight", "five six nine one", "zero three", "eight four one two"]
GERMAN = ["das wetter ist heute schön", "wir fahren morgen nach berlin", "der hund schläft unter dem tisch",
          "können sie mir bitte helfen", "im winter ist es hier sehr kalt", "das haus gehört meiner großmutter",
          "ihr anruf ist uns wichtig", "vielen dank für ihre geduld"]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> SpeechLM:
    return SpeechLM.build(Parts()).eval()


def source(texts: Iterable[str], lang: str | None, **more: str) -> FileSource:
    return FileSource([Utterance(str(i), None, text, lang=lang, **more) for i, text in enumerate(texts)])  # type: ignore[arg-type]


def test_bits_are_those_of_each_text_read_alone(model: SpeechLM):
    expected = 0.0
    for text in ENGLISH:
        ids = torch.tensor(model.tokenizer.encode(text))
        logits = model.lm(torch.cat((torch.tensor([0]), ids))[None]).logits[0, :-1]
        expected += float(F.cross_entropy(logits.double(), ids, reduction="sum")) / math.log(2)
    assert text_bits(model, ENGLISH) == pytest.approx(expected, rel=1e-4)


def test_entropy_of_bytes():
    assert byte_entropy(["abab"]) == 1 and byte_entropy(["aaa"]) == 0
    assert byte_entropy(["ab", "cd", "ddd"]) == pytest.approx(4 / 7 * math.log2(7 / 4) + 3 / 7 * math.log2(7))


def test_german_is_noted_and_english_is_not(model: SpeechLM):
    languages = Languages(model)
    assert languages.read(source(ENGLISH * 3, "en"), "none") == []
    [note] = languages.read(source(GERMAN, "de"), "none")
    assert note.startswith("note: texts of lang de: before training the base model needs ")
    assert "how often each byte comes says 4." in note
    assert languages.read(source(GERMAN, "de"), "none") == []  # once
    assert len(languages.read(source(GERMAN, None), "lower")) == 1
    assert languages.read(source(GERMAN[:3], "nl"), "none") == []  # too little to tell
    assert languages.read(source(GERMAN, "lb", task="lid"), "none") == []


def test_the_loss_of_validation_notes_a_language(model: SpeechLM):
    languages, encode = Languages(model), model.tokenizer.encode
    sound = 0.1 * torch.randn(8_000, generator=torch.Generator().manual_seed(1))
    rows = [Sample(str(i), sound, x, encode(x), 0.5, i, "asr", "de") for i, x in enumerate(GERMAN)]
    languages.hear(collate(rows[:4]))
    languages.hear(collate(rows[4:]))
    with torch.no_grad():
        bits = sum(float(model(collate([row]))) for row in rows) / math.log(2) / sum(len(x.encode()) for x in GERMAN)
    [note] = languages.heard()
    assert f"validation needs {bits:.1f} bits a byte" in note
    languages.hear(collate(rows))
    assert languages.heard() == []
