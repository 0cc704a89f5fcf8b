import random
from collections.abc import Sequence

import jiwer
import numpy as np
import pytest

from rwkv_speech.errors import UserError
from rwkv_speech.scoring.metrics import Counts, Tally, score


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
    words = found.words
    assert words.ref_length == sum(lengths)
    assert words.substitutions + words.insertions + words.deletions == sum(edits)
    assert found.wer == pytest.approx(sum(edits) / sum(lengths))
    assert found.cer == pytest.approx(
        sum(edit_distance(r, h) for r, h in zip(refs, hyps, strict=True)) / sum(map(len, refs))
    )
    expected = sum(e / max(n, 1) for e, n in zip(edits, lengths, strict=True)) / len(refs)
    assert found.mean_utterance_wer == pytest.approx(expected)
    assert found.num_utterances == 30


def test_10_000_random_pairs_count_as_jiwer_counts_them_empty_ones_too():
    rng = random.Random(1)
    pieces = ["the", "weather", "is", "good", "a", "ab", "b", "x" * 40, "今天", "天气", "é", "e\u0301", "𝒳", "it's"]
    refs = [" ".join(rng.choices(pieces, k=rng.choice((0, 1, 2, 5, 12)))) for _ in range(10_000)]
    hyps = [
        " ".join(word for word in ref.split() if rng.random() < 0.8) if rng.random() < 0.5
        else " ".join(rng.choices(pieces, k=rng.choice((0, 1, 2, 5, 12))))
        for ref in refs
    ]  # fmt: skip
    assert sum(not ref for ref in refs) > 1_000 and sum(not (ref or hyp) for ref, hyp in zip(refs, hyps, strict=True))
    tally = Tally.of(refs, hyps)
    for found, process in ((tally.words, jiwer.process_words), (tally.characters, jiwer.process_characters)):
        outputs = [process(ref, hyp) for ref, hyp in zip(refs, hyps, strict=True)]
        assert found.tolist() == [[x.hits, x.substitutions, x.insertions, x.deletions] for x in outputs]
        rates = [Counts(*counts).rate for counts in found.tolist()]
        assert rates == [x.wer if isinstance(x, jiwer.WordOutput) else x.cer for x in outputs]
    scores = tally.scores()
    assert (scores.wer, scores.cer) == (jiwer.wer(refs, hyps), jiwer.cer(refs, hyps))


def test_a_part_of_the_utterances_is_scored_by_its_sums():
    refs, hyps = random_corpus(0, shortest=0)
    mask = np.arange(30) % 3 == 0
    assert Tally.of(refs, hyps).where(mask).scores() == score(refs[::3], hyps[::3])


def test_score_counts_words_against_empty_references_as_insertions():
    found = score(["", "a b"], ["x y z", "a b"])
    assert (found.words.insertions, found.words.ref_length, found.wer) == (3, 2, 1.5)


def test_score_of_empty_references_only_is_finite():
    nothing = score(["", " "], ["", ""])
    assert nothing.words == nothing.characters == Counts(0, 0, 0, 0)
    assert (nothing.wer, nothing.cer, nothing.mean_utterance_wer, nothing.num_utterances) == (0.0, 0.0, 0.0, 2)
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
