"""What the checks let pass; tests/journeys/test_mistakes.py holds what they refuse."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rwkv_speech.checks import before_evaluation, before_prediction, before_training, check_devices, named_inputs
from rwkv_speech.config import EvalConfig, ModelConfig, PredictConfig, TrainConfig
from rwkv_speech.errors import UserError


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").touch()
    return tmp_path / "a.jsonl"


def test_before_training_leaves_nothing_behind(manifest: Path, tmp_path: Path):
    folder = tmp_path / "new" / "run"
    before_training(TrainConfig(device="cpu", train_data=f"{manifest}@2,{manifest}", proj_dir=str(folder)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    "spec",
    ["hf:a/b:train", "hf:a/b:c:train[:1%]", "librispeech:test-clean", "tar:a-{000..009}.tar", "hf-stream:a:train", "."],
)
def test_before_training_opens_no_data(spec: str, tmp_path: Path):
    before_training(TrainConfig(device="cpu", train_data=spec, proj_dir=str(tmp_path)))


def test_a_plan_needs_no_folder(manifest: Path):
    before_training(TrainConfig(device="cpu", train_data=str(manifest), proj_dir=f"{manifest}/run", plan=1))
    with pytest.raises(UserError, match="--proj_dir: .* cannot be written to"):
        before_training(TrainConfig(device="cpu", train_data=str(manifest), proj_dir=f"{manifest}/run"))


def test_what_runs_on_a_gpu_is_refused_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for wanted in ({"wkv6": "tiles"}, {"strategy": "deepspeed_stage_2"}):
        check_devices(TrainConfig(device="auto", **wanted))
        with pytest.raises(UserError, match="on a CPU, expected a GPU"):
            check_devices(TrainConfig(device="cpu", **wanted))
    check_devices(ModelConfig(device="cpu", wkv6="torch"))


def test_packed_weights_are_for_all_but_shared_out_layers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cpu", "1"):
        for precision in ("int8", "nf4"):
            check_devices(ModelConfig(device=device, precision=precision))
            TrainConfig(device=device, precision=precision, strategy="deepspeed_stage_2").check()
    with pytest.raises(UserError, match="--precision: found 'nf4' with --strategy deepspeed_stage_3"):
        TrainConfig(precision="nf4", strategy="deepspeed_stage_3").check()


def test_updates_to_start_with_are_looked_for(tmp_path: Path):
    given = TrainConfig(device="cpu", train_data=str(tmp_path), peft="lora", lora_from=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="--lora_from: no such file or folder .*gone"):
        before_training(given)


def test_the_one_name_in_file_path_may_hold_a_comma(tmp_path: Path):
    (tmp_path / "a,b.wav").touch()
    assert named_inputs(PredictConfig(file_path=str(tmp_path / "a,b.wav"))) == [str(tmp_path / "a,b.wav")]
    given = PredictConfig(inputs=("c,d.wav",), file_path="a.wav, b.wav")
    assert named_inputs(given) == ["c,d.wav", "a.wav", "b.wav"]


def test_compile_is_refused_where_torchs_compiler_would_fail(monkeypatch: pytest.MonkeyPatch, manifest: Path):
    real = importlib.util.find_spec

    def elsewhere(name: str) -> object:
        return SimpleNamespace(origin="/my clone/torch/__init__.py") if name == "torch" else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", elsewhere)
    with pytest.raises(UserError, match=r"--compile: found /my clone/torch/.*a folder with a blank"):
        before_training(TrainConfig(device="cpu", train_data=str(manifest), compile=1))


@pytest.mark.parametrize(("check", "config"), [(before_evaluation, EvalConfig), (before_prediction, PredictConfig)])
def test_a_wrong_list_of_keywords_is_named_before_weights_are_looked_for(
    check: Callable[[Any], None], config: type[EvalConfig | PredictConfig], tmp_path: Path
):
    (tmp_path / "names.txt").write_text("Ann\nBob\tmuch\n")
    given = config(proj_dir=str(tmp_path / "nothing"), keywords=str(tmp_path / "names.txt"), device="cpu")
    with pytest.raises(UserError, match=r"names\.txt, line 2: found 'much' behind the tab"):
        check(given)
