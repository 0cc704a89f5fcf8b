"""What a finished run serves for: scoring, prediction, publishing, a new task's state."""

import json
import subprocess
import sys
from pathlib import Path

import eval as eval_script
import predict as predict_script
import pytest
import soundfile
import torch
import train as train_script
from run_files import tiny_run
from safetensors.torch import load_file

from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.reports.record import read_metrics

ROOT = Path(__file__).parents[2]


def test_eval_writes_scores_that_jiwer_agrees_with(corpus: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    import jiwer

    sets = f"{corpus / 'test.jsonl'}, {corpus / 'valid.jsonl'}"
    argv = ["--proj_dir", str(run), "--eval_data", sets, "--device", "cpu", "--micro_bsz", "2"]
    assert eval_script.main(argv) == 0
    shown = capsys.readouterr().out
    assert f"{corpus / 'valid.jsonl'}: 4 utterances" in shown
    rows = [json.loads(line) for line in next(run.glob("eval-best-test-*.jsonl")).read_text().splitlines()]
    summary = json.loads(next(run.glob("eval-best-test-*.json")).read_text())
    assert len(rows) == summary["num_utterances"] == 3
    numbers = summary["tasks"]["asr"]
    assert numbers["wer"] == pytest.approx(jiwer.wer([row["ref"] for row in rows], [row["hyp"] for row in rows]))
    assert f"WER {100 * numbers['wer']:.2f} %" in shown and "times real time" in shown
    assert summary["speed"]["times_real_time"] > 0


def test_eval_does_not_depend_on_the_batch_size(corpus: Path, run: Path, tmp_path: Path):
    texts = []
    for size in ("1", "3"):
        argv = ["--proj_dir", str(tmp_path), "--checkpoint", str(run / "last.safetensors"), "--device", "cpu"]
        assert eval_script.main([*argv, "--eval_data", str(corpus / "test.jsonl"), "--micro_bsz", size]) == 0
        rows = [json.loads(line) for line in next(tmp_path.glob("eval-last-test-*.jsonl")).read_text().splitlines()]
        texts.append({row["id"]: row["hyp"] for row in rows})
    assert texts[0] == texts[1]


def test_predict_without_weights_names_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert predict_script.main(["--proj_dir", str(tmp_path), "--device", "cpu", "--file_path", "a.wav"]) == 2
    assert f"{tmp_path}: found no trained weights there" in capsys.readouterr().err


def test_published_files_serve_prediction_and_training(
    corpus: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from rwkv_speech.__main__ import main as verbs

    published = tmp_path / "output" / "asr.pth"
    assert verbs(["export", str(run / "last.safetensors"), str(published)]) == 0
    capsys.readouterr()
    file = str(corpus / "test/00000.flac")
    texts = []
    for where in (["--checkpoint", str(run / "last.safetensors")], ["--proj_dir", str(published.parent)]):
        assert predict_script.main([*where, "--load_model", "tiny", "--device", "cpu", "--file_path", file]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert train_script.main(tiny_run(corpus, tmp_path / "run", init_from=published, epoch_steps=1)) == 0


_BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pytorch_lightning", "lightning", "deepspeed"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
script = __import__(sys.argv[2])
sys.exit(script.main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("script", "data_flag", "data"), [("eval", "eval_data", "test.jsonl"), ("predict", "file_path", "test/00000.flac")]
)
def test_scripts_run_without_lightning_and_deepspeed(
    corpus: Path, run: Path, script: str, data_flag: str, data: str, tmp_path: Path
):
    argv = ["--proj_dir", str(run), "--device", "cpu", f"--{data_flag}", str(corpus / data)]
    command = [sys.executable, "-c", _BLOCKED, str(ROOT), script, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_a_new_tasks_state_on_a_frozen_adapter_leaves_all_else_to_the_bit(corpus: Path, run: Path, tmp_path: Path):
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {
            "audio_filepath": str(corpus / row["audio_filepath"]),
            "text": row["text"].split()[0],
            "task": "keyword",
        }
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {"train_data": tmp_path / "words.jsonl", "init_from": run, "freeze": "adapter", "lr_schedule": "constant"}
    for name, counts in (("whole", [2]), ("resumed", [1, 2])):
        for count in counts:
            assert train_script.main(tiny_run(corpus, tmp_path / name, epoch_count=count, **flags)) == 0
    before, after = load_file(run / "best.safetensors"), load_file(tmp_path / "whole/last.safetensors")
    assert set(after) == {*before, "initial_states.keyword"} and after["initial_states.keyword"].any()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    again = load_file(tmp_path / "resumed/last.safetensors")
    assert all(torch.equal(again[name], x) for name, x in after.items())
    assert [row.lr_adapter for row in read_metrics(tmp_path / "whole")] == [None] * 4
    code = train_script.main(tiny_run(corpus, tmp_path / "other", freeze="adapter"))
    assert code == 2  # without --init_from, where it has no effect


def test_transcribe_from_python(corpus: Path, run: Path):
    from rwkv_speech import SpeechLM as Public

    results = Public.from_pretrained(str(run)).transcribe([str(corpus / "test/00000.flac"), corpus / "test/00001.flac"])
    assert [type(result.text) for result in results] == [str, str] and all(result.seconds > 0.5 for result in results)


def test_checkpoints_record_what_was_trained_on(corpus: Path, run: Path):
    seconds = [soundfile.info(path).duration for path in (corpus / "train").glob("*.flac")]
    found = load_trained(run / "last.safetensors").trained_on
    assert found is not None and found.utterances == len(seconds) == 8
    assert (found.hours, found.longest_seconds) == pytest.approx((sum(seconds) / 3600, max(seconds)), rel=1e-4)
