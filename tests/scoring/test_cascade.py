"""The cascade of two runs of random weights, against the same steps taken one by one."""

import json
from dataclasses import replace
from pathlib import Path

import eval as eval_script
import pytest
import torch
from manifests import write_audio, write_manifest

from rwkv_speech.data.sources import open_source
from rwkv_speech.decoding.results import read_rows
from rwkv_speech.decoding.session import Session
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.models.parts import Parts

STATES = {"hears": ["asr_en", "asr_es", "st_es", "qa"], "reads": ["st_es", "qa"]}
LINES = [
    {"task": "asr", "text": "one"},
    {"task": "st", "lang": "es", "source_lang": "en", "source_text": "good day", "text": "buenos"},
    {"task": "qa", "lang": "es", "source_text": "the weather", "answer": ["is", "good"]},
]


def weights(parts: Parts, folder: Path, name: str) -> SpeechLM:
    model = SpeechLM.build(parts, task_names=STATES[name])
    draw = torch.Generator().manual_seed(len(name) + 7 * (name == "reads"))
    with torch.no_grad():
        for x in model.trained_parameters():
            x.copy_(0.5 * torch.randn(x.shape, generator=draw))
    if name == "reads":  # needs no encoder
        model.parts = replace(model.parts, encoder="/gone/encoder")
    model.save(folder / name / "best.safetensors")
    return model.eval()


def command(tmp_path: Path, manifest: Path, *more: str) -> list[str]:
    return ["--proj_dir", str(tmp_path / "hears"), "--eval_data", str(manifest), "--cascade", str(tmp_path / "reads"),
            "--device", "cpu", "--max_new_tokens", "6", *more]  # fmt: skip


def test_each_way_is_that_of_its_steps_one_by_one(
    tiny_parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hears, reads = (weights(tiny_parts, tmp_path, name) for name in STATES)
    for number in range(3):
        write_audio(tmp_path / f"{number}.wav", samples=6000 + 1000 * number)
    rows = [{"audio_filepath": f"{number}.wav", **line} for number, line in enumerate(LINES)]
    rows[0]["lang"] = "en"
    manifest = write_manifest(tmp_path / "m.jsonl", *rows)
    assert eval_script.main(command(tmp_path, manifest)) == 0
    shown = capsys.readouterr().out
    found = read_rows(next((tmp_path / "hears").glob("cascade-*.jsonl")))
    source, flags = open_source(str(manifest)), {"max_new_tokens": 6, "temperature": 0.0, "vad": "none"}
    for row, place, lang, task in zip(found, (1, 2), ("en", "es"), ("st_es", "qa"), strict=True):
        [heard] = hears.transcribe(source.load(place), task=f"asr_{lang}", **flags)
        assert heard.text and row.hyp == Session(reads, task).say(heard.text, **flags).text and row.task == task
    numbers = json.loads(next((tmp_path / "hears").glob("cascade-*.json")).read_text())
    assert {task: list(ways) for task, ways in numbers["tasks"].items()} == {
        task: ["direct", "cascade", "text alone"] for task in ("st", "qa")
    }
    direct = json.loads(next((tmp_path / "hears").glob("eval-*.json")).read_text())["tasks"]
    assert numbers["tasks"]["st"]["direct"]["chrf"] == direct["st"]["chrf"]
    for text in ("  st:", "  direct", "  cascade", "  text alone", "exact match", "what the cascade reads: WER"):
        assert text in shown


def test_transcripts_alone_have_no_cascade(tiny_parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in STATES:
        weights(tiny_parts, tmp_path, name)
    write_audio(tmp_path / "a.wav", samples=6000)
    manifest = write_manifest(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "text": "x", "lang": "en"})
    assert eval_script.main(command(tmp_path, manifest, "--task", "asr_en")) == 2
    assert "asks for transcripts alone, expected translations" in capsys.readouterr().err
    assert eval_script.main([*command(tmp_path, manifest)[:4], "--cascade", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err
