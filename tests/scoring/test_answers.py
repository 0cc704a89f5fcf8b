"""Exact match and F1, against the functions of SQuAD's own evaluation script."""

import collections
import random
import re
import string

import numpy as np
import pytest

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.answers import Answers, normalise_answer, token_f1
from rwkv_speech.scoring.bootstrap import interval


def squad_normalise(s: str) -> str:
    def remove_articles(text: str) -> str:
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return " ".join(remove_articles(remove_punc(s.lower())).split())


def squad_f1(a_gold: str, a_pred: str) -> float:
    gold_toks, pred_toks = squad_normalise(a_gold).split(), squad_normalise(a_pred).split()
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return float(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = 1.0 * num_same / len(pred_toks), 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def row(hyp: str, *answers: str) -> Row:
    return Row("q", 0, answers[0], hyp, "en", "qa", 1.0, False, answers=answers)


def test_10_000_random_answers_score_as_squad_scores_them():
    rng = random.Random(0)
    pieces = ["The", "a", "an", "cat", "Cat's", "red-hot", "$5", "U.S.", "(no)", "1,000", "than", "", "x^2", "c++"]

    def text() -> str:
        return " ".join(rng.choices(pieces, k=rng.randint(0, 4)))

    found = [row(text(), *(text() for _ in range(rng.randint(1, 3)))) for _ in range(10_000)]
    measured = Answers.of(found, "casefold")
    exact = [any(squad_normalise(x) == squad_normalise(r.hyp) for x in r.answers) for r in found]
    assert measured.exact.tolist() == exact and 0.05 < np.mean(exact) < 0.5
    assert measured.f1 == pytest.approx([max(squad_f1(x, r.hyp) for x in r.answers) for r in found])
    assert (measured.error, measured.exact_match) == pytest.approx((1 - measured.f1.mean(), np.mean(exact)))


def test_other_languages_lose_their_punctuation_and_are_split_into_characters_where_there_are_no_blanks():
    assert normalise_answer("¿Sí, «Málaga»?") == "sí málaga"
    assert token_f1("今天", "今天好") == pytest.approx(2 * 2 / 5) and token_f1("ab", "abc") == 0


def test_the_commonest_answer_stands_beside():
    found = Answers.of([row("red", "red"), row("blue", "Blue", "navy"), row("red", "the blue!"), row("x", "no")], "")
    assert found.majority == ("blue", 0.5) and found.exact_match == 0.5
    shown = found.lines(interval(found.counts, found.rates, [None] * 4))
    assert "exact match 50.00 %" in shown[0] and shown[1] == "always answering 'blue': exact match 50.00 %"
    part = found.part(np.array([True, True, False, False]))
    assert (part.exact_match, part.majority) == (1.0, ("blue", 0.5)) and part.cells() == ("100.00 %", "100.00 %")


def test_the_reference_is_the_answer_where_there_is_no_list():
    plain = Row("q", 0, "The Nile", "nile", "en", "chat", 1.0, False)
    assert Answers.of([plain], "casefold").numbers()["exact_match"] == 1.0
