"""predict.py --stream - as its users call it, with untrained weights."""

import io
from pathlib import Path

import numpy as np
import predict as predict_script
import pytest
import soundfile
import torch

from rwkv_speech import SpeechLM as Public
from rwkv_speech.models.speech_lm import Parts, SpeechLM

QUICK = ["--device", "cpu", "--temperature", "0", "--vad", "none", "--max_new_tokens", "4", "--max_segment", "1"]


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(3 * 16_000)
    return (3_000 * noise * np.linspace(0.2, 1, len(noise))).astype("<i2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, samples: np.ndarray) -> Path:
    """Weights that give several segments some text."""
    file = tmp_path_factory.mktemp("run") / "last.safetensors"
    for seed in range(100):
        torch.manual_seed(seed)
        SpeechLM.build(Parts("tiny")).save(file)
        model = Public.from_pretrained(file)
        [found] = model.transcribe(samples, temperature=0.0, vad="none", max_new_tokens=4, max_segment=1)
        if len(found.segments) >= 2:
            return file.parent
    raise AssertionError("no weights give a text")


def call(run: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, *words: str) -> int:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    return predict_script.main(["--proj_dir", str(run), *QUICK, *words])


def test_a_stream_says_what_the_file_says(
    run: Path, samples: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    assert call(run, monkeypatch, b"", str(tmp_path / "a.wav"), "--verbose", "1") == 0
    segments = [line.split("]  ")[-1].split("] ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert call(run, monkeypatch, samples.tobytes(), "--stream", "-") == 0
    shown = capsys.readouterr()
    assert [line.strip() for line in shown.out.splitlines()] == [segment.strip() for segment in segments]
    assert len(segments) >= 2 and shown.err == ""
    assert call(run, monkeypatch, samples.tobytes(), "--stream", "-", "--stream_rate", "8000") == 0
    assert capsys.readouterr().out != shown.out  # it lasts twice as long


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stream", "a.raw"], "--stream: found 'a.raw', expected -, which is standard input"),
        (["--stream", "-", "a.wav"], "--stream: found files or --output_format with it"),
        (["--stream", "-", "--output_format", "srt"], "--stream: found files or --output_format with it"),
        (["--stream", "-", "--stream_rate", "10"], "--stream_rate: found 10, expected a whole number at least 1000"),
        (["--stream", "-", "--commit", "words"], "--commit: found 'words', expected one of segment, word"),
        (["--stream", "-", "--commit", "word"], "commit: found word, but the weights have no CTC head"),
        (["--commit", "word", "a.wav"], "--commit: found without --stream, where it has no effect"),
    ],
)
def test_what_a_stream_cannot_be_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    assert call(run, monkeypatch, bytes(9), *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_a_file_with_a_header_is_named(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert call(run, monkeypatch, b"RIFF" + bytes(90), "--stream", "-") == 2
    assert "--stream -: found a WAV file, expected raw 16-bit samples" in capsys.readouterr().err
