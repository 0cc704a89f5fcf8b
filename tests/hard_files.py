"""Audio files whose headers lie, and formats that few readers know: four tones, of 0.5 s each."""

import io
from typing import Any

import av
import numpy as np
import soundfile

RATE = 16_000
HERTZ = (300, 600, 900, 1_200)
SECONDS = 2.0


def tones(rate: int = RATE) -> np.ndarray:
    hertz = np.repeat(HERTZ, rate // 2)
    return (0.4 * np.sin(2 * np.pi * np.cumsum(hertz) / rate)).astype(np.float32)


def heard(waveform: np.ndarray, rate: int = RATE) -> list[int]:
    """The tone of each half second, to 50 Hz, from its middle."""
    found = []
    for start in range(rate // 10, len(waveform) - rate // 4, rate // 2):
        spectrum = np.abs(np.fft.rfft(waveform[start : start + rate // 4] * np.hanning(rate // 4)))
        found.append(50 * round(4 * int(spectrum.argmax()) / 50))
    return found


def sound(samples: np.ndarray, form: str, subtype: str | None = None, rate: int = RATE, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype, **options)
    return file.getvalue()


def encode(form: str, codec: str, rate: int = RATE, options: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono", bit_rate=64_000)
        frame = av.AudioFrame.from_ndarray(tones(rate)[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, "mono", rate, stream.frame_size or 1024)
        frames = [*resampler.resample(frame), *resampler.resample(None)]
        for part in (*frames, None):
            container.mux(stream.encode(part))
    return file.getvalue()


def with_total(flac: bytes, total: int) -> bytes:
    """The number of samples is the last 36 bits before the MD5 sum of STREAMINFO."""
    field = int.from_bytes(flac[18:26], "big") >> 36 << 36 | total
    return flac[:18] + field.to_bytes(8, "big") + flac[26:]


def with_frames(mp3: bytes, count: int) -> bytes:
    at = max(mp3.find(b"Xing"), mp3.find(b"Info"))
    assert at > 0 and mp3[at + 7] & 1
    return mp3[: at + 8] + count.to_bytes(4, "big") + mp3[at + 12 :]


def without_first_frame(mp3: bytes) -> bytes:
    """Without the frame that holds the Xing header."""
    return mp3[mp3.index(mp3[:2], 4) :]


def with_data_size(wav: bytes, size: int) -> bytes:
    at = wav.index(b"data") + 4
    riff = min(size + at - 4, 0xFFFFFFFF)
    return wav[:4] + riff.to_bytes(4, "little") + wav[8:at] + size.to_bytes(4, "little") + wav[at + 4 :]


def with_granule(ogg: bytes, position: int) -> bytes:
    at = ogg.rindex(b"OggS")
    page = ogg[at : at + 6] + position.to_bytes(8, "little") + ogg[at + 14 : at + 22] + bytes(4) + ogg[at + 26 :]
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum >> 31 else 0)) & 0xFFFFFFFF
    return ogg[:at] + page[:22] + checksum.to_bytes(4, "little") + page[26:]


def id3(size: int) -> bytes:
    return b"ID3\x03\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + b"\xff\xfb" * (size // 2)


def hard_files() -> dict[str, tuple[bytes, int]]:
    """Of each file its bytes and how many times the four tones are in it."""
    x, low = tones(), tones(8_000)
    flac, wav, ogg = sound(x, "FLAC"), sound(x, "WAV"), sound(x, "OGG")
    mp3 = sound(x, "MP3", bitrate_mode="VARIABLE")
    opus = encode("ogg", "libopus", 48_000)
    files = {f"total_{n}.flac": with_total(flac, n) for n in (0, 1_000, 20_000, 64_000, 2**36 - 1)}
    files |= {f"frames_{n}.mp3": with_frames(mp3, n) for n in (0, 5, 10_000, 2**31)}
    files |= {f"size_{n}.wav": with_data_size(wav, n) for n in (0, 0x7FFFFFFF, 0xFFFFFFFF)}
    files |= {f"granule_{n}.ogg": with_granule(ogg, n) for n in (10, 4 * 10**10)}
    files |= {
        "no_xing.mp3": without_first_frame(mp3),
        "zero_tail.mp3": mp3 + bytes(40_000),
        "picture.mp3": id3(60_000) + mp3,
        "id3.wav": id3(500) + wav,
        "id3.flac": id3(500) + flac,
        "gsm.wav": sound(low, "WAV", "GSM610", 8_000),
        "g721.wav": sound(low, "WAV", "G721_32", 8_000),
        "ms_adpcm.wav": sound(x, "WAV", "MS_ADPCM"),
        "a-law.au": sound(x, "AU", "ALAW"),
        "double.aiff": sound(x, "AIFF", "DOUBLE"),
        "24.caf": sound(x, "CAF", "PCM_24"),
        "paris.paf": sound(x, "PAF", "PCM_16"),
        "s64.wav": encode("wav", "pcm_s64le"),
        "aac.m4a": encode("ipod", "aac"),
        "aac.mp4": encode("mp4", "aac"),
        "opus.webm": encode("webm", "libopus", 48_000),
        "windows.wma": encode("asf", "wmav2"),
        "eight.ogg": sound(np.repeat(x[:, None], 8, axis=1), "OGG"),
        "odd_rate.wav": sound(tones(15_998), "WAV", rate=15_998),
    }
    chains = {
        "two.mp3": mp3 * 2,
        "two.ogg": ogg * 2,
        "two.opus": opus * 2,
        "two_rates.ogg": ogg + sound(tones(44_100), "OGG", rate=44_100),
        "two_codecs.ogg": ogg + opus,
    }
    return {name: (content, 1) for name, content in files.items()} | {
        name: (content, 2) for name, content in chains.items()
    }
