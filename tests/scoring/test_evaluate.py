import json
from pathlib import Path

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.evaluate import Evaluation, result_stem
from rwkv_speech.scoring.metrics import score_rows


def rows(*texts: tuple[str, str, str | None]) -> list[Row]:
    """Of one id throughout: rows are told apart by their index."""
    return [Row("same", i, ref, hyp, lang, "asr", 2.0, False) for i, (ref, hyp, lang) in enumerate(texts)]


def evaluation(*texts: tuple[str, str, str | None]) -> Evaluation:
    found = rows(*texts)
    return Evaluation("set", score_rows(found), found, 0.5)


def test_every_utterance_is_scored_also_those_of_one_id_and_text():
    found = evaluation(("a b", "a b", None), ("a b", "a c", None), ("a b", "", None))
    assert (found.scores.num_utterances, found.scores.ref_words, found.scores.wer) == (3, 6, 0.5)
    assert found.audio_seconds == 6 and found.times_real_time == 12


def test_languages_are_scored_apart_where_there_are_several():
    found = evaluation(("eins zwei", "eins", "de"), ("one", "one", "en"), ("two", "too", "en"))
    assert {lang: scores.wer for lang, scores in found.by_lang().items()} == {"de": 0.5, "en": 0.5}
    assert "WER de 50.00 %, en 50.00 %" in found.report()
    assert evaluation(("a", "a", "en")).by_lang() == {} and "WER en" not in evaluation(("a", "a", "en")).report()


def test_write_keeps_all_rows_and_numbers(tmp_path: Path):
    texts, numbers = evaluation(("a", "b", None), ("c", "c", None)).write(tmp_path, "x")
    assert [json.loads(line)["hyp"] for line in texts.read_text().splitlines()] == ["b", "c"]
    assert json.loads(numbers.read_text())["wer"] == 0.5


def test_every_set_and_checkpoint_has_files_of_its_own(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").touch()
    sets = [str(tmp_path / folder / "test.jsonl") for folder in ("a", "b")]
    stems = {
        result_stem(spec, weights)
        for spec in sets
        for weights in ("best.safetensors", "last.safetensors", "x/best.pth")
    }
    assert len(stems) == 6
    assert result_stem(sets[0], "best.safetensors").startswith("eval-best-test-")
    assert result_stem(sets[0], "untrained") == result_stem(sets[0], "untrained")
    assert "/" not in result_stem("hf:a/b:train[:1%]", "best.safetensors")
