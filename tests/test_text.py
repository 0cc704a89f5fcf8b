import random
import unicodedata

import pytest
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from rwkv_speech import config
from rwkv_speech.errors import UserError
from rwkv_speech.text import (
    NORMALIZERS,
    PROMPT_FORMS,
    as_continuation,
    as_prompt,
    join_texts,
    normalise_label,
    normalise_score,
    normalizer,
)

SAMPLES = [
    "Ｈｅｌｌｏ, World!",
    "rock 'n' roll",
    "don’t",
    "ΐ Σίσυφος ς",
    "Straße ½ ﬁn",
    "今天。",
    "",
    " \u2028 ",
    "İi ǅ",
]


def test_normalise_label_none_keeps_case_and_punctuation():
    assert normalise_label("  Hello,\t\u00a0World!\n") == "Hello, World!"
    assert normalise_label("e\u0301") == "\u00e9"


def test_normalise_label_lower_lowers_only_the_case():
    assert normalise_label("IT'S  ÉTÉ, YES", "lower") == "it's été, yes"


def test_normalise_label_rejects_unknown_modes():
    with pytest.raises(UserError, match="'upper'.*none, lower"):
        normalise_label("a", "upper")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("it's the dogs' 'bone'", "it's the dogs bone"),
        ("don’t ‘quote’ me", "don't quote me"),
        ("rock 'n' roll", "rock n roll"),
        ("well-known — yes...", "well known yes"),
        ("ＡＢＣ Straße", "abc strasse"),
        ("soft\u00adhyphen \ufeffx", "softhyphen x"),
        ("今天，好。", "今天 好"),
        ("?!", ""),
        ("हिन्दी", "हिन्दी"),
    ],
)
def test_normalise_score_keeps_words_only(text: str, expected: str):
    assert normalise_score(text) == expected


@pytest.mark.parametrize("text", SAMPLES)
def test_normalisation_is_idempotent_and_normal(text: str):
    scored = normalise_score(text)
    assert normalise_score(scored) == scored and unicodedata.is_normalized("NFKC", scored)
    for mode in ("none", "lower"):
        label = normalise_label(text, mode)
        assert normalise_label(label, mode) == label and unicodedata.is_normalized("NFC", label)


@pytest.mark.parametrize(
    ("texts", "whole"),
    [
        ([], ""),
        (["one "], "one"),
        (["one", "", " two"], "one two"),
        (["今日は", "晴れ"], "今日は晴れ"),
        (["今日は", "OK"], "今日は OK"),
        (["สวัสดี", "ครับ"], "สวัสดีครับ"),
        (["안녕", "하세요"], "안녕 하세요"),
    ],
)
def test_join_texts_puts_blanks_where_a_script_has_them(texts: list[str], whole: str):
    assert join_texts(texts) == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("今天天气，很好 ABC 2024年", "今 天 天 气 很 好 abc 2024 年"),
        ("スーパーﾏﾏ", "ス ー パ ー マ マ"),
        ("がか\u3099", "が が"),
        ("人々はgoodだ。", "人 々 は good だ"),
        ("ข้าวน้ำ ok", "ข้ า ว น้\u0e4d า ok"),
        ("한국어 말", "한국어 말"),
        ("the weather's good", "the weather's good"),
        ("हिन्दी مرحبا", "हिन्दी مرحبا"),
    ],
)
def test_characters_splits_what_is_written_without_blanks_and_leaves_words_whole(text: str, expected: str):
    assert normalizer("characters")(text) == expected


def test_whispers_normalizers_equal_an_independent_copy_of_them():
    rng = random.Random(0)
    pieces = (
        "colour Mr. won't twenty-one $20 million uh [noise] (laughs) 3.14 it's travelled one oh one ﬁn Über 10% "
        "I'd've mum grey analyse 1,000 first half-past 1960s rock'n'roll £5 you're and a half double three 今天 —"
    ).split()
    english, basic = EnglishTextNormalizer(), BasicTextNormalizer()
    texts = [" ".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(500)]
    assert [normalizer("whisper-english")(text) for text in texts] == [english(text) for text in texts]
    assert [normalizer("basic")(text) for text in texts] == [basic(text) for text in texts]
    assert normalizer("whisper-english")("The COLOUR is grey, isn't it?") == "the color is gray is not it"


def test_normalizers_are_known_by_name():
    assert normalizer("none")(" A,b ") == " A,b " and normalizer() is normalizer(NORMALIZERS[0])
    assert normalizer()("A, b") == normalise_score("A, b") == "a b"
    with pytest.raises(UserError, match="--normalizer: found 'nothing', expected one of casefold, characters"):
        normalizer("nothing")


def test_as_prompt_is_what_the_world_models_know():
    assert as_prompt("user", "What is it? ") == "User: What is it?\n\nAssistant:"
    assert as_prompt("user", "a\r\n\r\n\nb", "Look.\n") == "User: Look.\na\nb\n\nAssistant:"
    assert as_prompt("continue", " the day ") == "the day"
    assert as_prompt(r"Q: {text}\nA: ", "{text} 1") == "Q: {text} 1\nA:"
    assert "\n\nInput: x\n\nResponse:" in as_prompt("instruction", "x") and tuple(PROMPT_FORMS) == config.PROMPT_FORMS


@pytest.mark.parametrize(
    ("form", "answer", "follows"),
    [
        ("user", "Yes", " Yes"),
        ("user", "。", " 。"),
        ("user", "", ""),
        ("continue", "is good", " is good"),
        ("continue", ", too", ", too"),
        ("continue", "天", "天"),
        ("{text}", "x", " x"),
        ("{text}#", "x", "x"),
        ("Q: {text}\\nA: ", "x", " x"),
    ],
)
def test_as_continuation_puts_the_blank_of_the_vocabulary(form: str, answer: str, follows: str):
    assert as_continuation(form, answer) == follows
