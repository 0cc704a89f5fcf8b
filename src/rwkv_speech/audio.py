"""Audio files -> 16 kHz mono samples -> frames (50 Hz) -> audio tokens.

S samples · F frames · A audio tokens
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
import torch
from torch import Tensor

from rwkv_speech.errors import UserError

SAMPLE_RATE = 16_000
CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
SAMPLES_PER_FRAME = math.prod(CONV_STRIDES)  # 320
FRAME_RATE = SAMPLE_RATE // SAMPLES_PER_FRAME  # 50 Hz


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """The samples that one frame sees: the shortest input that gives a frame at all."""
    return 1 + sum((kernel - 1) * math.prod(strides[:i]) for i, kernel in enumerate(kernels))


MIN_SAMPLES = receptive_field(CONV_KERNELS, CONV_STRIDES)  # 400

# Lossy containers count their frames to within a codec block or two; a larger gap is a cut-off file.
_HEADER_SLACK_SECONDS = 0.1
# torchaudio builds a dense filter of rate x rate / gcd^2 taps: 0.1 M for 44.1 kHz, 256 M for 15,999 Hz.
_MAX_RESAMPLE_TAPS = 20_000_000

Lengths = TypeVar("Lengths", int, Tensor)


class AudioError(UserError):
    """One recording that cannot be used; the message names the file and the reason."""


def num_frames(
    num_samples: Lengths, kernels: Sequence[int] = CONV_KERNELS, strides: Sequence[int] = CONV_STRIDES
) -> Lengths:
    """Count the frames F that the convolutions make of S samples, 0 below 400; an int or a tensor."""
    length = num_samples
    for kernel, stride in zip(kernels, strides, strict=True):
        length = (length - kernel) // stride + 1
    # A length that has fallen to zero or below never climbs back, so one clamp at the end is exact.
    return length.clamp(min=0) if isinstance(length, Tensor) else max(length, 0)


def num_audio_tokens(frames: Lengths, stack: int) -> Lengths:
    """Count the audio tokens A = F // stack; the remaining frames are dropped."""
    return frames // stack


def load_audio(
    source: str | Path | bytes, offset: float = 0.0, duration: float | None = None, *, name: str | None = None
) -> Tensor:
    """Decode a recording to float32 (S,), mono, 16 kHz; `offset` and `duration` (s) choose a segment.

    `source` is a path or the bytes of a file; `name` stands for it in messages. Channels are averaged. A
    `duration` past the end reads to the end, for manifests round it. A segment of an MP3 costs the decoding
    of all that lies before it.

    Raises AudioError for a file that is missing, undecodable, cut off, empty or not finite, and for a segment
    outside it.
    """
    label = name or ("<bytes>" if isinstance(source, bytes) else str(source))
    if not (0 <= offset < math.inf) or (duration is not None and not (0 < duration < math.inf)):
        raise AudioError(
            f"{label}: segment offset {offset!r} s, duration {duration!r} s; expected an offset of 0 or "
            "more and a duration above 0, both finite"
        )
    samples, rate = _decode(source, label, offset, duration)
    mono = torch.from_numpy(samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32))
    # A finite sum has finite terms only, and takes a twentieth of the time.
    if not (mono.sum().isfinite() or mono.isfinite().all()):
        raise AudioError(f"{label}: holds NaN or infinite samples; expected finite audio: export it again")
    return _resample(mono, rate, label)


def audio_seconds(path: str | Path) -> float:
    """Read a file's length in seconds from its header; raises AudioError when it cannot be read."""
    _require_file(path, str(path))
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError) as error:
        raise _undecodable(str(path), error) from error
    return float(info.frames / info.samplerate)


def _decode(source: str | Path | bytes, label: str, offset: float, duration: float | None) -> tuple[np.ndarray, int]:
    """Read the segment as (samples, channels) float32 at the file's own rate."""
    if not isinstance(source, bytes):
        _require_file(source, label)
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
            rate, total = file.samplerate, file.frames
            start = round(offset * rate)
            if total == 0:
                raise AudioError(f"{label}: holds no audio; expected at least one sample: remove it or record it again")
            if start >= total:
                raise AudioError(
                    f"{label}: offset {offset} s is past its end; it is {total / rate:.3f} s long: mend the offset"
                )
            wanted = total - start if duration is None else min(round(duration * rate), total - start)
            samples = _read_segment(file, start, wanted)
    except (soundfile.SoundFileError, OSError) as error:
        raise _undecodable(label, error) from error
    if wanted - len(samples) > _HEADER_SLACK_SECONDS * rate:
        raise AudioError(
            f"{label}: is cut off: {len(samples) / rate:.3f} s could be decoded, its header promises "
            f"{wanted / rate:.3f} s: copy it again"
        )
    if len(samples) == 0:
        raise AudioError(f"{label}: the segment at {offset} s of {duration} s holds no sample: lengthen it")
    return samples, rate


def _read_segment(file: soundfile.SoundFile, start: int, frames: int) -> np.ndarray:
    if file.format == "MP3":
        # A seek in an MP3 loses the bits that its frames borrow from earlier ones: the segment then begins
        # with silence (3,000 samples were measured). soundfile seeks after every read, so only one read
        # from the start is exact.
        return np.asarray(file.read(start + frames, dtype="float32", always_2d=True)[start:])
    file.seek(start)
    return np.asarray(file.read(frames, dtype="float32", always_2d=True))


def _resample(mono: Tensor, rate: int, label: str) -> Tensor:
    if rate == SAMPLE_RATE:
        return mono
    common = math.gcd(rate, SAMPLE_RATE)
    if (rate // common) * (SAMPLE_RATE // common) > _MAX_RESAMPLE_TAPS:
        raise AudioError(
            f"{label}: its sampling rate of {rate} Hz has no useful ratio to {SAMPLE_RATE} Hz; expected a "
            "customary rate such as 8000, 44100 or 48000: check the header or convert the file"
        )
    # Imported here: it takes a second, and audio already at 16 kHz never needs it.
    from torchaudio.functional import resample

    resampled: Tensor = resample(mono, rate, SAMPLE_RATE)
    return resampled


def _require_file(path: str | Path, label: str) -> None:
    if not Path(path).is_file():
        raise AudioError(f"{label}: no such audio file; expected a readable file: check the path")


def _undecodable(label: str, error: Exception) -> AudioError:
    return AudioError(
        f"{label}: cannot be decoded ({error}); expected WAV, FLAC, OGG, MP3 or another libsndfile format"
    )
