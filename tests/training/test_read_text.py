"""--input text through the command lines: states that read, without an encoder, on no adapter or on a run's."""

import json
from dataclasses import replace
from pathlib import Path

import eval as eval_script
import predict as predict_script
import pytest
import torch
import train as train_script
from run_files import command_line
from safetensors.torch import load_file

from rwkv_speech import tiny
from rwkv_speech.decoding.results import read_rows
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM

WORDS = ["one", "two", "three"]
ROWS = [{"source_text": f"{x} {y}", "text": f"{y} {x}", "task": "st", "lang": "en"} for x in WORDS for y in WORDS]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "pairs.jsonl"


def arguments(manifest: Path, run: Path, **more: object) -> list[str]:
    values = {
        "load_model": "tiny", "device": "cpu", "proj_dir": run, "train_data": manifest, "input": "text",
        "workers": 0, "warmup_steps": 1, "lr_schedule": "constant", **more,
    }  # fmt: skip
    return command_line(**values)


def test_no_encoder_is_loaded_or_needed(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delattr(SpeechEncoder, "from_pretrained")
    flags = {"encoder": "/gone/encoder", "valid_data": manifest}
    for name, counts in (("whole", [2]), ("run", [1, 2])):
        for count in counts:
            assert train_script.main(arguments(manifest, tmp_path / name, **flags, epoch_count=count)) == 0
    assert "9 of 9 have no audio_filepath" in capsys.readouterr().out
    whole, found = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "run"))
    assert list(found) == ["initial_states.st_en"] and found["initial_states.st_en"].any()
    assert torch.equal(whole["initial_states.st_en"], found["initial_states.st_en"])  # resumed
    trained = load_trained(tmp_path / "run/last.safetensors")
    assert trained.parts is not None and trained.parts.encoder == "/gone/encoder"
    words = ["--proj_dir", str(tmp_path / "run"), "--eval_data", str(manifest), "--device", "cpu"]
    assert eval_script.main([*words, "--input", "text"]) == 0
    rows = read_rows(next((tmp_path / "run").glob("eval-*.jsonl")))
    assert [(row.source_text, row.ref, row.seconds) for row in rows] == [
        (row["source_text"], row["text"], 0.0) for row in ROWS
    ]
    assert eval_script.main([*words, "--input", "text", "--untrained", "1", "--task", "st_en"]) == 0
    typed = ["--session", str(tmp_path / "a.session"), "--text", "one two"]
    assert predict_script.main(["--proj_dir", str(tmp_path / "run"), "--device", "cpu", *typed]) == 0
    capsys.readouterr()
    assert eval_script.main(words) == 2
    assert "has no adapter, for it was trained with --input text" in capsys.readouterr().err
    hearing = arguments(manifest, tmp_path / "no", input="audio", init_from=tmp_path / "run", freeze="adapter")
    assert train_script.main(hearing) == 2
    assert "has no adapter, for it was trained with --input text" in capsys.readouterr().err


def test_on_the_adapter_of_a_run_all_else_stays(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start = SpeechLM.build(Parts(tiny.NAME, stack=4, adapter_hidden=64, separator=":"))
    torch.nn.init.normal_(start.initial_states["asr"], std=0.1)
    start.save(tmp_path / "start/best.safetensors")
    flags = {"init_from": tmp_path / "start"}
    assert train_script.main(arguments(manifest, tmp_path / "run", **flags, encoder="no/such-encoder")) == 0
    before, after = (load_file(tmp_path / name) for name in ("start/best.safetensors", "run/last.safetensors"))
    assert after.pop("initial_states.st_en").any()
    assert after.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in after.items())
    parts = load_trained(tmp_path / "run/last.safetensors").parts
    assert parts == replace(start.parts, encoder="no/such-encoder")
    # With the encoder it hears what it heard.
    again = SpeechLM.from_pretrained(tmp_path / "run", Parts(encoder=tiny.NAME))
    assert again.adapter_sha256 == start.adapter_sha256
    capsys.readouterr()
    for flag, value in (("stack", 3), ("adapter_hidden", 8), ("separator", "!")):
        assert train_script.main(arguments(manifest, tmp_path / "no", **flags, **{flag: value})) == 2
        assert f"--{flag}: found {value!r}, but {tmp_path / 'start'}" in capsys.readouterr().err
    assert train_script.main(arguments(manifest, tmp_path / "no", **flags, ctc=1)) == 2
    assert "--ctc: found 1 with --input text, which hears nothing" in capsys.readouterr().err
