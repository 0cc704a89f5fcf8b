import random
from collections.abc import Sequence

import kaldialign
import numpy as np
import pytest

from rwkv_speech.scoring.bootstrap import Floats, Interval, Numbers, Paired, interval, paired
from rwkv_speech.scoring.metrics import Longs, Tally


def corpus(seed: int, size: int = 200, wrong: float = 0.1) -> tuple[list[str], list[str], list[str]]:
    """References and what two systems make of them, the second a little worse; some references are empty."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(50)]
    refs = [rng.choices(words, k=rng.choice((0, 1, 5, 10, 20, 30))) for _ in range(size)]

    def spoilt(share: float) -> list[str]:
        return [" ".join(rng.choice(words) if rng.random() < share else word for word in ref) for ref in refs]

    return [" ".join(ref) for ref in refs], spoilt(wrong), spoilt(1.2 * wrong)


def rates(sums: Numbers) -> Floats:
    return sums[:, 0] / np.maximum(1, sums[:, 1])


def wer_interval(edits: Longs, ref_words: Longs, speakers: Sequence[str | None], seed: int = 0) -> Interval:
    return interval(np.stack([edits, ref_words], 1), rates, speakers, seed)


def wer_paired(a: Longs, b: Longs, ref_words: Longs, speakers: Sequence[str | None]) -> Paired:
    return paired(*(np.stack([edits, ref_words], 1) for edits in (a, b)), rates, speakers)


def edits_of(refs: list[str], hyps: list[str]) -> tuple[Longs, Longs]:
    tally = Tally.of(refs, hyps)
    return tally.edits, tally.ref_words


@pytest.mark.parametrize(("seed", "wrong"), [(0, 0.02), (1, 0.1), (2, 0.3)])
def test_intervals_equal_kaldialigns_within_five_hundredths_of_a_percent(seed: int, wrong: float):
    refs, first, second = corpus(seed, wrong=wrong)
    words = [[text.split() for text in texts] for texts in (refs, first, second)]
    expected = kaldialign.bootstrap_wer_ci(*words)
    for hyps, kaldi in ((first, expected["system1"]), (second, expected["system2"])):
        found = wer_interval(*edits_of(refs, hyps), [None] * len(refs))
        assert (found.units, found.num_units) == ("utterances", len(refs))
        ends = [found.mean, found.ci95, *found.ends]
        kaldis = [kaldi[name] for name in ("wer", "ci95", "ci95min", "ci95max")]
        assert ends == pytest.approx(kaldis, abs=0.0005)


def test_shares_of_replications_won_equal_kaldialigns():
    refs, first, second = corpus(3, wrong=0.1)
    words = [[text.split() for text in texts] for texts in (refs, first, second)]
    a, ref_words = edits_of(refs, first)
    b, _ = edits_of(refs, second)
    found = wer_paired(a, b, ref_words, [None] * len(refs))
    assert found.b_wins == pytest.approx(kaldialign.bootstrap_wer_ci(*words)["p_s2_improv_over_s1"], abs=0.02)
    assert found.a_wins + found.b_wins <= 1
    assert found.difference.mean == pytest.approx((b.sum() - a.sum()) / ref_words.sum(), abs=5e-4)


def test_paired_differences_vary_less_than_the_two_systems():
    refs, first, second = corpus(4)
    (a, ref_words), (b, _) = edits_of(refs, first), edits_of(refs, second)
    alone = [wer_interval(edits, ref_words, [None] * len(refs)).ci95 for edits in (a, b)]
    same = wer_paired(a, a, ref_words, [None] * len(refs))
    assert (same.difference.mean, same.difference.ci95, same.a_wins, same.b_wins) == (0, 0, 0, 0)
    assert wer_paired(a, b, ref_words, [None] * len(refs)).difference.ci95 < (alone[0] ** 2 + alone[1] ** 2) ** 0.5


def test_speakers_are_drawn_with_all_their_utterances():
    rng = np.random.default_rng(0)
    speakers = [f"speaker {i // 20}" for i in range(200)]
    edits = np.repeat(rng.integers(0, 5, 10), 20)  # a speaker's utterances are alike: there are ten facts, not 200
    ref_words = np.full(200, 10)
    found = wer_interval(edits, ref_words, speakers)
    assert (found.units, found.num_units) == ("speakers", 10)
    assert found.ci95 == pytest.approx(wer_interval(edits[::20], ref_words[::20], [None] * 10).ci95, rel=0.05)
    assert found.ci95 > 3 * wer_interval(edits, ref_words, [None, *speakers[1:]]).ci95
    assert wer_interval(edits, ref_words, ["one"] * 200).units == "utterances"


def test_a_seed_gives_the_same_interval_and_nothing_said_none():
    refs, hyps, _ = corpus(5)
    counts = edits_of(refs, hyps)
    names = [None] * len(refs)
    first, same, other = (wer_interval(*counts, names, seed=seed) for seed in (1, 1, 2))
    assert first == same != other
    empty = wer_interval(np.array([0, 3]), np.array([0, 0]), [None, None])
    assert np.isfinite([empty.mean, empty.ci95]).all()
