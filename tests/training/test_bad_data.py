"""Trainings on data that cannot be used, in part or at all, and with flags that contradict it."""

import json
import shutil
from pathlib import Path

import pytest
import train as train_script
from run_files import tiny_run


def test_train_skips_and_lists_broken_files_up_to_max_bad(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "broken.wav").write_text("not audio")
    good = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    rows = [{**row, "audio_filepath": str(corpus / row["audio_filepath"])} for row in good]
    rows.append({"audio_filepath": "broken.wav", "text": "x", "duration": 1.0})
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train_script.main(tiny_run(corpus, tmp_path / "run", train_data=manifest)) == 0
    listed = [json.loads(line) for line in (tmp_path / "run/bad_files.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and "broken.wav" in listed[0]["reason"]
    assert train_script.main(tiny_run(corpus, tmp_path / "strict", train_data=manifest, max_bad=0)) == 2
    assert "bad_files.jsonl" in capsys.readouterr().err


def test_train_reports_a_bad_manifest_before_it_starts(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    manifest = tmp_path / "bad.jsonl"
    manifest.write_text('{"audio_filepath": "gone.wav", "text": "a"}\nnot json\n')
    assert train_script.main(tiny_run(corpus, tmp_path / "run", train_data=manifest)) == 2
    message = capsys.readouterr().err
    assert "gone.wav" in message and "1" in message and "2" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"epoch_steps": 9}, "--epoch_steps: given 9, but 8 utterances in batches of 4"),
        ({"n_layer": 32}, "--n_layer: given 32"),
        ({"train_data": ""}, "--train_data: found nothing"),
        ({"separator": "ab"}, "--separator: 'ab' is 2 tokens"),
        ({"load_model": "gone.pth"}, "--load_model: no such file 'gone.pth'"),
        ({"init_from": "gone"}, "gone: found no trained weights there"),
    ],
)
def test_train_names_what_is_wrong(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, object], message: str
):
    assert train_script.main(tiny_run(corpus, tmp_path, **flags)) == 2
    assert message in capsys.readouterr().err


def test_train_leaves_out_what_does_not_fit(corpus: Path, tmp_path: Path):
    assert train_script.main(tiny_run(corpus, tmp_path, ctx_len=40)) == 0
    assert "(--ctx_len)" in (tmp_path / "bad_files.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "broken", "message"),
    [
        ({"ctx_len": 5}, "", "train.jsonl: no utterance could be used: 0 broken, 8 too long for --ctx_len"),
        ({"max_bad": 99}, "train.jsonl", "train.jsonl: no utterance could be used: 8 broken, 0 too long"),
        ({"max_bad": 99}, "valid.jsonl", "valid.jsonl: no utterance could be used: 4 broken, 0 too long"),
    ],
)
def test_train_without_a_usable_utterance_is_an_error(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, object],
    broken: str,
    message: str,
):
    shutil.copytree(corpus, tmp_path / "corpus")
    for line in (tmp_path / "corpus" / broken).read_text().splitlines() if broken else ():
        (tmp_path / "corpus" / json.loads(line)["audio_filepath"]).write_text("not audio")
    if not broken:  # known durations are looked at before
        manifest = tmp_path / "corpus" / "train.jsonl"
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        manifest.write_text("".join(json.dumps({**row, "duration": None}) + "\n" for row in rows))
    data = {"train_data": tmp_path / "corpus" / "train.jsonl", "valid_data": tmp_path / "corpus" / "valid.jsonl"}
    assert train_script.main(tiny_run(corpus, tmp_path / "run", **data, **flags)) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "bad_files.jsonl" in shown.err and "trained weights" not in shown.out
    assert not list((tmp_path / "run").glob("*.safetensors"))
