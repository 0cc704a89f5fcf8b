import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch

from rwkv_speech.config import EvalConfig, ModelConfig, PredictConfig, TrainConfig, parse
from rwkv_speech.errors import UserError, exit_code

ROOT = Path(__file__).parents[1]
CONFIGS = [TrainConfig, EvalConfig, PredictConfig]


def test_parse_reads_types_and_keeps_defaults_for_empty_values():
    config = parse(TrainConfig, ["--n_layer", "", "--n_embd", "64", "--lr_state", "0.5", "--load_model", "x.pth"], "")
    assert (config.n_layer, config.n_embd, config.lr_state, config.load_model) == (None, 64, 0.5, "x.pth")
    assert config.micro_bsz == TrainConfig().micro_bsz


@pytest.mark.parametrize("config", CONFIGS)
def test_parse_names_the_valid_flags(config: type[ModelConfig], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        parse(config, ["--lernrate", "1"], "")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "--lernrate" in message and all(f"--{field.name}" in message for field in dataclasses.fields(config))


def test_parse_names_the_valid_choices(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        parse(TrainConfig, ["--lr_schedule", "steps"], "")
    assert stopped.value.code == 2
    assert re.search("cosine.*constant", capsys.readouterr().err)


def test_parse_rejects_a_word_for_a_number(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--micro_bsz", "four"], "")
    assert "--micro_bsz: invalid int value: 'four'" in capsys.readouterr().err


def test_help_describes_every_flag(capsys: pytest.CaptureFixture[str]):
    for config in CONFIGS:
        with pytest.raises(SystemExit) as stopped:
            parse(config, ["--help"], "what it does")
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert all(f"--{field.name}" in shown and field.metadata["help"] for field in dataclasses.fields(config))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_flag_is_read(config: type[ModelConfig]):
    script = {TrainConfig: "train.py", EvalConfig: "eval.py", PredictConfig: "predict.py"}[config]
    own = (
        "".join(path.read_text() for path in (ROOT / "src/rwkv_speech").rglob("*.py")) if config is TrainConfig else ""
    )
    text = own + (ROOT / script).read_text() + (ROOT / "src/rwkv_speech/config.py").read_text()
    unread = [f.name for f in dataclasses.fields(config) if not re.search(rf"\b(config|self|c)\.{f.name}\b", text)]
    assert unread == []


def test_every_variable_of_the_scripts_reaches_a_flag():
    for script in ("demo-state-tuning.sh", "demo-predict.sh"):
        text = (ROOT / "demo" / script).read_text()
        variables = set(re.findall(r"^(\w+)=\$\{\1", text, re.M))
        passed = set(re.findall(r"\$(\w+)\b", text.split("python=python3", 1)[1]))
        assert variables <= passed, script
        known = {f"--{field.name}" for config in CONFIGS for field in dataclasses.fields(config)}
        assert {word for word in shlex.split(text, comments=True) if word.startswith("--")} <= known, script


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_accelerator_without_a_gpu():
    assert ModelConfig().accelerator() == ("cpu", 1) and not ModelConfig().uses_bf16()
    with pytest.raises(UserError, match="--device: asked for 4 GPU.s., found 0; .*cpu"):
        ModelConfig(device="4").accelerator()
    with pytest.raises(UserError, match="--device: found 'tpu', expected auto, cpu, cpu:N .processes., cuda"):
        ModelConfig(device="tpu").accelerator()


def test_encoder_precision_follows_precision_unless_given():
    bf16, fp32 = torch.bfloat16, torch.float32
    for given, own, wanted in (
        ("fp32", "auto", fp32),
        ("bf16", "auto", bf16),
        ("bf16", "fp32", fp32),
        ("fp32", "bf16", bf16),
    ):
        assert ModelConfig(device="cpu", precision=given, encoder_precision=own).encoder_dtype() == wanted


@pytest.mark.parametrize("name", ["valid_data", "feature_cache"])
def test_stage_3_takes_nothing_that_ranks_do_each_in_its_own_time(name: str):
    TrainConfig(strategy="deepspeed_stage_2", **{name: "x"}).check_strategy()
    TrainConfig(strategy="deepspeed_stage_3").check_strategy()
    with pytest.raises(UserError, match=f"--{name}: found 'x' with --strategy deepspeed_stage_3, expected nothing"):
        TrainConfig(strategy="deepspeed_stage_3", **{name: "x"}).check_strategy()


def test_check_sizes_names_flag_given_and_found():
    ModelConfig(n_layer=24).check_sizes(24, 2048)
    with pytest.raises(UserError, match="--n_embd: given 2560, but .* 2048"):
        ModelConfig(n_layer=24, n_embd=2560).check_sizes(24, 2048)


def test_exit_code(capsys: pytest.CaptureFixture[str]):
    def fail() -> None:
        raise UserError("--x: mend it")

    assert exit_code(lambda: None) == 0 and exit_code(fail) == 2
    assert capsys.readouterr().err == "error: --x: mend it\n"
