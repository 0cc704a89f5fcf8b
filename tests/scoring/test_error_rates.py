import pytest

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.bootstrap import interval
from rwkv_speech.scoring.error_rates import ErrorRates, mostly_unspaced


def rates(*pairs: tuple[str, str]) -> ErrorRates:
    rows = [Row(str(i), i, ref, hyp, None, "asr", 1.0, False) for i, (ref, hyp) in enumerate(pairs)]
    return ErrorRates.of(rows, "casefold")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["the weather is good"], False),
        (["今天天气很好", "好 ok"], True),
        (["こんにちは"], True),
        (["สวัสดี"], True),
        (["안녕하세요"], False),
        (["good day 今天"], False),
        (["", "..."], False),
    ],
)
def test_scripts_without_blanks_are_told_from_others(texts: list[str], expected: bool):
    assert mostly_unspaced(texts) is expected


def test_characters_come_first_where_words_are_not_spaced():
    chinese = rates(("今天天气", "今天天汽"), ("你好", "你好"))
    assert (chinese.name, chinese.error, chinese.errors.tolist()) == ("CER", 1 / 6, [0.25, 0.0])
    whole = interval(chinese.counts, chinese.rates, [None, None])
    first, second, _ = chinese.lines(whole)
    assert first.startswith("CER 16.67 % ±") and second.startswith("WER 50.00 %   (substitutions 1")
    english = rates(("a b", "a c"), ("d", "d"))
    assert (english.name, english.error, english.report()) == ("WER", 1 / 3, "WER 33.33 %")
    assert english.verdicts() == ["WER 50 %, 1 error", "WER 0 %, 0 errors"] and english.cost(2.0) == "+2 words"


def test_without_words_in_the_references_nothing_is_defined():
    empty = rates(("", "two words"), ("...", ""))
    assert not empty.defined and empty.report() == "WER -" and empty.verdicts()[0] == "2 errors"
