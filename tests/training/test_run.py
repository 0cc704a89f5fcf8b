"""Training through its command line, on the embedded default: what it writes, shows and repeats."""

import csv
import json
from pathlib import Path

import eval as eval_script
import pytest
import torch
import train as train_script
from run_files import column, tiny_run
from safetensors.torch import load_file

from rwkv_speech.decoding.results import read_rows
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.reports.record import read_metrics


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
    assert train_script.main(tiny_run(data.parent / "x", run, **{**flags, "train_data": data})) == 0
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
    assert train_script.main(tiny_run(corpus, tmp_path / "run", **flags)) == 0
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
    assert train_script.main(tiny_run(corpus, tmp_path / "run", plan=1)) == 0
    shown = capsys.readouterr().out
    model = SpeechLM.build(Parts("tiny"))
    trained = (sum(p.numel() for p in part.parameters()) for part in (model.adapter, model.initial_states))
    assert all(f"{count:,}" in shown for count in trained)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.device_count() >= 64, reason="plans for GPUs that are not there")
def test_plan_for_gpus_that_are_not_here(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_script.main(tiny_run(corpus, tmp_path / "run", device="64", plan=1)) == 0
    shown = capsys.readouterr().out
    assert "not measured: that takes the model, the data and 64 GPU(s)" in shown and "64 x auto" in shown
    assert "bfloat16" in shown  # what GPUs compute in, unless told otherwise


def test_report_and_run_record_are_written(run: Path):
    page = (run / "report.html").read_text()
    assert "<svg" in page and "WER" in page
    assert json.loads((run / "run.json").read_text())["flags"]["epoch_count"] == 2


def test_train_twice_gives_the_same_weights(corpus: Path, tmp_path: Path):
    for name in ("a", "b"):
        assert train_script.main(tiny_run(corpus, tmp_path / name)) == 0
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_train_streams_rows_that_no_disk_holds(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import datasets

    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    audio = [{"bytes": (corpus / row["audio_filepath"]).read_bytes(), "path": None} for row in rows]
    table = datasets.Dataset.from_dict({"audio": audio, "text": [row["text"] for row in rows]})
    (tmp_path / "rows").mkdir()
    table.to_parquet(tmp_path / "rows" / "train-00000.parquet")
    flags = {"train_data": f"hf-stream:{tmp_path / 'rows'}:train", "workers": 0}
    assert train_script.main(tiny_run(corpus, tmp_path / "run", epoch_steps=2, **flags)) == 0
    assert load_trained(tmp_path / "run" / "last.safetensors").metrics["step"] == 2
    assert train_script.main(tiny_run(corpus, tmp_path / "other", **flags)) == 2
    assert "--epoch_steps: found nothing" in capsys.readouterr().err
    assert train_script.main(tiny_run(corpus, tmp_path / "other", epoch_steps=2, plan=1, **flags)) == 2
    assert "--plan: hf-stream:" in capsys.readouterr().err


def test_train_augments_and_keeps_the_best(corpus: Path, tmp_path: Path):
    noise = corpus / "train"
    flags = {"speed": "0.9,1,1.1", "volume_db": "-6,6", "noise_dir": noise, "time_masks": 1, "freq_masks": 1,
             "valid_data": corpus / "valid.jsonl", "epoch_count": 3, "keep_best": 1, "patience": 1}  # fmt: skip
    for name in ("a", "b"):
        assert train_script.main(tiny_run(corpus, tmp_path / name, **flags)) == 0
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(list((tmp_path / "a").glob("best-epoch-*.safetensors"))) == 1


def test_run_that_ended_early_is_not_gone_on_with(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # No WER is lower by more than 10: the second validation is the first that does not help.
    flags = {"valid_data": corpus / "valid.jsonl", "epoch_count": 9, "patience": 1, "min_delta": 10}
    for _ in range(2):
        assert train_script.main(tiny_run(corpus, tmp_path / "run", **flags)) == 0
        assert load_trained(tmp_path / "run" / "last.safetensors").metrics["epoch"] == 2
        assert "has ended early, after epoch 2: no lower error in 1 validations" in capsys.readouterr().out
    flags["patience"] = 2
    assert train_script.main(tiny_run(corpus, tmp_path / "run", **flags)) == 0
    assert load_trained(tmp_path / "run" / "last.safetensors").metrics["epoch"] == 3


def test_the_screen_tells_each_epoch_and_what_was_skipped(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = {"valid_data": corpus / "valid.jsonl", "epoch_count": 2, "ctx_len": 40}
    assert train_script.main(tiny_run(corpus, tmp_path, **flags)) == 0
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
    assert train_script.main(tiny_run(corpus, tmp_path, valid_data=f"{valid},{valid}", epoch_steps=1)) == 0
    rows = read_rows(tmp_path / "validation.jsonl")
    assert [row.index for row in rows] == list(range(8))
    assert [row.hyp for row in rows[:4]] == [row.hyp for row in rows[4:]]


def test_a_run_whose_questions_are_transcribed_first(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    for line in lines[::2]:
        line |= {"task": "qa", "source_text": line.pop("text"), "answer": "yes"}
    (corpus / "first.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = {"train_data": corpus / "first.jsonl", "micro_bsz": 4}
    first = plain | {"transcribe_first": "qa"}
    assert train_script.main(tiny_run(corpus, tmp_path / "run", **first)) == 0
    assert load_trained(tmp_path / "run/last.safetensors").parts.transcribes == ("qa",)
    capsys.readouterr()
    assert train_script.main(tiny_run(corpus, tmp_path / "run", **plain)) == 2
    assert "--transcribe_first: was 'qa', now ''" in capsys.readouterr().err
    # A new state on its adapter: the old one still transcribes first.
    topic = lines[1] | {"task": "topic", "text": "cat"}
    (corpus / "topic.jsonl").write_text("".join(json.dumps(topic) + "\n" for _ in range(4)))
    new = {"train_data": corpus / "topic.jsonl", "micro_bsz": 4, "init_from": tmp_path / "run", "freeze": "adapter"}
    assert train_script.main(tiny_run(corpus, tmp_path / "new", **new)) == 0
    trained = load_trained(tmp_path / "new/last.safetensors")
    assert set(trained.initial_states) == {"asr", "qa", "topic"} and trained.parts.transcribes == ("qa",)
