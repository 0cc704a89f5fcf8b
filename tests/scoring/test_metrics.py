import random
from collections.abc import Sequence
from dataclasses import asdict

import jiwer
import pytest

from rwkv_speech.errors import UserError
from rwkv_speech.scoring.metrics import score


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def random_corpus(seed: int, shortest: int) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    words = ["a", "ab", "abc", "b", "今天"]

    def text() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(shortest, 7)))

    return [text() for _ in range(30)], [text() for _ in range(30)]


@pytest.mark.parametrize("seed", range(5))
def test_score_equals_a_hand_written_edit_distance(seed: int):
    refs, hyps = random_corpus(seed, shortest=0)
    found = score(refs, hyps)
    edits = [edit_distance(r.split(), h.split()) for r, h in zip(refs, hyps, strict=True)]
    lengths = [len(r.split()) for r in refs]
    assert found.ref_words == sum(lengths) == found.hits + found.substitutions + found.deletions
    assert found.substitutions + found.insertions + found.deletions == sum(edits)
    assert found.wer == pytest.approx(sum(edits) / sum(lengths))
    assert found.cer == pytest.approx(
        sum(edit_distance(r, h) for r, h in zip(refs, hyps, strict=True)) / sum(map(len, refs))
    )
    expected = sum(e / max(n, 1) for e, n in zip(edits, lengths, strict=True)) / len(refs)
    assert found.mean_utterance_wer == pytest.approx(expected)
    assert found.num_utterances == 30


@pytest.mark.parametrize("seed", range(5))
def test_score_equals_jiwer_where_references_have_words(seed: int):
    refs, hyps = random_corpus(seed, shortest=1)
    found = score(refs, hyps)
    assert found.wer == pytest.approx(jiwer.wer(refs, hyps))
    assert found.cer == pytest.approx(jiwer.cer(refs, hyps))
    expected = sum(jiwer.wer(r, h) for r, h in zip(refs, hyps, strict=True)) / len(refs)
    assert found.mean_utterance_wer == pytest.approx(expected)


def test_score_counts_words_against_empty_references_as_insertions():
    found = score(["", "a b"], ["x y z", "a b"])
    assert (found.insertions, found.ref_words, found.wer) == (3, 2, 1.5)


def test_score_of_empty_references_only_is_finite():
    assert asdict(score(["", " "], ["", ""])) == {
        "wer": 0.0,
        "cer": 0.0,
        "substitutions": 0,
        "insertions": 0,
        "deletions": 0,
        "hits": 0,
        "ref_words": 0,
        "mean_utterance_wer": 0.0,
        "num_utterances": 2,
    }
    assert (score([""], ["two words"]).wer, score([""], ["ab"]).cer) == (2.0, 2.0)
    assert score(["two words"], [""]).wer == 1.0


def test_score_ignores_the_amount_of_white_space():
    found = score(["a  b "], ["a b"])
    assert found.wer == found.cer == 0.0


def test_score_rejects_what_cannot_be_paired():
    with pytest.raises(UserError, match="2 references but 1 hypotheses"):
        score(["a", "b"], ["a"])
    with pytest.raises(UserError, match="no utterance to score"):
        score([], [])
