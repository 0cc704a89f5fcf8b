import json
from dataclasses import replace
from pathlib import Path

import eval as eval_script
import jiwer
import numpy as np
import pytest

from rwkv_speech.decoding.results import Row, write_rows
from rwkv_speech.errors import UserError
from rwkv_speech.scoring.compare import compare

PAIRS = [("one two three", "one two three"), ("four five", "for five"), ("six", "six six"), ("", ""), ("seven", "")]


def rows(*pairs: tuple[str, str], speakers: bool = False) -> list[Row]:
    return [
        Row(f"u{i // 2}", i, ref, hyp, None, "asr", 1.0, False, speaker=f"s{i % 2}" if speakers else None)
        for i, (ref, hyp) in enumerate(pairs)
    ]  # two utterances of each id


def written(path: Path, found: list[Row]) -> str:
    write_rows(path, found)
    return str(path)


def test_the_common_utterances_are_compared(tmp_path: Path):
    a = rows(*PAIRS)
    b = [replace(row, hyp=hyp) for row, hyp in zip(a, ["one two", "four five", "six", "", ""], strict=True)]
    extra = Row("only", 9, "eight", "nine", None, "asr", 1.0, False)
    found = compare(written(tmp_path / "a.jsonl", a), written(tmp_path / "b.jsonl", [extra, *b]))
    task = found.tasks["asr"]
    assert (task.a.error, task.b.error) == tuple(
        jiwer.wer([row.ref for row in a], [row.hyp for row in side]) for side in (a, b)
    )
    assert found.alone == (0, 1) and task.num_utterances == 5 and list(found.tasks) == ["asr"]
    assert [(x.ref, x.difference) for x in found.changes] == [("one two three", 1), ("four five", -1), ("six", -1)]
    assert task.paired.b_wins > task.paired.a_wins > 0 and task.paired.difference.units == "utterances"
    shown = found.report()
    assert (
        "asr: 5 common utterances, normalizer casefold" in shown and "0 that A alone has, 1 that B alone has" in shown
    )
    assert "B is better in 2 utterances, worse in 1" in shown and "worse in B, +1 words: u0" in shown
    numbers, changes = found.write(tmp_path / "out")
    assert json.loads(numbers.read_text()) == found.summary()
    assert [json.loads(line)["b"] for line in changes.read_text().splitlines()] == ["one two", "four five", "six"]


def test_a_result_is_as_good_as_itself(tmp_path: Path):
    file = written(tmp_path / "a.jsonl", rows(*PAIRS, speakers=True))
    found = compare(file, file)
    paired = found.tasks["asr"].paired
    assert (paired.a_wins, paired.b_wins, found.changes) == (0.0, 0.0, [])
    assert paired.difference.units == "speakers" and "left out" not in found.report()


def test_the_form_of_the_texts_is_the_callers(tmp_path: Path):
    a = written(tmp_path / "a.jsonl", rows(("The colour", "the color")))
    b = written(tmp_path / "b.jsonl", rows(("The colour", "The colour")))
    assert [compare(a, b, form).tasks["asr"].a.error for form in ("casefold", "none", "whisper-english")] == [
        0.5,
        1.0,
        0.0,
    ]


def test_a_runs_folder_stands_for_its_result(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder / "validation.jsonl", rows(*PAIRS[:1]))
    written(tmp_path / "b" / "eval-best-test-1.jsonl", rows(*PAIRS))
    found = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [file.name for file in found.files] == ["validation.jsonl", "eval-best-test-1.jsonl"]
    assert found.alone == (0, 4)
    written(tmp_path / "b" / "eval-best-test-2.jsonl", rows(*PAIRS))
    with pytest.raises(UserError, match=r"--compare: found eval-best-test-1.jsonl, eval-best-test-2.jsonl in"):
        compare(str(tmp_path / "a"), str(tmp_path / "b"))
    with pytest.raises(UserError, match=r"--compare: found none in '.*gone', expected one result"):
        compare(str(tmp_path / "a"), str(tmp_path / "gone"))


def test_results_of_different_data_are_refused(tmp_path: Path):
    a = written(tmp_path / "a.jsonl", rows(("one", "one")))
    other = written(tmp_path / "b.jsonl", rows(("two", "two")))
    with pytest.raises(UserError, match=r"'u0' has the reference 'one' in .*a.jsonl, but 'two' in .*b.jsonl"):
        compare(a, other)
    foreign = written(tmp_path / "c.jsonl", [replace(rows(("one", "one"))[0], id="x")])
    with pytest.raises(UserError, match="have no utterance in common, expected results of the same data"):
        compare(a, foreign)


def test_the_command_prints_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = (written(tmp_path / name, rows(("one two", hyp))) for name, hyp in (("a", "one two"), ("b", "one")))
    assert eval_script.main(["--compare", a, b, "--proj_dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "WER of A 0.00 %, of B 50.00 %; B - A +50.00" in shown
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".jsonl"]


def test_each_task_is_compared_by_its_own_measure(tmp_path: Path):
    """Of B the first translation is better, an answer wrong, and no transcript other."""
    tasks = [("asr", "one two"), ("st_es", "buenos días"), ("st_fr", "bon jour"), ("qa", "red"), ("topic", "sport")]
    a = [Row(task, i, ref, ref, task[-2:], task, 1.0, False, answers=(ref,)) for i, (task, ref) in enumerate(tasks)]
    a[1] = replace(a[1], hyp="buenas")
    b = [replace(row, hyp={"st_es": row.ref, "qa": "blue"}.get(row.task, row.hyp)) for row in a]
    found = compare(written(tmp_path / "a.jsonl", a), written(tmp_path / "b.jsonl", b))
    assert [(task, x.a.name, np.sign(x.difference)) for task, x in found.tasks.items()] == [
        ("asr", "WER", 0), ("st", "chrF", 1), ("qa", "F1", -1), ("topic", "accuracy", 0),
    ]  # fmt: skip
    assert [(change.id, np.sign(change.difference)) for change in found.changes] == [("qa", 1), ("st_es", -1)]
    assert found.tasks["qa"].paired.a_wins == 1.0 and found.tasks["st"].paired.b_wins > 0.5
    shown = found.report()
    assert "F1 of A 100.00 %, of B 0.00 %; B - A -100.00 ±" in shown and "worse in B, +100 %: qa" in shown
