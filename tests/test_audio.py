import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hard_files import sound, tones

from rwkv_speech.audio import AudioError, Framing, audio_seconds, load_audio, num_audio_tokens, read_blocks


def tone(rate: int, seconds: float, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)  # WavLM's
WAVLM = Framing.of_convolutions(KERNELS, STRIDES)


def test_framing_of_the_published_encoder():
    assert (WAVLM.samples_per_frame, WAVLM.frame_rate, WAVLM.min_samples, WAVLM.centre) == (320, 50.0, 400, 200.0)


def test_count_equals_real_convolutions():
    layers = [torch.nn.Conv1d(1, 1, k, s) for k, s in zip(KERNELS, STRIDES, strict=True)]
    stack = torch.nn.Sequential(*layers)
    lengths = [400, 401, 719, 720, 721, 799, 1039, 1040, 16_000, 16_123]
    with torch.no_grad():
        expected = [stack(torch.zeros(1, 1, n)).shape[-1] for n in lengths]
    assert [WAVLM.count(n) for n in lengths] == expected
    assert WAVLM.count(torch.tensor(lengths)).tolist() == expected


def test_count_is_zero_below_the_receptive_field():
    short = list(range(0, 400))
    assert all(WAVLM.count(n) == 0 for n in short)
    assert WAVLM.count(torch.tensor(short)).tolist() == [0] * 400
    assert WAVLM.count(400) == 1


@pytest.mark.parametrize("framing", [WAVLM, Framing.of_convolutions((4, 5), (2, 3)), Framing((640,), (640,), 0.0)])
def test_shortest_is_the_least_that_gives_so_many_frames(framing: Framing):
    for frames in (1, 2, 17):
        assert framing.count(framing.shortest(frames)) == frames == framing.count(framing.shortest(frames) - 1) + 1


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


@pytest.mark.parametrize("rate", [3, 536_886_912])
def test_load_audio_refuses_a_rate_that_no_recording_has(rate: int):
    wav = sound(tones(), "WAV")
    with pytest.raises(AudioError, match=f"F: has {rate:,} samples a second; expected 1,000 to 10,000,000"):
        load_audio(wav[:24] + rate.to_bytes(4, "little") + wav[28:], name="F")


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
    assert torch.equal(load_audio(file, offset=2.5, duration=0.6), load_audio(file, offset=2.5))


def test_load_audio_takes_bytes():
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(8_000, 0.5), 8_000, format="FLAC")
    assert load_audio(buffer.getvalue()).shape == (8_000,)


def test_load_audio_rejects_segments_outside_the_file(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", tone(16_000, 1.0), 16_000)
    with pytest.raises(AudioError, match="holds no sample"):
        load_audio(tmp_path / "a.wav", offset=1.0)
    for offset, duration in ((-1.0, None), (float("nan"), None), (0.0, 0.0), (0.0, float("inf"))):
        with pytest.raises(AudioError, match="offset of 0 or more"):
            load_audio(tmp_path / "a.wav", offset, duration)
    with pytest.raises(AudioError, match="holds no sample"):
        load_audio(tmp_path / "a.wav", 0.5, 1e-9)


def test_load_audio_refuses_a_duration_above_what_was_decoded_by_more_than_rounding(tmp_path: Path):
    file = tmp_path / "a.wav"
    soundfile.write(file, tone(16_000, 3.0), 16_000)
    for offset, duration in ((0.0, 3.5), (0.0, 3.001), (2.0, 1.5), (2.5, 1.0)):
        assert len(load_audio(file, offset, duration)) == round(16_000 * (3.0 - offset))
    for offset, duration, found in ((0.0, 4.0, 3.0), (1.0, 3.0, 2.0), (2.5, 60.0, 0.5)):
        with pytest.raises(AudioError, match=rf"a\.wav.*: lasts {found:.3f} s, expected the {duration:.3f} s"):
            load_audio(file, offset, duration)


def test_channels_that_cancel_each_other_out_give_the_loudest_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file, x = tmp_path / "inverted.wav", tone(16_000, 1.0)
    for others in ([-x], [-0.9 * x], [-x, x, -x], [0.2 - x]):
        soundfile.write(file, np.stack([x, *others], axis=1), 16_000, subtype="FLOAT")
        caplog.clear()
        loaded = load_audio(file)
        assert any(np.allclose(loaded, channel, atol=1e-6) for channel in (x, *others))
        assert f"note: {file}: its channels cancel each other out" in caplog.text
    caplog.clear()
    noise = np.random.default_rng(0).normal(size=(2, 16_000)).astype(np.float32) / 9
    for channels in ([x, x], [x, 0 * x], [x] + 7 * [0 * x], [x, -0.4 * x], list(noise), [0 * x, 0 * x]):
        soundfile.write(file, np.stack(channels, axis=1), 16_000, subtype="FLOAT")
        assert np.allclose(load_audio(file), np.mean(channels, axis=0), atol=1e-6)
    assert not caplog.text


def test_import_takes_neither_pyav_nor_torchaudio():
    code = "import sys, rwkv_speech.audio; sys.exit(bool({'av', 'torchaudio'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.77])
@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 15_998])
def test_blocks_are_those_of_the_whole(tmp_path: Path, rate: int, seconds: float):
    file = tmp_path / "noise.flac"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(1.73 * rate)).astype(np.float32)
    soundfile.write(file, noise, rate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwkv_speech.media.decoding._BLOCK", 97)
        blocks = list(read_blocks(file, seconds))
    whole = load_audio(file)
    assert len(blocks) > 1.73 / (seconds + 0.1) and max(map(len, blocks)) < 16_000 * seconds + 2_000
    found = torch.cat(blocks)
    assert len(found) == len(whole) and (found - whole).abs().max() <= 1e-6
    if rate == 16_000:
        assert torch.equal(found, whole)
    if rate != 15_998:
        from torchaudio.functional import resample

        stored = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
        assert (whole - resample(stored, rate, 16_000)).abs().max() <= 1e-6


def test_blocks_decide_from_what_came_so_far_whether_channels_cancel_each_other_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file, x = tmp_path / "a.wav", tone(16_000, 1.0)
    silence = np.zeros_like(x)
    left, right = np.concatenate([silence, x, x]), np.concatenate([silence, -0.9 * x, -0.9 * x])
    soundfile.write(file, np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    assert np.allclose(torch.cat(list(read_blocks(file, 0.25))), left)
    assert caplog.text.count("cancel each other out") == 1
    soundfile.write(file, np.stack([left, np.abs(right)], axis=1), 16_000, subtype="FLOAT")
    assert torch.equal(torch.cat(list(read_blocks(file, 0.25))), load_audio(file))
    assert caplog.text.count("cancel each other out") == 1


def test_an_hour_takes_no_more_memory_than_a_minute(tmp_path: Path):
    """In a process of its own, in which only the longer file is new."""
    for name, minutes in (("minute", 1), ("hour", 60)):
        with soundfile.SoundFile(tmp_path / f"{name}.flac", "w", 16_000, 1) as file:
            for _ in range(minutes):
                file.write(np.zeros(60 * 16_000, np.float32))
    code = """
import sys
from pathlib import Path
from rwkv_speech.audio import read_blocks

def peak(path):
    assert sum(map(len, read_blocks(path))) > 0
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

minute, hour = map(peak, sys.argv[1:])
sys.exit(hour > minute + 30_000)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "minute.flac"), str(tmp_path / "hour.flac")]
    assert subprocess.run(command, check=False).returncode == 0
