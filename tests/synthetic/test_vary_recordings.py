import json
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.synthetic.vary_recordings import main, vary


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A recording, a segment of it, a cut-off one, text, and a conversation."""
    tone = np.sin(np.arange(24_000) * 2 * np.pi * 440 / 8000).astype(np.float32) * 0.3
    soundfile.write(tmp_path / "a tone.wav", tone, 8000)
    (tmp_path / "bad.wav").write_bytes((tmp_path / "a tone.wav").read_bytes()[:30])
    rows: list[dict[str, object]] = [
        {"audio_filepath": "a tone.wav", "text": "ля", "lang": "ru", "speaker": 7, "id": "x", "own": [1]},
        {"audio_filepath": "a tone.wav", "text": "end", "offset": 2.0, "duration": 1.0, "source_text": "fin"},
        {"audio_filepath": "bad.wav", "text": "gone"},
        {"audio_filepath": None, "source_text": "read", "text": "lu"},
        {"turns": [{"audio_filepath": "a tone.wav", "text": "yes"}]},
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_each_recording_is_varied_and_its_line_kept(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def rows(out: str) -> list[dict[str, object]]:
        argv = ["--data", f"{manifest}, {manifest}", "--out", str(tmp_path / out), "--copies", "2", "--seed", "3"]
        assert main(argv) == 0
        return [json.loads(line) for line in (tmp_path / out / "train.jsonl").read_text("utf-8").splitlines()]

    found = rows("my copies")
    shown = capsys.readouterr().out
    assert "8 copies of 4 recordings" in shown and "4 lines are conversations" in shown
    assert "2 recordings cannot be read" in shown and "bad.wav" in shown
    own = [{key: x for key, x in row.items() if key not in ("audio_filepath", "duration")} for row in found]
    whole, segment = {"text": "ля", "lang": "ru", "speaker": 7, "own": [1]}, {"text": "end", "source_text": "fin"}
    assert own == [whole, whole, segment, segment] * 2
    utterances = read_manifest(tmp_path / "my copies/train.jsonl")
    assert len({x.id for x in utterances}) == 8
    for seconds, utterance in zip([3, 3, 1, 1] * 2, utterances, strict=True):
        info = soundfile.info(utterance.audio)
        assert info.samplerate == 16_000 and info.duration == pytest.approx(utterance.duration, abs=1e-3)
        assert 0.84 < seconds / info.duration < 1.19
    assert len({x.duration for x in utterances}) > 6
    assert rows("again") == found


def test_speed_moves_the_pitch_and_nothing_is_clipped():
    tone = torch.sin(torch.arange(32_000) * 2 * torch.pi * 440 / 16_000) * 0.3
    pitches = []
    for seed in range(20):
        varied = vary(tone, random.Random(seed))
        assert varied.abs().max() < 0.96 and varied.isfinite().all()
        peak = torch.fft.rfft(varied).abs().argmax().item() * 16_000 / len(varied)
        assert peak == pytest.approx(440 * 32_000 / len(varied), rel=5e-3)
        pitches.append(peak)
    assert min(pitches) < 410 and max(pitches) > 480


def test_nothing_to_vary_is_an_error(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"source_text": "a", "text": "b"}))
    for data, words in ((empty, "no recording"), (tmp_path / "no.jsonl", "cannot be read")):
        assert main(["--data", str(data), "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    assert main(["--data", " , ", "--out", str(tmp_path / "out")]) == 2
    assert "--data: found nothing" in capsys.readouterr().err
    manifest.write_text("{}\n")
    assert main(["--data", str(manifest), "--out", str(tmp_path / "out")]) == 2
    assert "line 1" in capsys.readouterr().err
