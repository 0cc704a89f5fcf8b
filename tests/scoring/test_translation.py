"""BLEU and chrF, against sacrebleu's command line and API."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.bootstrap import interval
from rwkv_speech.scoring.translation import Translation, direction

WORDS = "the Weather is good , today ! we go home and they sing . it rains again (now)".split()
CHINESE = list("今天天气很好我们回家他们唱歌")


def corpus(seed: int, size: int, words: list[str] = WORDS, blank: str = " ") -> tuple[list[str], list[str]]:
    """References, and hypotheses that differ from them; some are empty."""
    rng = random.Random(seed)
    refs = [rng.choices(words, k=rng.choice((1, 4, 9, 15))) for _ in range(size)]
    hyps = [[rng.choice(words) if rng.random() < 0.3 else word for word in ref if rng.random() < 0.9] for ref in refs]
    return [blank.join(ref) for ref in refs], [blank.join(hyp) for hyp in hyps]


def rows(refs: list[str], hyps: list[str], source: str | None, target: str | None) -> list[Row]:
    pairs = enumerate(zip(refs, hyps, strict=True))
    return [Row(str(i), i, ref, hyp, target, "st_x", 1.0, False, source_lang=source) for i, (ref, hyp) in pairs]


@pytest.mark.parametrize(("target", "tokenizer"), [("fr", "13a"), ("zh-CN", "zh"), ("ja", "char"), (None, "13a")])
def test_a_direction_scores_as_sacrebleus_command(tmp_path: Path, target: str | None, tokenizer: str):
    refs, hyps = corpus(0, 40, CHINESE if tokenizer != "13a" else WORDS, "" if tokenizer != "13a" else " ")
    files = [tmp_path / "ref", tmp_path / "hyp"]
    for file, texts in zip(files, (refs, hyps), strict=True):
        file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", files[0], "-i", files[1], "-m", "bleu", "chrf", "-w", "10"]
    done = subprocess.run([*command, "--tokenize", tokenizer], capture_output=True, text=True, check=True)
    expected = {score["name"]: score for score in json.loads(done.stdout)}
    found = Translation.of(rows(refs, hyps, "en", target), "casefold")
    numbers = found.numbers()
    assert numbers["bleu"] == pytest.approx(expected["BLEU"]["score"], abs=1e-9)
    assert numbers["chrf"] == pytest.approx(expected["chrF2"]["score"], abs=1e-9)
    assert numbers["signatures"] == [f"{name} {expected[name]['signature']}" for name in ("chrF2", "BLEU")]


def test_each_utterances_chrf_is_sacrebleus_of_the_sentence():
    refs, hyps = corpus(1, 60)
    found = Translation.of(rows(refs, hyps, "en", "es"), "casefold")
    metric = CHRF()
    expected = [metric.sentence_score(hyp, [ref]).score for ref, hyp in zip(refs, hyps, strict=True)]
    assert 100 * (1 - found.errors) == pytest.approx(expected, abs=1e-9)


def test_several_directions_count_alike_however_many_utterances_they_have():
    parts = {("en", "es"): corpus(2, 50), ("en", "fr"): corpus(3, 5), ("es", "en"): corpus(4, 20)}
    mixed = [row for (source, target), texts in parts.items() for row in rows(*texts, source, target)]
    random.Random(0).shuffle(mixed)
    found = Translation.of(mixed, "casefold")
    chrfs = [CHRF().corpus_score(hyps, [refs]).score for refs, hyps in parts.values()]
    bleus = [BLEU().corpus_score(hyps, [refs]).score for refs, hyps in parts.values()]
    assert 100 * (1 - found.error) == pytest.approx(np.mean(chrfs)) and found.mean_bleu == pytest.approx(np.mean(bleus))
    part = found.part(np.array([direction(row) == "en-fr" for row in mixed]))
    assert part.cells() == (f"{chrfs[1]:.2f}", f"{bleus[1]:.2f}")
    assert "(means over 3 directions)" in found.lines(interval(found.counts, found.rates, [None] * 75))[0]


def test_the_interval_of_chrf_is_that_of_sacrebleus_own_bootstrap():
    refs, hyps = corpus(5, 100)
    found = Translation.of(rows(refs, hyps, "en", "es"), "casefold")
    ours = interval(found.counts, found.rates, [None] * 100)
    theirs = CHRF().corpus_score(hyps, [refs], n_bootstrap=1000)
    assert 100 * (1 - ours.mean) == pytest.approx(theirs._mean, abs=0.2)
    assert 100 * ours.ci95 == pytest.approx(theirs._ci, rel=0.15)


def test_perfect_empty_and_unknown():
    perfect = Translation.of(rows(["a b c d"], ["a b c d"], None, None), "casefold")
    assert perfect.error == 0 and perfect.mean_bleu == pytest.approx(100) and direction(perfect.rows[0]) is None
    silent = Translation.of(rows(["a b", "c"], ["", ""], "en", "es"), "casefold")
    assert silent.error == 1 and silent.mean_bleu == 0
