"""All kinds of lines in one run: transcripts, answers learned by KL, conversations, each with a state and soft prompt.

Killed, it ends as if it had not been; two processes take the steps of one.
"""

import json
from pathlib import Path

import pytest
import torch
from assertions import assert_rms_close
from run_files import LINEAR_STEPS, assert_steps_alike, column, command_line, finish, learned, start, wait_for_a_point

from rwkv_speech.files import sha256_file
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.synthetic.make_corpus import Flags, make_corpus
from rwkv_speech.training.points import newest_point


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four transcripts, six questions, three conversations."""
    folder = tmp_path_factory.mktemp("mixed")
    make_corpus(Flags(str(folder), seed=3, train=16, valid=1, test=1))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    questions = [{**line, "task": "qa", "source_text": line["text"], "answer": "yes"} for line in lines[4:10]]
    for line in questions:
        del line["text"]
    turns = [{name: line[name] for name in ("audio_filepath", "duration")} | {"answer": "good"} for line in lines[10:]]
    typed = {"input": "the weather", "answer": "is good"}
    talks = [{"task": "chat", "turns": x} for x in (turns[:2], [turns[2], typed, turns[3]], turns[4:])]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (*lines[:4], *questions, *talks)))
    return folder / "mixed.jsonl"


def arguments(manifest: Path, run: Path, **more: object) -> list[str]:
    values = {
        "device": "cpu", "proj_dir": run, "train_data": manifest, "loss": "kl", "soft_prompt": 2, "micro_bsz": 2,
        "volume_db": "-6,6", "workers": 0, "log_every": 1, "warmup_steps": 1, "save_steps": 1, **LINEAR_STEPS, **more,
    }  # fmt: skip
    return command_line(**values)


def test_a_killed_run_ends_as_the_whole_one(manifest: Path, tmp_path: Path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(arguments(manifest, whole))
    process = start(arguments(manifest, run))
    wait_for_a_point(process, run)
    process.kill()
    process.communicate()
    point = newest_point(run / "resume")
    assert point is not None and point.info["epoch"] == 0 and len(column(whole, "loss")) == 7 > point.step
    finish(arguments(manifest, run))
    trained = load_trained(run / "last.safetensors")
    assert list(trained.initial_states) == list(trained.soft_prompts) == ["asr", "chat", "qa"]
    assert all(x.any() for x in trained.initial_states.values())
    assert sha256_file(run / "last.safetensors") == sha256_file(whole / "last.safetensors")
    for name in ("loss", "grad_norm", "lr_adapter", "target_tokens"):
        assert column(run, name) == column(whole, name), name


def moments(run: Path) -> list[torch.Tensor]:
    """AdamW's first moments behind the first step: a tenth of its gradients."""
    saved = torch.load(run / "resume/step-1/trainer.ckpt", weights_only=False)
    return [x["exp_avg"] for x in saved["optimizer_states"][0]["state"].values()]


def test_two_processes_take_the_steps_of_one(manifest: Path, tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(arguments(manifest, one, accumulate=4))
    process = start(arguments(manifest, two, accumulate=2, device="cpu:2", strategy="ddp"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert len(column(one, "loss")) == 2 and column(one, "target_tokens") == column(two, "target_tokens")
    assert_steps_alike(two, one, first_norm=1e-6, later_norms=2e-4)
    for x, y in zip(moments(one), moments(two), strict=True):
        assert_rms_close("gradient", y, x, 1e-6)
    expected, found = learned(one), learned(two)
    assert len(expected) == 4 + 3 + 3
    for name, x in expected.items():
        assert x.any(), name
        assert_rms_close(name, found[name], x, 1e-4)
