import pytest

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.measures import mean_error, measures, said


def row(index: int, task: str, ref: str, hyp: str) -> Row:
    return Row(str(index), index, ref, hyp, "en", task, 1.0, False)


def test_each_task_has_its_measure_and_languages_of_one_stand_together():
    rows = [
        row(0, "st_fr", "un deux", "un deux"),
        row(1, "asr", "one two", "one too"),
        row(2, "st_es", "uno", "uno"),
        row(3, "lid", "french", "german"),
        row(4, "slurred", "a b c d", "a b c e"),
    ]
    found = measures(rows)
    assert {task: (x.name, x.error) for task, x in found.items()} == {
        "st": ("chrF", 0.0), "asr": ("WER", 0.5), "lid": ("accuracy", 1.0), "slurred": ("WER", 0.25),
    }  # fmt: skip
    assert mean_error(found) == pytest.approx(1.75 / 4)
    assert said(found).startswith("mean error 43.75 % (st chrF 100.00 BLEU ") and "lid accuracy 0.00 %" in said(found)
    assert said(measures(rows[1:2])) == "WER 50.00 %"
