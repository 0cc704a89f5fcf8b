"""Training, evaluation and prediction through their command lines, on the embedded default."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import eval as eval_script
import predict as predict_script
import pytest
import soundfile
import torch
import train as train_script
from assertions import assert_rms_close
from run_files import column
from safetensors.torch import load_file

from rwkv_speech import tiny
from rwkv_speech.config import TrainConfig
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.sources import open_source
from rwkv_speech.decoding.results import read_rows
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.reports.record import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training, four validation, three test utterances; of a new process, so that they are always the same."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["--out", str(folder), "--train", "8", "--valid", "4", "--test", "3", "--seed", "3"]
    subprocess.run([sys.executable, "-m", "rwkv_speech.synthetic.make_corpus", *words], check=True, capture_output=True)
    return folder


def arguments(corpus: Path, run: Path, **flags: object) -> list[str]:
    values = {
        "load_model": "tiny", "device": "cpu", "proj_dir": run, "train_data": corpus / "train.jsonl", "micro_bsz": 4,
        "workers": 0, "log_every": 1, "warmup_steps": 1, **flags,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    flags = {"valid_data": corpus / "valid.jsonl", "epoch_count": 2, "lr_adapter": 1e-3, "score_first": 1}
    assert train_script.main(arguments(corpus, folder, **flags)) == 0
    return folder


def test_train_writes_checkpoints_and_logs(run: Path):
    names = {path.name for path in run.iterdir()}
    assert {"last.safetensors", "best.safetensors", "epoch-1.safetensors", "epoch-2.safetensors", "logs"} <= names
    assert not [name for name in names if name.startswith(".")]
    last = load_trained(run / "last.safetensors")
    assert last.metrics["epoch"] == 2 and last.metrics["step"] == 4 and last.metrics["error"] > 0
    assert last.parts is not None and last.parts.load_model == "tiny"
    assert len(load_file(run / "last.safetensors")) == 4 + 1  # adapter tensors and the one task's state
    rows = list(csv.DictReader((run / "logs/csv/metrics.csv").open()))
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert len(losses) == 4 and min(losses) > 0
    # Two steps an epoch, each epoch with its validation behind them; steps and epochs count from 1.
    assert [(row["step"], row["epoch"], bool(row["wer"])) for row in rows] == [
        ("1", "1", False), ("2", "1", False), ("2", "1", True), ("3", "2", False), ("4", "2", False), ("4", "2", True)
    ]  # fmt: skip
    assert {"lr_adapter", "lr_state", "wer", "cer", "target_tokens"} <= set(rows[0])
    assert list((run / "logs/tensorboard").glob("events*"))


def test_conversations_are_trained_and_scored_turn_by_turn(corpus: Path, tmp_path: Path):
    rows = [json.loads(line) for line in (corpus / "valid.jsonl").read_text().splitlines()]
    heard = [
        {"audio_filepath": str(corpus / row["audio_filepath"]), "duration": row["duration"], "answer": row["text"]}
        for row in rows
    ]
    talks = [heard[:2], [{"input": "the weather", "answer": "is good"}, heard[2]], heard[3:]]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"turns": x, "task": "chat"}) + "\n" for x in talks))
    data, run, cache = tmp_path / "talks.jsonl", tmp_path / "run", tmp_path / "cache"
    flags = {"valid_data": data, "lr_adapter": 1e-3, "feature_cache": cache, "micro_bsz": 2}
    assert train_script.main(arguments(data.parent / "x", run, **{**flags, "train_data": data})) == 0
    assert list(load_trained(run / "last.safetensors").initial_states) == ["chat"]
    assert min(column(run, "loss")) > 0 and not (run / "bad_files.jsonl").exists()
    assert eval_script.main(["--proj_dir", str(run), "--eval_data", str(data), "--device", "cpu"]) == 0
    [results] = run.glob("eval-*.jsonl")
    found = read_rows(results)
    # The line with one turn is no conversation.
    assert [row.turn for row in found] == [1, 2, 1, 2, None] and [row.index for row in found] == [0, 0, 1, 1, 2]
    assert [row.ref for row in found] == [rows[0]["text"], rows[1]["text"], "is good", rows[2]["text"], rows[3]["text"]]
    assert [row.id.partition("#")[2] for row in found] == ["1", "2", "1", "2", ""]


def test_several_tasks_are_validated_each_by_its_own_measure(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [json.loads(line) for line in (corpus / "valid.jsonl").read_text().splitlines()]
    tasks = [{"task": "asr"}, {"task": "st", "lang": "es"}, {"task": "topic", "text": "sport"}, {"task": "qa"}]
    mixed = [
        {**row, **task, "audio_filepath": str(corpus / row["audio_filepath"])}
        for row, task in zip(rows, tasks, strict=True)
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in mixed))
    flags = {"train_data": tmp_path / "mixed.jsonl", "valid_data": tmp_path / "mixed.jsonl", "lr_adapter": 1e-3}
    assert train_script.main(arguments(corpus, tmp_path / "run", **flags)) == 0
    shown = capsys.readouterr().out
    found = list(csv.DictReader((tmp_path / "run/logs/csv/tasks.csv").open()))
    assert [(row["task"], row["step"], row["num_utterances"]) for row in found] == [
        (task, "1", "1") for task in ("asr", "st", "topic", "qa")
    ]
    assert [name for row in found for name in ("wer", "chrf", "accuracy", "exact_match") if row[name]] == [
        "wer", "chrf", "accuracy", "exact_match",
    ]  # fmt: skip
    error = sum(float(row["error"]) for row in found) / 4
    metrics = load_trained(tmp_path / "run/best.safetensors").metrics
    assert metrics["error"] == pytest.approx(error) and f"mean error {100 * error:.2f} % (asr WER " in shown
    assert column(tmp_path / "run", "error") == [pytest.approx(error)] and not column(tmp_path / "run", "wer")
    assert "Errors by task" in (tmp_path / "run/report.html").read_text()


def test_plan_prints_what_a_run_needs_and_trains_nothing(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train_script.main(arguments(corpus, tmp_path / "run", plan=1)) == 0
    shown = capsys.readouterr().out
    model = SpeechLM.build(Parts("tiny"))
    trained = (sum(p.numel() for p in part.parameters()) for part in (model.adapter, model.initial_states))
    assert all(f"{count:,}" in shown for count in trained)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.device_count() >= 64, reason="plans for GPUs that are not there")
def test_plan_for_gpus_that_are_not_here(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_script.main(arguments(corpus, tmp_path / "run", device="64", plan=1)) == 0
    shown = capsys.readouterr().out
    assert "not measured: that takes the model, the data and 64 GPU(s)" in shown and "64 x auto" in shown
    assert "bfloat16" in shown  # what GPUs compute in, unless told otherwise


def test_report_and_run_record_are_written(run: Path):
    page = (run / "report.html").read_text()
    assert "<svg" in page and "WER" in page
    assert json.loads((run / "run.json").read_text())["flags"]["epoch_count"] == 2


def test_train_twice_gives_the_same_weights(corpus: Path, tmp_path: Path):
    for name in ("a", "b"):
        assert train_script.main(arguments(corpus, tmp_path / name)) == 0
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def trained_step(corpus: Path, run: Path, **flags: object) -> dict[str, torch.Tensor]:
    """The weights after one optimizer step over all eight utterances."""
    assert train_script.main(arguments(corpus, run, grad_clip=0, lr_schedule="constant", **flags)) == 0
    return load_file(run / "last.safetensors")


@pytest.fixture(scope="module")
def plain_step(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights after such a step with no other flags."""
    return trained_step(corpus, tmp_path_factory.mktemp("plain"), micro_bsz=8)


_HUGE_STEP = 1e6


def descend(monkeypatch: pytest.MonkeyPatch) -> None:
    """One huge step of plain gradient descent leaves the gradient itself in the weights."""
    from rwkv_speech.training import module as lightning_module

    def descent(adapter, state, *rates):
        groups = [{"params": list(adapter), "name": "adapter"}, {"params": list(state), "name": "state"}]
        return torch.optim.SGD(groups, lr=_HUGE_STEP)

    monkeypatch.setattr(lightning_module, "make_optimizer", descent)


@pytest.mark.parametrize("form", ["torch", "auto"])
def test_accumulation_does_not_change_the_gradient(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
):
    descend(monkeypatch)
    whole = trained_step(corpus, tmp_path / "whole", micro_bsz=8, wkv6=form)
    parts = trained_step(corpus, tmp_path / "parts", micro_bsz=3, accumulate=3, wkv6=form)
    for name, tensor in whole.items():
        assert float(tensor.abs().max()) > 10, f"{name}: gradient too small to be seen"
        # Other batch shapes round differently in the encoder, too, which the states' gradients magnify most.
        assert_rms_close(name, parts[name], tensor, 3e-4 if "initial_states" in name else 2e-5)
        assert float((parts[name] - tensor).abs().max()) <= 3e-5 * _HUGE_STEP, name


def test_kl_of_answers_and_cross_entropy_of_the_rest_in_one_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    descend(monkeypatch)
    lines = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    for line in lines[::2]:
        line |= {"source_text": line.pop("text"), "answer": "yes"}
    (corpus / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    taught = {"train_data": corpus / "answers.jsonl", "loss": "kl"}
    whole = trained_step(corpus, tmp_path / "whole", micro_bsz=8, **taught)
    assert "4 of 8 lines looked at are learned by KL, the others by cross-entropy" in capsys.readouterr().out
    parts = trained_step(corpus, tmp_path / "parts", micro_bsz=3, accumulate=3, **taught)
    for name, tensor in whole.items():
        assert_rms_close(name, parts[name], tensor, 3e-4 if "initial_states" in name else 2e-5)
    assert train_script.main(arguments(corpus, tmp_path / "none", loss="kl")) == 2
    assert "none of 8 lines of --train_data has an answer and a source_text" in capsys.readouterr().err


def test_frozen_weights_stay_and_the_encoder_stays_in_eval_mode(corpus: Path, tmp_path: Path):
    from rwkv_speech.training.run import fit

    model = SpeechLM.build(Parts("tiny"))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    config = TrainConfig(proj_dir=str(tmp_path), device="cpu", micro_bsz=4, workers=0, lr_adapter=1e-2, warmup_steps=1)
    fit(model, config, SpeechDataset(open_source(str(corpus / "train.jsonl")), model.tokenizer), None)
    assert not any(module.training for module in model.encoder.modules())
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {
        "initial_states.asr",
        *(f"adapter.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")),
    }


def test_bf16_trains_close_to_fp32_and_evaluates(corpus: Path, tmp_path: Path):
    exact = trained_step(corpus, tmp_path / "fp32", micro_bsz=8, lr_adapter=1e-3)
    rough = trained_step(corpus, tmp_path / "bf16", micro_bsz=8, lr_adapter=1e-3, precision="bf16")
    assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in rough.values())
    name = "initial_states.asr"
    assert torch.nn.functional.cosine_similarity(exact[name].flatten(), rough[name].flatten(), dim=0) > 0.7
    argv = ["--proj_dir", str(tmp_path / "bf16"), "--device", "cpu", "--precision", "bf16"]
    assert eval_script.main([*argv, "--eval_data", str(corpus / "test.jsonl")]) == 0


def test_grad_cp_gives_the_same_weights(corpus: Path, tmp_path: Path, plain_step: dict[str, torch.Tensor]):
    again = trained_step(corpus, tmp_path / "again", micro_bsz=8, grad_cp=1)
    assert all(torch.allclose(x, again[name], rtol=0, atol=1e-6) for name, x in plain_step.items())


def test_train_stops_at_a_loss_that_is_not_finite(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One bad utterance in the start weights: an infinite state."""
    model = SpeechLM.build(Parts("tiny"))
    with torch.no_grad():
        model.initial_states["asr"].fill_(torch.inf)
    model.save(tmp_path / "bad.safetensors")
    code = train_script.main(arguments(corpus, tmp_path / "run", init_from=tmp_path / "bad.safetensors"))
    message = capsys.readouterr().err
    assert code == 2 and "step 0: the loss is nan, expected a finite number" in message and "train/0000" in message
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_train_skips_and_lists_broken_files_up_to_max_bad(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "broken.wav").write_text("not audio")
    good = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    rows = [{**row, "audio_filepath": str(corpus / row["audio_filepath"])} for row in good]
    rows.append({"audio_filepath": "broken.wav", "text": "x", "duration": 1.0})
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train_script.main(arguments(corpus, tmp_path / "run", train_data=manifest)) == 0
    listed = [json.loads(line) for line in (tmp_path / "run/bad_files.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and "broken.wav" in listed[0]["reason"]
    assert train_script.main(arguments(corpus, tmp_path / "strict", train_data=manifest, max_bad=0)) == 2
    assert "bad_files.jsonl" in capsys.readouterr().err


def test_train_reports_a_bad_manifest_before_it_starts(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    manifest = tmp_path / "bad.jsonl"
    manifest.write_text('{"audio_filepath": "gone.wav", "text": "a"}\nnot json\n')
    assert train_script.main(arguments(corpus, tmp_path / "run", train_data=manifest)) == 2
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
    assert train_script.main(arguments(corpus, tmp_path, **flags)) == 2
    assert message in capsys.readouterr().err


def test_train_leaves_out_what_does_not_fit(corpus: Path, tmp_path: Path):
    assert train_script.main(arguments(corpus, tmp_path, ctx_len=40)) == 0
    assert "(--ctx_len)" in (tmp_path / "bad_files.jsonl").read_text()


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
    assert train_script.main(arguments(corpus, tmp_path / "run", init_from=published, epoch_steps=1)) == 0


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
            assert train_script.main(arguments(corpus, tmp_path / name, epoch_count=count, **flags)) == 0
    before, after = load_file(run / "best.safetensors"), load_file(tmp_path / "whole/last.safetensors")
    assert set(after) == {*before, "initial_states.keyword"} and after["initial_states.keyword"].any()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    again = load_file(tmp_path / "resumed/last.safetensors")
    assert all(torch.equal(again[name], x) for name, x in after.items())
    assert [row.lr_adapter for row in read_metrics(tmp_path / "whole")] == [None] * 4
    code = train_script.main(arguments(corpus, tmp_path / "other", freeze="adapter"))
    assert code == 2  # without --init_from, where it has no effect


def test_transcribe_from_python(corpus: Path, run: Path):
    from rwkv_speech import SpeechLM as Public

    results = Public.from_pretrained(str(run)).transcribe([str(corpus / "test/00000.flac"), corpus / "test/00001.flac"])
    assert [type(result.text) for result in results] == [str, str] and all(result.seconds > 0.5 for result in results)


def test_module_rejects_more_steps_than_data(corpus: Path, tmp_path: Path):
    from rwkv_speech.training.run import fit

    model = SpeechLM.build(Parts(tiny.NAME))
    config = TrainConfig(proj_dir=str(tmp_path), device="cpu", micro_bsz=8, workers=0, epoch_steps=2)
    with pytest.raises(UserError, match="make 1; leave it"):
        fit(model, config, SpeechDataset(open_source(str(corpus / "train.jsonl")), model.tokenizer), None)


def test_train_streams_rows_that_no_disk_holds(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import datasets

    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    audio = [{"bytes": (corpus / row["audio_filepath"]).read_bytes(), "path": None} for row in rows]
    table = datasets.Dataset.from_dict({"audio": audio, "text": [row["text"] for row in rows]})
    (tmp_path / "rows").mkdir()
    table.to_parquet(tmp_path / "rows" / "train-00000.parquet")
    flags = {"train_data": f"hf-stream:{tmp_path / 'rows'}:train", "workers": 0}
    assert train_script.main(arguments(corpus, tmp_path / "run", epoch_steps=2, **flags)) == 0
    assert load_trained(tmp_path / "run" / "last.safetensors").metrics["step"] == 2
    assert train_script.main(arguments(corpus, tmp_path / "other", **flags)) == 2
    assert "--epoch_steps: found nothing" in capsys.readouterr().err
    assert train_script.main(arguments(corpus, tmp_path / "other", epoch_steps=2, plan=1, **flags)) == 2
    assert "--plan: hf-stream:" in capsys.readouterr().err


def test_train_with_a_feature_cache_takes_the_same_steps(
    corpus: Path, tmp_path: Path, plain_step: dict[str, torch.Tensor]
):
    flags = {"feature_cache": tmp_path / "cache", "feature_dtype": "float32", "micro_bsz": 8}
    kept = trained_step(corpus, tmp_path / "kept", **flags)
    again = trained_step(corpus, tmp_path / "again", **flags)
    for name, x in plain_step.items():
        assert_rms_close(name, kept[name], x, 1e-4)
        assert torch.equal(again[name], kept[name])
    code = train_script.main(arguments(corpus, tmp_path / "both", speed="0.9,1.1", **flags))
    assert code == 2


def test_train_augments_and_keeps_the_best(corpus: Path, tmp_path: Path):
    noise = corpus / "train"
    flags = {"speed": "0.9,1,1.1", "volume_db": "-6,6", "noise_dir": noise, "time_masks": 1, "freq_masks": 1,
             "valid_data": corpus / "valid.jsonl", "epoch_count": 3, "keep_best": 1, "patience": 1}  # fmt: skip
    for name in ("a", "b"):
        assert train_script.main(arguments(corpus, tmp_path / name, **flags)) == 0
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(list((tmp_path / "a").glob("best-epoch-*.safetensors"))) == 1


def test_run_that_ended_early_is_not_gone_on_with(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # No WER is lower by more than 10: the second validation is the first that does not help.
    flags = {"valid_data": corpus / "valid.jsonl", "epoch_count": 9, "patience": 1, "min_delta": 10}
    for _ in range(2):
        assert train_script.main(arguments(corpus, tmp_path / "run", **flags)) == 0
        assert load_trained(tmp_path / "run" / "last.safetensors").metrics["epoch"] == 2
        assert "has ended early, after epoch 2: no lower error in 1 validations" in capsys.readouterr().out
    flags["patience"] = 2
    assert train_script.main(arguments(corpus, tmp_path / "run", **flags)) == 0
    assert load_trained(tmp_path / "run" / "last.safetensors").metrics["epoch"] == 3


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
    assert train_script.main(arguments(corpus, tmp_path / "run", **data, **flags)) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "bad_files.jsonl" in shown.err and "trained weights" not in shown.out
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_checkpoints_record_what_was_trained_on(corpus: Path, run: Path):
    seconds = [soundfile.info(path).duration for path in (corpus / "train").glob("*.flac")]
    found = load_trained(run / "last.safetensors").trained_on
    assert found is not None and found.utterances == len(seconds) == 8
    assert (found.hours, found.longest_seconds) == pytest.approx((sum(seconds) / 3600, max(seconds)), rel=1e-4)


def test_the_screen_tells_each_epoch_and_what_was_skipped(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = {"valid_data": corpus / "valid.jsonl", "epoch_count": 2, "ctx_len": 40}
    assert train_script.main(arguments(corpus, tmp_path, **flags)) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = read_metrics(tmp_path)
    for epoch in (1, 2):
        wer = next(row.wer for row in rows if row.epoch == epoch and row.wer is not None)
        steps = [row for row in rows if row.epoch == epoch and row.loss is not None and row.target_tokens]
        loss = sum(row.loss * row.target_tokens for row in steps) / sum(row.target_tokens for row in steps)
        (line,) = (line for line in lines if line.startswith(f"epoch {epoch}/2: "))
        assert f"loss {loss:.3f}, WER {100 * wer:.2f} %, " in line and line.endswith("audio hours per hour")
    skipped = sum("--ctx_len" in line for line in (tmp_path / "bad_files.jsonl").read_text().splitlines())
    assert 0 < skipped < 8
    assert [line for line in lines if "skipped" in line] == [
        f"skipped {skipped} recordings: {skipped} too long for --ctx_len; listed in {tmp_path / 'bad_files.jsonl'}"
    ]
    assert len(set(lines)) == len(lines)


def test_validation_scores_every_utterance_of_sets_with_the_same_ids(corpus: Path, tmp_path: Path):
    valid = corpus / "valid.jsonl"
    assert train_script.main(arguments(corpus, tmp_path, valid_data=f"{valid},{valid}", epoch_steps=1)) == 0
    rows = read_rows(tmp_path / "validation.jsonl")
    assert [row.index for row in rows] == list(range(8))
    assert [row.hyp for row in rows[:4]] == [row.hyp for row in rows[4:]]
