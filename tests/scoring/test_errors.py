import random
from collections import Counter

import jiwer
import pytest

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.errors import align, most_frequent


def rows_of(refs: list[str], hyps: list[str]) -> list[Row]:
    pairs = enumerate(zip(refs, hyps, strict=True))
    return [Row(str(i), i, ref, hyp, None, "asr", 1.0, False) for i, (ref, hyp) in pairs]


@pytest.mark.parametrize("seed", range(5))
def test_aligned_words_are_both_texts_and_count_as_jiwer_does(seed: int):
    draw = random.Random(seed)
    refs, hyps = ([" ".join(draw.choices("a b c d".split(), k=draw.randint(0, 9))) for _ in range(20)] for _ in "rh")
    utterances = align(rows_of(refs, hyps))
    for ref, hyp, utterance in zip(refs, hyps, utterances, strict=True):
        assert " ".join(word for kind, word, _ in utterance.words if kind != "ins") == ref
        assert " ".join(word for kind, _, word in utterance.words if kind != "del") == hyp
        assert all((a == b) == (kind == "equal") for kind, a, b in utterance.words)
        if ref:
            assert utterance.error == jiwer.wer(ref, hyp)
    found, counts = jiwer.process_words(refs, hyps), Counter(kind for u in utterances for kind, _, _ in u.words)
    assert counts["sub"] == found.substitutions and counts["ins"] == found.insertions
    assert counts["del"] == found.deletions and counts["equal"] == found.hits


def test_words_against_an_empty_reference_are_insertions():
    (utterance,) = align(rows_of([""], ["two words"]))
    assert align([]) == [] and utterance.words == (("ins", "", "two"), ("ins", "", "words")) and utterance.error == 2.0
    assert utterance.verdict == "2 errors"


def test_most_frequent_errors_come_first_and_equal_ones_in_the_alphabets_order():
    utterances = align(rows_of(["the sun the moon z", "the b"], ["a sun a moon y", "a c"]))
    assert most_frequent(utterances, "sub", 9) == [("the", "a", 3), ("b", "c", 1), ("z", "y", 1)]
    assert most_frequent(utterances, "sub", 1) == [("the", "a", 3)]
    assert most_frequent(utterances, "ins", 9) == []
