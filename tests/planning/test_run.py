"""`train.py --plan 1` without the model's file, and without data."""

from pathlib import Path

import pytest
import train as train_script

from rwkv_speech.config import TrainConfig
from rwkv_speech.planning import cost, run, tables

SIZES = ["--plan", "1", "--n_layer", "32", "--n_embd", "2560"]


@pytest.fixture(autouse=True)
def _only_what_differs(monkeypatch: pytest.MonkeyPatch):
    """What other models and batches would need takes seconds; test_tables.py and test_cost.py have it."""
    monkeypatch.setattr(tables, "_growth", lambda *_: [])
    monkeypatch.setattr(cost, "largest_micro_bsz", lambda *_: 1)


def shown(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert train_script.main(flags) == 0
    return capsys.readouterr().out


def test_a_plan_needs_neither_model_nor_data(capsys: pytest.CaptureFixture[str]):
    out = shown(capsys, *SIZES, "--plan_hours", "960", "--device", "4", "--load_model", "missing.pth")
    notes = [line for line in out.splitlines() if line.startswith("note:")]
    assert notes[0] == "note: missing.pth is not here: planned as RWKV-6 from --n_layer 32 and --n_embd 2560"
    assert "960 h of audio are assumed, in utterances of 12.3 s on average and 35 s at most" in notes[-1]
    assert "3,099,863,040" in out and "315,453,120" in out
    assert "960.0 h of audio in 280,976 utterances, 12.3 s on average" in out
    assert "70,244 micro batches, 4 in an optimizer step; 17,561 steps an epoch" in out
    assert "for 4 utterances of 35.0 s with 140 tokens of text" in out and "needed" in out


def test_a_plan_knows_the_published_sizes_of_whisper():
    notes = list[str]()
    config = TrainConfig(load_model="missing.pth", n_layer=2, n_embd=64, encoder="openai/whisper-large-v3")
    found = run._sizes(config, notes).parameters["encoder"]
    assert notes[-1] == "encoder openai/whisper-large-v3 is not here: planned with its published sizes"
    # Layers, convolutions, positions and the last norm.
    layer = 4 * 1280**2 + 3 * 1280 + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    assert found == 32 * layer + 1280 * (3 * (128 + 1280) + 2 + 1500 + 2)


def test_a_plan_without_data_reads_the_model_s_sizes_from_its_file(capsys: pytest.CaptureFixture[str]):
    out = shown(capsys, "--plan", "1", "--plan_hours", "1", "--device", "cpu", "--load_model", "tiny")
    assert "is not here" not in out and "293 utterances" in out


def test_a_plan_without_the_model_takes_the_data_s_durations(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    manifest = tmp_path / "data.jsonl"
    lines = [f'{{"audio_filepath": "{i}.wav", "text": "one", "duration": {i + 1}}}\n' for i in range(9)]
    manifest.write_text("".join(lines))
    for i in range(9):
        (tmp_path / f"{i}.wav").touch()
    out = shown(capsys, *SIZES, "--train_data", str(manifest), "--device", "1")
    assert "in 9 utterances, 5.0 s on average" in out and "utterances of 9.0 s" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [*SIZES, "--plan_hours", "9", "--train_data", "x.jsonl"],
            "found 9.0 with --train_data 'x.jsonl', expected one",
        ),
        (["--plan", "1", "--n_layer", "2", "--n_embd", "100", "--plan_hours", "9"], "--n_embd: found 100"),
        (["--plan", "1", "--load_model", "missing.pth", "--plan_hours", "9"], "missing.pth: no such file"),
        (SIZES, "--plan_hours: found None with --train_data '', expected one of the two"),
        (["--plan", "1", "--load_model", "tiny", "--n_layer", "9", "--plan_hours", "9"], "--n_layer: given 9"),
        (["--plan_hours", "9"], "--plan_hours"),
        (["--plan", "1", "--plan_hours", "0"], "--plan_hours: found 0.0"),
    ],
)
def test_what_a_plan_cannot_be_made_from(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = train_script.main(flags)
    except SystemExit as stopped:  # what the parser says by itself
        code = int(stopped.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error
