import json
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from rwkv_speech.audio import Framing
from rwkv_speech.config import TrainConfig
from rwkv_speech.data.sources import open_source
from rwkv_speech.errors import UserError
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.training import ctc_speech
from rwkv_speech.training.ctc_speech import Speech, loud_span, with_times


def manifest(folder: Path, *rows: tuple[str, str, np.ndarray]) -> str:
    """Utterances of (task, text, samples)."""
    lines = []
    for number, (task, text, samples) in enumerate(rows):
        soundfile.write(folder / f"{number}.wav", samples, 16_000)
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "text": text, "task": task}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "train.jsonl")


def tone(before: int, during: int, after: int) -> np.ndarray:
    sound = 0.3 * np.sin(np.arange(during) * 0.2)
    return np.concatenate([np.zeros(before), sound, np.zeros(after)]).astype(np.float32)


@pytest.fixture
def speech(tmp_path: Path) -> Speech:
    rows = [("asr", f"b{number}ü", tone(0, 4_000 + number, 0)) for number in range(5)]
    return Speech(open_source(manifest(tmp_path, *rows, ("st", "Ж", tone(0, 800, 0)))), TrainConfig(micro_bsz=6))


def test_only_what_says_what_is_spoken_counts(speech: Speech, tmp_path: Path):
    assert speech.characters() == "01234bü"
    drawn = speech.some(random.Random(0), 40)
    assert len(drawn) == 40 and {text for _, text in drawn} == {f"b{number}ü" for number in range(5)}
    assert all(len(waveform) == 4_000 + int(text[1]) for waveform, text in drawn)
    source = open_source(manifest(tmp_path, ("st", "x", tone(0, 800, 0))))
    with pytest.raises(UserError, match="--ctc: found no utterance of the task asr"):
        Speech(source, TrainConfig())


def test_recordings_that_are_broken_are_left_out(speech: Speech, tmp_path: Path):
    (tmp_path / "2.wav").write_bytes(b"RIFF")
    assert {text for _, text in speech.some(random.Random(0), 40)} == {"b0ü", "b1ü", "b3ü", "b4ü"}


def test_extras_are_half_speech_with_silence_around_half_no_speech(speech: Speech):
    batch, again, other = speech.extras("0/8/0"), speech.extras("0/8/0"), speech.extras("1/8/0")
    assert [bool(text) for text in batch.texts] == [True] * 3 + [False] * 3
    assert torch.equal(batch.waveforms, again.waveforms) and batch.texts == again.texts
    assert batch.waveforms.shape != other.waveforms.shape
    for text, waveform in zip(batch.texts[:3], batch.waveforms, strict=False):
        loud = waveform.abs().gt(0.01).nonzero()[:, 0]
        assert abs(int(loud[-1] - loud[0]) - 4_000 - int(text[1])) < 30


def test_loud_span_is_where_the_sound_is():
    waveform = tone(8_000, 16_000, 4_000)
    first, last = loud_span(waveform) or (0, 0)
    assert first == pytest.approx(0.5, abs=0.02) and last == pytest.approx(1.5, abs=0.02)
    noisy = waveform + 0.01 * np.random.default_rng(0).standard_normal(len(waveform)).astype(np.float32)
    assert loud_span(noisy) == pytest.approx((first, last), abs=0.02)
    assert loud_span(np.zeros(8_000, np.float32)) is None and loud_span(np.ones(10, np.float32)) is None


class Ear(torch.nn.Module):
    """An encoder whose frame is the power of its samples."""

    framing, width = Framing((320,), (320,), 200.0), 1

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        frames = waveforms.unfold(1, 400, 320).square().mean(-1)[..., None]
        return frames, torch.tensor([frames.shape[1]])


class Edges(CtcHead):
    """A head that hears "a" as a sound begins, and "b" as it ends."""

    def forward(self, frames: Tensor, frame_lengths: Tensor) -> Tensor:
        loud = torch.nn.functional.pad(frames[..., 0] > 1e-3, (1, 1))
        rows = torch.full((1, frames.shape[1], 3), 1e-3)
        rows[..., 0] = 1.0
        rows[0, :, 1] += (loud[0, 1:-1] & ~loud[0, :-2]).float() * 1e6
        rows[0, :, 2] += (loud[0, 1:-1] & ~loud[0, 2:]).float() * 1e6
        return rows.log().log_softmax(-1)


def test_shifts_lead_from_frames_to_where_sound_begins_and_ends(tmp_path: Path):
    draw = np.random.default_rng(0)
    rows = [("asr", "ab", tone(int(draw.integers(0, 9_000)), int(draw.integers(8_000, 20_000)), 0)) for _ in range(9)]
    speech = Speech(open_source(manifest(tmp_path, *rows)), TrainConfig())
    spec = with_times(Edges(1, CtcSpec("ab")), Ear(), speech, 1)  # type: ignore[arg-type]
    # The frames at the edges lie within one of them.
    assert spec.start_shift == pytest.approx(-ctc_speech._CLOSURE_SECONDS, abs=0.02)
    assert spec.end_shift == pytest.approx(0.0, abs=0.02)
    assert spec.labels == "ab"
