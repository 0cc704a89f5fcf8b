import json
from pathlib import Path

import pytest

from rwkv_speech.decoding.results import Row, read_rows
from rwkv_speech.scoring.error_rates import ErrorRates
from rwkv_speech.scoring.metrics import score_rows
from rwkv_speech.scoring.result import Evaluation, duration_bin
from rwkv_speech.scoring.speed import Speed

SPEED = Speed(6.0, [{"reading": 0.1, "encoding": 0.2, "decoding": 0.3}])


def row(index: int, ref: str, hyp: str, **others: object) -> Row:
    """Of one id throughout: rows are told apart by their index."""
    known = {"lang": None, "task": "asr", "seconds": 2.0, "cut": False}
    return Row(id="same", index=index, ref=ref, hyp=hyp, **{**known, **others})  # type: ignore[arg-type]


def evaluation(*texts: tuple[str, str], **others: object) -> Evaluation:
    return Evaluation("set", [row(i, *pair) for i, pair in enumerate(texts)], SPEED, **others)  # type: ignore[arg-type]


def rates(found: Evaluation) -> ErrorRates:
    measure = found.tasks["asr"].measure
    assert isinstance(measure, ErrorRates)
    return measure


def test_every_utterance_is_scored_also_those_of_one_id_and_text():
    found = rates(evaluation(("a b", "a b"), ("a b", "a c"), ("a b", ""))).scores
    assert (found.num_utterances, found.words.ref_length, found.wer) == (3, 6, 0.5)


def test_the_form_of_the_texts_decides_and_is_named():
    pairs = (("The colour, twenty!", "the color 20"),)
    wers = {form: evaluation(*pairs, form=form) for form in ("casefold", "whisper-english", "none")}
    assert [rates(x).scores.wer for x in wers.values()] == [2 / 3, 0.0, 1.0]
    for form, found in wers.items():
        assert found.summary()["normalizer"] == form and f"normalizer {form}" in found.report()


def test_groups_are_scored_by_the_sums_of_their_counts():
    rows = [
        row(0, "eins zwei", "eins", lang="de", speaker="x", seconds=1.0),
        row(1, "one", "one", lang="en", speaker="y", seconds=7.0),
        row(2, "two three four", "too", lang="en", speaker="x", seconds=70.0, task="asr_en"),
        row(3, "unknown", "", lang=None, speaker="y"),
    ]
    found = Evaluation("set", rows, SPEED)
    task = found.tasks["asr"]
    tables = {name: {group: x.error for group, (_, x) in table.items()} for name, table in task.tables.items()}
    assert tables == {
        "duration": {"0 to 2 s": 0.5, "2 to 5 s": 1.0, "5 to 10 s": 0.0, "30 s and more": 1.0},
        "language": {"de": 0.5, "en": 0.75},
        "speaker": {"x": 0.8, "y": 0.5},
        "task": {"asr": 0.5, "asr_en": 1.0},
    }
    count, english = task.tables["language"]["en"]
    assert count == 2 and isinstance(english, ErrorRates) and english.scores == score_rows(rows[1:3])
    assert "WER by language: de 50.00 %, en 75.00 %" in found.report()
    assert task.interval.units == "speakers" and "of 2 speakers" in found.report()
    assert evaluation(("a", "a"), ("b", "b")).tasks["asr"].tables == {}


def test_bins_of_durations_meet():
    assert [duration_bin(x) for x in (0.0, 1.99, 2.0, 29.9, 30.0, 1e6)] == [
        "0 to 2 s", "0 to 2 s", "2 to 5 s", "20 to 30 s", "30 s and more", "30 s and more",
    ]  # fmt: skip


def test_the_ctc_head_alone_is_scored_where_each_row_has_its_text():
    rows = [row(0, "a b", "a b", ctc="A, x"), row(1, "c d", "c", ctc="c d")]
    found = Evaluation("set", rows, SPEED)
    assert found.summary()["tasks"]["asr"]["ctc"] == {
        "wer": 0.25,
        "hits": 3,
        "substitutions": 1,
        "insertions": 0,
        "deletions": 0,
    }
    assert "WER of the CTC head alone 25.00 %" in found.report()
    assert Evaluation("set", [*rows, row(2, "e", "e")], SPEED).tasks["asr"].ctc is None
    assert evaluation(("a", "a")).summary()["tasks"]["asr"]["ctc"] is None


def test_what_was_written_down_before_the_answer_is_scored_where_it_is_known():
    rows = [
        row(n, "yes", "yes", task="qa", answers=("yes",), source_text="Is it?", heard=x)
        for n, x in enumerate(("is IT", "is"))
    ]
    found = Evaluation("set", rows, SPEED)
    assert found.summary()["tasks"]["qa"]["heard"] == {
        "wer": 0.25, "hits": 3, "substitutions": 0, "insertions": 0, "deletions": 1,
    }  # fmt: skip
    assert "WER of what was written down as heard 25.00 %" in found.report()
    plain = Evaluation("set", [*rows, row(2, "no", "no", task="qa", answers=("no",))], SPEED)
    assert plain.tasks["qa"].heard is None and plain.summary()["tasks"]["qa"]["heard"] is None


def test_references_without_words_have_no_rate():
    found = evaluation(("", "eight words here"), ("...", ""))
    numbers = found.summary()["tasks"]["asr"]
    assert numbers["wer"] is None and numbers["words"]["insertions"] == 3
    assert "WER is not defined: the references have no words; 3 were recognised" in found.report()
    assert "WER 3" not in found.report()


def test_write_keeps_all_rows_and_numbers(tmp_path: Path):
    found = evaluation(("a", "b"), ("c", "c"), notes=["something"])
    texts, numbers = found.write(tmp_path, "x")
    assert read_rows(texts) == found.rows
    summary = json.loads(numbers.read_text())
    numbers = summary["tasks"]["asr"]
    assert numbers["wer"] == numbers["error"] == 0.5 and summary["speed"] == SPEED.summary()
    low, high = numbers["interval"]["ci95min"], numbers["interval"]["ci95max"]
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.02) and high - low == 2 * numbers["interval"]["ci95"]
    assert found.report().endswith("note: something")


def test_probabilities_of_words_are_judged_where_each_row_has_its_words():
    rows = [
        row(0, "one two", "One, too", words=[("One,", 0.9), (" too", 0.3)]),
        row(1, "x", "x -", words=[("x -", 0.8)]),
        row(2, "y", "", words=[]),
    ]
    found = Evaluation("set", rows, SPEED)
    judged = found.tasks["asr"].reliability
    assert judged is not None and (judged.words, judged.wrong, judged.auc) == (3, 1, 1.0)
    assert judged.ece == pytest.approx((0.1 + 0.3 + 0.2) / 3)
    assert "confidence of words: ECE 0.200, AUC 1.000" in found.report()
    assert found.summary()["tasks"]["asr"]["confidence"]["bins"][4] == {"words": 1, "confidence": 0.3, "right": 0.0}
    for others in ([*rows, row(3, "e", "e")], [row(4, "e", "", words=[])]):
        assert Evaluation("set", others, SPEED).tasks["asr"].reliability is None
        assert "confidence" not in Evaluation("set", others, SPEED).report()


MIXED = [
    row(0, "one two", "one too", lang="en"),
    row(1, "uno dos", "uno dos", lang="es", task="st_es", source_lang="en"),
    row(2, "un deux", "un deux trois", lang="fr", task="st_fr", source_lang="en"),
    row(3, "the red one", "a red", task="qa", answers=("the red one", "red")),
    row(4, "happy", "angry", task="emotion"),
    row(5, "angry", "Angry.", task="emotion"),
]


def test_a_mixed_set_has_a_block_for_each_task(tmp_path: Path):
    found = Evaluation("set", MIXED, SPEED)
    assert [(task, len(x.rows), x.measure.name) for task, x in found.tasks.items()] == [
        ("asr", 1, "WER"), ("st", 2, "chrF"), ("qa", 1, "F1"), ("emotion", 2, "accuracy"),
    ]  # fmt: skip
    shown = found.report()
    assert "set: 6 utterances of 4 tasks" in shown and "  asr: 1 utterances, 2 words, normalizer casefold" in shown
    assert (
        "WER 50.00 % ±" in shown and "(means over 2 directions)" in shown and "chrF by direction: en-es 100.00" in shown
    )
    assert "F1 100.00 % ± 0.00 %   exact match 100.00 %" in shown and "accuracy 50.00 % ±" in shown
    tasks = json.loads(found.write(tmp_path, "x")[1].read_text())["tasks"]
    assert tasks["asr"]["wer"] == 0.5 and tasks["qa"]["exact_match"] == 1.0 and tasks["emotion"]["accuracy"] == 0.5
    assert tasks["st"]["by"]["direction"]["en-es"]["chrf"] == 100.0 and tasks["st"]["interval"]["of"] == "1 - chrF"
    assert "ctc" in tasks["st"] and tasks["st"]["ctc"] is None


def test_the_language_found_is_compared_with_that_of_the_manifest():
    rows = [
        row(0, "a", "a", lang="fr", found_lang="FR"),
        row(1, "a", "a", lang="es", found_lang="it"),
        row(2, "b", "b"),
    ]
    found = Evaluation("set", rows, SPEED)
    assert "language found: accuracy 50.00 % of 2 utterances" in found.report()
    assert found.summary()["tasks"]["asr"]["language_accuracy"] == 0.5
    assert evaluation(("a", "a")).summary()["tasks"]["asr"]["language_accuracy"] is None
