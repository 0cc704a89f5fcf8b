import unicodedata

import pytest

from rwkv_speech.errors import UserError
from rwkv_speech.text import join_texts, normalise_label, normalise_score

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
