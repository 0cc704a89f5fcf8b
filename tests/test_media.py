import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hard_files import HERTZ, SECONDS, encode, hard_files, heard, sound, tones, with_data_size, with_total

from rwkv_speech.audio import AudioError, audio_seconds, load_audio, read_blocks
from rwkv_speech.errors import printable

HARD_FILES = hard_files()


@pytest.mark.parametrize("name", HARD_FILES)
def test_all_that_a_file_holds_is_decoded_whatever_its_header_says(tmp_path: Path, name: str):
    content, times = HARD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    waveform = load_audio(path)
    # Encoders fill up their last block.
    assert (SECONDS - 0.03) * times < len(waveform) / 16_000 < (SECONDS + 0.15) * times
    assert heard(waveform.numpy()) == list(HERTZ) * times
    assert torch.equal(load_audio(content, name=name), waveform)
    assert audio_seconds(path) == pytest.approx(len(waveform) / 16_000, abs=0.1)
    assert audio_seconds(content) == audio_seconds(path)
    blocks = torch.cat(list(read_blocks(path, 0.3)))
    assert len(blocks) == len(waveform) and (blocks - waveform).abs().max() <= 1e-6
    part = load_audio(path, offset=0.5, duration=0.5)
    assert len(part) == 8_000 and torch.allclose(part[1_000:7_000], waveform[9_000:15_000], atol=2e-4)


def test_a_name_without_an_ending_or_with_a_wrong_one_does_not_matter(tmp_path: Path):
    for name in ("speech", "speech.raw", "speech.flac"):
        (tmp_path / name).write_bytes(encode("mp4", "aac"))
        assert heard(load_audio(tmp_path / name).numpy()) == list(HERTZ)


WAV, FLAC = sound(tones(), "WAV"), sound(tones(), "FLAC")
BROKEN = {
    "headerless.raw": (WAV[44:], "nobody can know the rate"),
    "text.wav": (b"not audio " * 99, "cannot be decoded"),
    "page.mp3": (b"<html><body>404 not found</body></html>" * 50, "cannot be decoded"),
    "random.mp3": (np.random.default_rng(0).bytes(50_000), "cannot be decoded"),
    "zeros.mp3": (bytes(50_000), "cannot be decoded"),
    "nothing.flac": (b"", "cannot be decoded"),
    "empty.wav": (sound(np.zeros(0), "WAV"), "holds no audio"),
    "cut.wav": (WAV[:30_000], r"is cut off or damaged: 0\.9\d+ s could be decoded"),
    "cut_law.wav": (sound(tones(), "WAV", "ULAW")[:16_000], "is cut off or damaged"),
    "cut.flac": (FLAC[: len(FLAC) // 2], "is cut off or damaged"),
    "promised.wav": (with_data_size(WAV, 100_000), "is cut off or damaged"),
    "damaged.flac": (FLAC[: len(FLAC) // 2] + bytes(200) + FLAC[len(FLAC) // 2 + 200 :], "is cut off or damaged"),
    "cut.m4a": (encode("ipod", "aac")[:5_000], "cannot be decoded"),
    "playlist.m3u8": (b"#EXTM3U\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n", "cannot be decoded"),
    "list.mp3": (b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot be decoded"),
    "nan.wav": (sound(np.array([0.0, np.nan]), "WAV", "FLOAT"), "NaN"),
    "infinite.wav": (sound(np.array([0.0, np.inf]), "WAV", "DOUBLE"), "NaN or infinite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_used_is_named_with_the_reason(tmp_path: Path, name: str):
    content, reason = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=f"{tmp_path / name}: .*{reason}"):
        load_audio(tmp_path / name)
    with pytest.raises(AudioError, match=f"^{name}: .*{reason}"):
        load_audio(content, name=name)


@pytest.mark.parametrize("name", ["cut.wav", "cut_law.wav", "cut.flac", "damaged.flac", "promised.wav"])
def test_what_was_read_before_an_error_is_not_lost(name: str):
    whole, found = torch.from_numpy(tones()), []
    with pytest.raises(AudioError, match="is cut off or damaged"):
        found.extend(read_blocks(BROKEN[name][0], 0.1))
    waveform = torch.cat(found)
    assert 14_000 < len(waveform) < 40_000 and torch.allclose(waveform[:14_000], whole[:14_000], atol=0.03)


def test_what_was_read_before_a_sample_that_is_no_number_is_not_lost():
    samples = np.concatenate([tones(), [np.nan], tones()])
    found = []
    with pytest.raises(AudioError, match="NaN"):
        found.extend(read_blocks(sound(samples, "WAV", "FLOAT"), 0.5))
    assert len(found) in (0, 4)


def test_a_file_is_not_given_to_another_decoder_after_the_first_has_given_some_of_it():
    adpcm = sound(tones(), "WAV", "IMA_ADPCM")
    damaged = adpcm[:4_000] + b"\xff" * (len(adpcm) - 4_000)
    found = []
    with pytest.raises(AudioError, match="is cut off or damaged: 24 of 33 packets are damaged"):
        found.extend(read_blocks(damaged))
    assert 5_000 < sum(map(len, found)) < 10_000


def test_a_header_that_points_nowhere_is_read_alike_from_a_path_and_from_bytes(tmp_path: Path):
    content = sound(tones(), "CAF", "PCM_16") + b"free" + (2**62).to_bytes(8, "big")
    (tmp_path / "a.caf").write_bytes(content)
    assert torch.equal(load_audio(content), load_audio(tmp_path / "a.caf"))


def test_the_length_of_a_damaged_flac_is_that_of_what_can_be_decoded():
    flac = with_total(sound(tones(), "FLAC"), 0)
    middle = len(flac) // 2
    damaged = flac[:middle] + bytes(200) + flac[middle + 200 :]
    assert audio_seconds(damaged) == pytest.approx(len(load_audio(damaged)) / 16_000, abs=1e-3)


def test_what_is_no_file_is_named(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path, reason in {
        tmp_path / "missing.wav": "no such audio file",
        tmp_path: "is a folder, a pipe or a device",
        tmp_path / "pipe.wav": "is a folder, a pipe or a device",
        Path("/dev/zero"): "is a folder, a pipe or a device",
        tmp_path / ("n" * 300 + ".wav"): "File name too long",
        Path("a\0b.wav"): "is no path",
        tmp_path / "missing.wav" / "a.wav": "cannot be read|no such",
    }.items():
        for read in (load_audio, audio_seconds):
            with pytest.raises(AudioError, match=reason) as caught:
                read(path)
            assert printable(path) in str(caught.value)


def test_a_lossy_file_shorter_than_its_header_claims_is_used_with_a_note(caplog: pytest.LogCaptureFixture):
    mp3 = sound(tones(), "MP3")
    assert 0.8 < len(load_audio(mp3[: len(mp3) // 2], name="sent.mp3")) / 16_000 < 1.1
    assert "note: sent.mp3: " in caplog.text and "its header claims 2.0" in caplog.text


def test_more_samples_than_memory_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rwkv_speech.media.decoding._MOST_VALUES", 10_000)
    for content in (FLAC, encode("mp4", "aac")):
        with pytest.raises(AudioError, match="long.x: holds more than 10,000 samples"):
            load_audio(content, name="long.x")
        assert len(load_audio(content, 1.0, 0.25)) == 4_000
