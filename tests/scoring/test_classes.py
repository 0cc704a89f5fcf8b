"""Closed sets, against counts by brute force."""

import random

import numpy as np
import pytest

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.bootstrap import interval
from rwkv_speech.scoring.classes import Classes


def rows(*pairs: tuple[str, str]) -> list[Row]:
    return [Row(str(i), i, ref, hyp, None, "emotion", 1.0, False) for i, (ref, hyp) in enumerate(pairs)]


@pytest.mark.parametrize("seed", range(3))
def test_all_rates_are_those_counted_by_hand(seed: int):
    rng = random.Random(seed)
    names = ["angry", "calm", "happy", "sad"]
    pairs = [(rng.choices(names, (5, 1, 3, 2))[0], rng.choice([*names, "bored", ""])) for _ in range(300)]
    pairs += [(ref, ref) for ref, _ in pairs[:200]]
    found = Classes.of(rows(*pairs), "casefold")
    f1s, recalls, shares = [], [], []
    for row, name in enumerate(found.names):
        right = sum(ref == name for ref, _ in pairs)
        hits = sum(ref == hyp == name for ref, hyp in pairs)
        precision, recall = hits / max(1, sum(hyp == name for _, hyp in pairs)), hits / right
        f1s.append(2 * precision * recall / (precision + recall))
        recalls.append(recall)
        shares.append(right / len(pairs))
        for column, other in enumerate(found.names):
            assert found.confusion[row, column] == sum(pair == (name, other) for pair in pairs)
    assert found.names == tuple(names) and found.confusion.sum() == len(pairs)
    assert found.no_class == sum(hyp not in names for _, hyp in pairs) > 0
    assert found.error == pytest.approx(1 - sum(ref == hyp for ref, hyp in pairs) / len(pairs))
    assert found.weighted_f1 == pytest.approx(np.dot(f1s, shares)) and found.mean_recall == pytest.approx(
        np.mean(recalls)
    )
    assert found.majority == (names[int(np.argmax(shares))], pytest.approx(max(shares)))


def test_case_and_punctuation_do_not_count_and_other_right_answers_do():
    found = rows(("Happy", "happy."), ("sad", "Sadness"), ("sad", "happy"))
    assert Classes.of(found, "none").error == pytest.approx(2 / 3)
    also = Row("x", 3, "sad", "low", None, "emotion", 1.0, False, answers=("sad", "low"))
    assert Classes.of([*found, also], "none").error == pytest.approx(2 / 4)


def test_what_is_printed_names_the_majority_and_what_is_no_class():
    found = Classes.of(rows(("a", "a"), ("a", "b"), ("b", "what")), "casefold")
    shown = found.lines(interval(found.counts, found.rates, [None] * 3))
    assert shown[0].startswith("accuracy 33.33 % ±") and "mean recall of 2 classes 25.00 %" in shown[0]
    assert shown[1:] == ["always 'a': accuracy 66.67 %", "1 texts name no class"]
    assert found.verdicts() == ["right", "wrong", "wrong"]
    part = found.part(np.array([True, False, False]))
    assert (part.error, part.mean_recall, part.weighted_f1) == (0, 1, 1)
