import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech import audio
from rwkv_speech.audio import AudioError, audio_seconds, load_audio, num_audio_tokens, num_frames
from rwkv_speech.errors import UserError


def tone(rate: int, seconds: float, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def test_constants_agree_with_the_published_encoder():
    assert (audio.SAMPLES_PER_FRAME, audio.FRAME_RATE, audio.MIN_SAMPLES) == (320, 50, 400)


def test_num_frames_equals_real_convolutions():
    layers = [torch.nn.Conv1d(1, 1, k, s) for k, s in zip(audio.CONV_KERNELS, audio.CONV_STRIDES, strict=True)]
    stack = torch.nn.Sequential(*layers)
    lengths = [400, 401, 719, 720, 721, 799, 1039, 1040, 16_000, 16_123]
    with torch.no_grad():
        expected = [stack(torch.zeros(1, 1, n)).shape[-1] for n in lengths]
    assert [num_frames(n) for n in lengths] == expected
    assert num_frames(torch.tensor(lengths)).tolist() == expected


def test_num_frames_is_zero_below_the_receptive_field():
    short = list(range(0, 400))
    assert all(num_frames(n) == 0 for n in short)
    assert num_frames(torch.tensor(short)).tolist() == [0] * 400
    assert num_frames(400) == 1


def test_num_frames_takes_other_convolutions():
    assert num_frames(10, kernels=(4,), strides=(2,)) == 4


def test_num_audio_tokens_drops_the_remainder():
    assert [num_audio_tokens(frames, 5) for frames in (0, 4, 5, 9, 10)] == [0, 0, 1, 1, 2]
    assert num_audio_tokens(torch.tensor([4, 11]), 5).tolist() == [0, 2]


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_load_audio_resamples_from_the_true_rate(tmp_path: Path, rate: int):
    file = tmp_path / "tone.flac"
    soundfile.write(file, tone(rate, 1.0), rate)
    loaded = load_audio(file)
    assert loaded.dtype == torch.float32 and loaded.shape == (16_000,)
    middle = slice(1_000, 15_000)  # the filter rings at the ends
    assert np.abs(loaded.numpy()[middle] - tone(16_000, 1.0)[middle]).max() < 5e-3
    assert audio_seconds(file) == pytest.approx(1.0)


def test_load_audio_averages_any_number_of_channels(tmp_path: Path):
    channels = np.random.default_rng(0).uniform(-0.5, 0.5, (800, 3)).astype(np.float32)
    soundfile.write(tmp_path / "three.wav", channels, 16_000, subtype="FLOAT")
    assert np.allclose(load_audio(tmp_path / "three.wav").numpy(), channels.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_load_audio_segment_equals_slice_of_the_whole(tmp_path: Path, name: str):
    file = tmp_path / name
    soundfile.write(file, tone(16_000, 3.0), 16_000)
    whole = load_audio(str(file))
    assert torch.allclose(load_audio(file, offset=1.0, duration=0.5), whole[16_000:24_000], atol=1e-6)
    assert torch.allclose(load_audio(file, offset=2.5), whole[40_000:], atol=1e-6)
    assert torch.equal(load_audio(file, offset=2.5, duration=60.0), load_audio(file, offset=2.5))


def test_load_audio_takes_bytes():
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(8_000, 0.5), 8_000, format="FLAC")
    assert load_audio(buffer.getvalue()).shape == (8_000,)


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    soundfile.write(folder / "empty.wav", np.zeros(0, np.float32), 16_000)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan], np.float32), 16_000, subtype="FLOAT")
    soundfile.write(folder / "inf.wav", np.array([0.0, np.inf], np.float32), 16_000, subtype="FLOAT")
    soundfile.write(folder / "odd_rate.wav", np.zeros(100, np.float32), 15_999)
    (folder / "text.wav").write_text("not audio")
    (folder / "zero.flac").write_bytes(b"")
    soundfile.write(folder / "whole.flac", np.random.default_rng(0).uniform(-1, 1, 32_000), 16_000)
    whole = (folder / "whole.flac").read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    reasons = {
        "empty.wav": "no audio",
        "nan.wav": "NaN",
        "inf.wav": "NaN or infinite",
        "odd_rate.wav": "15999 Hz",
        "text.wav": "cannot be decoded",
        "zero.flac": "cannot be decoded",
        "cut.flac": "cannot be decoded|cut off",
        "missing.wav": "no such audio file",
        ".": "no such audio file",
    }
    return {name: (folder / name, reason) for name, reason in reasons.items()}


def test_load_audio_names_file_and_reason(tmp_path: Path):
    for path, reason in broken_files(tmp_path).values():
        with pytest.raises(AudioError, match=reason) as caught:
            load_audio(path)
        assert str(path) in str(caught.value) and isinstance(caught.value, UserError)


def test_load_audio_rejects_segments_outside_the_file(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", tone(16_000, 1.0), 16_000)
    with pytest.raises(AudioError, match="past its end"):
        load_audio(tmp_path / "a.wav", offset=1.0)
    for offset, duration in ((-1.0, None), (float("nan"), None), (0.0, 0.0), (0.0, float("inf"))):
        with pytest.raises(AudioError, match="offset of 0 or more"):
            load_audio(tmp_path / "a.wav", offset, duration)
    with pytest.raises(AudioError, match="holds no sample"):
        load_audio(tmp_path / "a.wav", 0.5, 1e-9)


def test_load_audio_finds_a_file_that_is_cut_off(tmp_path: Path):
    soundfile.write(tmp_path / "a.mp3", tone(16_000, 3.0), 16_000)
    content = (tmp_path / "a.mp3").read_bytes()
    with pytest.raises(AudioError, match="sent.mp3: is cut off"):
        load_audio(content[: len(content) // 2], name="sent.mp3")


def test_audio_seconds_names_the_file(tmp_path: Path):
    (tmp_path / "text.wav").write_text("not audio")
    for name in ("text.wav", "missing.wav"):
        with pytest.raises(AudioError, match=name):
            audio_seconds(tmp_path / name)
