"""Two processes on a CPU: the same steps as one, resumed as one, each process with its own data."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from assertions import assert_rms_close
from run_files import (
    LINEAR_STEPS,
    SAID_TO_END,
    assert_steps_alike,
    column,
    command_line,
    finish,
    learned,
    random_base,
    start,
    wait_for_a_point,
)
from safetensors.torch import load_file
from tiny_models import RANDOM_TENSORS

from rwkv_speech.files import sha256_file
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.synthetic.make_corpus import Flags, make_corpus
from rwkv_speech.training.points import newest_point


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(Flags(str(folder), seed=3, train=16, valid=3, test=1))
    return folder


def train(corpus: Path, run: Path, *, wait: bool = True, **more: object) -> "subprocess.Popen[str] | None":
    """The real command, but for a single process, which is this one."""
    values = {
        "device": "cpu:2", "strategy": "ddp", "proj_dir": run, "train_data": corpus / "train.jsonl", "micro_bsz": 2,
        "workers": 0, "log_every": 1, "warmup_steps": 1, "lr_adapter": 1e-3, "save_steps": 1, **more,
    }  # fmt: skip
    argv = command_line(**values)
    if values["device"] == "cpu":
        finish(argv)
        return None
    process = start(argv, start_new_session=True)
    if wait:
        shown, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        lines = shown.splitlines()
        assert len(set(lines)) == len(lines)
    return process


def first_moments(run: Path) -> list[torch.Tensor]:
    saved = torch.load(run / "resume" / "step-1" / "trainer.ckpt", weights_only=False)
    return [x["exp_avg"] for x in saved["optimizer_states"][0]["state"].values()]


def test_two_ranks_take_the_steps_of_one(corpus: Path, tmp_path: Path):
    """1 rank x 4 micro batches is 2 ranks x 2."""
    train(corpus, tmp_path / "one", device="cpu", strategy="auto", accumulate=4, **LINEAR_STEPS)
    train(corpus, tmp_path / "two", accumulate=2, **LINEAR_STEPS)
    assert len(column(tmp_path / "one", "loss")) == 2
    assert_steps_alike(tmp_path / "two", tmp_path / "one", first_norm=1e-6, later_norms=2e-4)
    # AdamW's first moment behind the first step is a tenth of its gradient.
    for one, two in zip(first_moments(tmp_path / "one"), first_moments(tmp_path / "two"), strict=True):
        assert_rms_close("gradient", two, one, 1e-6)
    one, two = (load_trained(tmp_path / run / "last.safetensors").trained_on for run in ("one", "two"))
    assert one == two is not None
    first, second = learned(tmp_path / "one"), learned(tmp_path / "two")
    for name, x in first.items():
        assert_rms_close(name, second[name], x, 1e-4)


def test_ranks_count_broken_recordings_together_and_say_each_line_once(corpus: Path, tmp_path: Path):
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio_filepath"] = str(corpus / row["audio_filepath"])
    (tmp_path / "noise.wav").write_bytes(b"no audio")
    broken = [{"audio_filepath": "noise.wav", "text": "a"}] * 3
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *broken]))
    flags = {"train_data": tmp_path / "train.jsonl", "ctx_len": 40, "epoch_count": 2}
    process = train(corpus, tmp_path / "run", wait=False, max_bad=2, **flags)
    _, errors = process.communicate(timeout=100)
    listed = tmp_path / "run" / "bad_files.jsonl"
    assert process.returncode == 2 and errors.count("\n") == 1, errors[-3000:]
    assert f"error: {listed}: 3 recordings could not be used; expected 2 at most" in errors
    shown, _ = train(corpus, tmp_path / "run", wait=False, max_bad=3, **flags).communicate(timeout=100)
    assert "3 broken" in shown and "4 broken" not in shown and f"; listed in {listed}" in shown
    assert [path.name for path in listed.parent.glob("bad_files*")] == [listed.name]
    assert len(set(shown.splitlines())) == len(shown.splitlines()) and "are too long for --ctx_len 40" in shown


# The second costs as much again, and ZeRO-2's tests have an RWKV-7, too.
@pytest.mark.parametrize("family", ["x060", pytest.param("x070", marks=pytest.mark.soak)])
def test_two_ranks_resume_exactly(corpus: Path, tmp_path: Path, family: str):
    base = random_base(tmp_path / "base.pth", RANDOM_TENSORS[family])
    flags = {**base, "valid_data": corpus / "valid.jsonl", "ctc": 1, "ctc_epochs": 1}
    flags |= {"precision": "int8", "peft": "lora", "lora_rank": 4, "lora_dropout": 0.1, "train_parts": "ln,time"}
    train(corpus, tmp_path / "whole", **flags)
    run = tmp_path / "killed"
    process = train(corpus, run, wait=False, **flags)
    wait_for_a_point(process, run)
    os.killpg(process.pid, 9)
    process.communicate()
    point = newest_point(run / "resume")
    assert point is not None and point.info["world_size"] == 2
    train(corpus, run, **flags)
    assert load_trained(run / "last.safetensors").ctc is not None
    for name in ("last.safetensors", "best.safetensors"):
        assert sha256_file(run / name) == sha256_file(tmp_path / "whole" / name)
    assert column(run, "loss") == column(tmp_path / "whole", "loss")
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["id"] for line in lines}) == 3


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_ends_all_ranks_after_the_same_step(
    corpus: Path, tmp_path: Path, number: signal.Signals, to_all: bool
):
    run = tmp_path / "run"
    process = train(corpus, run, wait=False, save_steps=1000, epoch_count=2)
    table = run / "logs/csv/metrics.csv"
    while not (table.exists() and table.read_text().count("\n") > 1):  # the first step is done
        assert process.poll() is None
    os.killpg(process.pid, number) if to_all else process.send_signal(number)
    shown, _ = process.communicate(timeout=100)
    point = newest_point(run / "resume")
    assert process.returncode == 128 + number and point is not None and point.step > 0
    assert len(SAID_TO_END.findall(shown)) == shown.count("the same command resumes") == 1


def test_another_number_of_ranks_goes_on_from_the_end_of_an_epoch(corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    train(corpus, run, epoch_count=2, lr_schedule="constant", epoch_steps=2)
    before = load_file(run / "last.safetensors")
    point = newest_point(run / "resume")
    assert point is not None and point.info["epoch"] == 2
    # As if it had been killed behind the third of its four steps.
    (run / "resume" / "step-4").rename(tmp_path / "step-4")
    taken = torch.load(run / "resume" / "step-3" / "trainer.ckpt", weights_only=False)
    train(corpus, run, device="cpu", strategy="auto", epoch_count=2, lr_schedule="constant", epoch_steps=2)
    after = load_file(run / "last.safetensors")
    point = newest_point(run / "resume")
    assert point is not None and point.step == 5 and point.info["world_size"] == 1
    state = torch.load(point.path / "trainer.ckpt", weights_only=False)["optimizer_states"][0]["state"]
    assert [x["step"] for x in state.values()] == [5.0] * len(state)
    assert [x["step"] for x in taken["optimizer_states"][0]["state"].values()] == [3.0] * len(state)
    assert all(x.isfinite().all() for x in after.values())
    assert any(not torch.equal(x, before[name]) for name, x in after.items())
