import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_speech import text
from rwkv_speech.config import (
    DATA_FORMS,
    LABEL_MODES,
    NORMALIZERS,
    OUTPUT_FORMATS,
    DecodeFlags,
    EvalConfig,
    ModelConfig,
    PageConfig,
    PredictConfig,
    ServeConfig,
    TrainConfig,
    output_formats,
)
from rwkv_speech.errors import UserError
from rwkv_speech.flags import parse

ROOT = Path(__file__).parents[1]
CONFIGS = [TrainConfig, EvalConfig, PredictConfig, ServeConfig, PageConfig]


def said(config: type[ModelConfig], *argv: str) -> str:
    """What is said of a wrong command line."""
    with pytest.raises(UserError) as caught:
        parse(config, argv, "")
    return str(caught.value)


def test_parse_reads_types_and_keeps_defaults_for_empty_values():
    config = parse(TrainConfig, ["--n_layer", "", "--n_embd", "64", "--lr_state", "0.5", "--load_model", "x.pth"], "")
    assert (config.n_layer, config.n_embd, config.lr_state, config.load_model) == (None, 64, 0.5, "x.pth")
    assert config.micro_bsz == TrainConfig().micro_bsz


def test_parse_takes_values_that_begin_with_a_minus_sign_and_the_last_of_several():
    config = parse(TrainConfig, ["--volume_db", "-6,6", "--seed", "1", "--seed=2"], "")
    assert (config.volume_db, config.seed) == ("-6,6", 2)


def test_parse_names_the_flag_that_was_meant():
    assert said(TrainConfig, "--lr_adaptor", "1").startswith(
        "--lr_adaptor: there is no such flag; did you mean --lr_ad"
    )
    assert "did you mean" not in said(TrainConfig, "--zzzzzzzz", "1")
    assert said(TrainConfig, "a.wav").startswith("'a.wav': found a word that belongs to no flag")
    assert said(PredictConfig, "--device") == "--device: found no value, expected one argument"


def test_parse_names_flag_found_and_expected():
    assert said(TrainConfig, "--lr_schedule", "steps") == (
        "--lr_schedule: found 'steps', expected one of cosine, constant; leave it out for cosine"
    )
    assert said(TrainConfig, "--micro_bsz", "four") == (
        "--micro_bsz: found 'four', expected a whole number at least 1; leave it out for 4"
    )
    assert said(TrainConfig, "--beta1", "1") == (
        "--beta1: found 1.0, expected a number at least 0 and below 1; leave it out for 0.9"
    )
    assert said(TrainConfig, "--device", "cpu:0").startswith("--device: found 'cpu:0', expected auto, cpu, cpu:N (pro")


NUMBERS = [
    (config, f)
    for config in CONFIGS
    for f in dataclasses.fields(config)
    if f.type not in (str, str | tuple[str, ...], tuple[str, ...])
]


@pytest.mark.parametrize(("config", "field"), NUMBERS, ids=lambda x: getattr(x, "name", None) or x.__name__)
def test_every_number_has_a_range_and_is_finite(config: type[ModelConfig], field: dataclasses.Field[object]):
    bounds = field.metadata["bounds"].values()
    assert field.metadata["choices"] or any(bound is not None for bound in bounds)
    whole = field.type in (int, int | None)
    negatives = field.name in ("logprob_threshold", "presence_penalty", "frequency_penalty")
    for wrong in ("nan", "inf", "-2000" if negatives else "-1", "x", "9" * 30 if whole else "1e999"):
        assert said(config, f"--{field.name}", wrong).startswith(f"--{field.name}: found "), wrong


def test_a_flag_without_effect_is_an_error():
    assert said(TrainConfig, "--patience", "2") == (
        "--patience: found without --valid_data, where it has no effect; add --valid_data, or leave it out"
    )
    assert parse(TrainConfig, ["--patience", "2", "--valid_data", "x.jsonl"], "").patience == 2
    assert parse(TrainConfig, ["--patience", ""], "").patience == 0


def test_words_that_belong_to_no_flag_stand_anywhere():
    def inputs(*argv: str) -> tuple[str, ...]:
        return parse(PredictConfig, argv, "").inputs

    assert inputs("a.wav", "--beam", "4", "b c.wav", "--draft=1", "d,e.wav") == ("a.wav", "b c.wav", "d,e.wav")
    assert inputs("--verbose", "1", "--", "-a.wav", "--beam") == ("-a.wav", "--beam")
    assert inputs("", "-", "\udcff.wav", "two\nlines") == ("", "-", "\udcff.wav", "two\nlines")
    assert inputs("--file_path", "a.wav") == ()


def test_a_file_that_begins_with_a_minus_sign_is_no_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("-a.wav").touch()
    assert "if the file is meant, write ./-a.wav" in said(PredictConfig, "-a.wav")
    assert said(PredictConfig, "a.wav", "--bean", "4").startswith("--bean: there is no such flag; did you mean --beam")


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        ("", ()),
        ("srt", ("srt",)),
        ("vtt, json,vtt", ("vtt", "json")),
        ("all", OUTPUT_FORMATS),
        ("txt,all", OUTPUT_FORMATS),
    ],
)
def test_output_formats(text: str, formats: tuple[str, ...]):
    assert output_formats(parse(PredictConfig, ["--output_format", text], "").output_format) == formats


def test_help_describes_every_flag_within_100_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "100")
    for config in CONFIGS:
        with pytest.raises(SystemExit) as stopped:
            parse(config, ["--help"], "what it does")
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        fields = dataclasses.fields(config)
        flags = [f"[{x.name} ...]" if x.type == tuple[str, ...] else f"--{x.name} " for x in fields]
        assert all(flag in shown for flag in flags) and all(field.metadata["help"] for field in fields)
        assert max(map(len, shown.splitlines())) <= 100
        assert all((form in shown) == (config in (TrainConfig, EvalConfig)) for form in DATA_FORMS)


def test_choices_are_those_of_the_rooms_that_implement_them():
    assert LABEL_MODES == text.LABEL_MODES
    assert NORMALIZERS == text.NORMALIZERS


@pytest.mark.parametrize("script", ["train", "eval", "predict"])
@pytest.mark.parametrize("flag", ["--help", "--helb"])
def test_help_and_wrong_flags_are_answered_before_torch_is_imported(script: str, flag: str):
    code = f"import sys, {script}\ntry: {script}.main([{flag!r}])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--help" in done.stdout + done.stderr, done.stderr


@pytest.mark.parametrize("config", CONFIGS)
def test_every_flag_is_read(config: type[ModelConfig]):
    scripts = {TrainConfig: "train.py", EvalConfig: "eval.py", PredictConfig: "src/rwkv_speech/predict.py"}
    script = scripts.get(config, "src/rwkv_speech/serving/server.py")
    shared = [path for name in ("config.py", "serving", "checks.py", "devices.py", "models", "scoring") for path in
              [ROOT / "src/rwkv_speech" / name, *(ROOT / "src/rwkv_speech" / name).glob("*.py")]]  # fmt: skip
    sources = (ROOT / "src/rwkv_speech").rglob("*.py") if config is TrainConfig else filter(Path.is_file, shared)
    source = (ROOT / script).read_text() + "".join(path.read_text() for path in sources)
    handed_on = {field.name for field in dataclasses.fields(DecodeFlags)}  # as Options
    names = [field.name for field in dataclasses.fields(config) if field.name not in handed_on]
    assert [name for name in names if not re.search(rf'\b(_?config|_?limits|self|c)(\.|, "){name}\b', source)] == []


@pytest.mark.parametrize("name", ["valid_data", "feature_cache"])
def test_stage_3_takes_nothing_that_ranks_do_each_in_its_own_time(name: str):
    TrainConfig(strategy="deepspeed_stage_2", **{name: "x"}).check()
    TrainConfig(strategy="deepspeed_stage_3").check()
    with pytest.raises(UserError, match=f"--{name}: found 'x' with --strategy deepspeed_stage_3, expected nothing"):
        TrainConfig(strategy="deepspeed_stage_3", **{name: "x"}).check()
