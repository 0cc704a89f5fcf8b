"""Audio files -> 16 kHz mono samples -> frames (50 Hz) -> audio tokens.

S samples · C channels · F frames · A audio tokens
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.errors import AudioError as AudioError
from rwkv_speech.media import Decoded, check_size, decode, measure, opened

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
SAMPLES_PER_FRAME = math.prod(CONV_STRIDES)  # 320
FRAME_RATE = SAMPLE_RATE // SAMPLES_PER_FRAME  # 50 Hz


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """The samples that one frame sees: the shortest input that gives a frame at all."""
    return 1 + sum((kernel - 1) * math.prod(strides[:i]) for i, kernel in enumerate(kernels))


MIN_SAMPLES = receptive_field(CONV_KERNELS, CONV_STRIDES)  # 400

# People round the durations of manifests, some to whole seconds.
_ROUNDING_SECONDS, _ROUNDING = 0.5, 1.01
# torchaudio builds a dense filter of rate x rate / gcd^2 taps: 0.1 M for 44.1 kHz, 256 M for 15,999 Hz.
_MAX_RESAMPLE_TAPS = 20_000_000
# The mean of unrelated channels has the power of all of them by C^2; far below that, they cancel each other out.
_CANCELLED = 0.1

Lengths = TypeVar("Lengths", int, Tensor)


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

    `source` is a path or the bytes of a file; `name` stands for it in messages. Channels are averaged; where they
    cancel each other out, the loudest is taken, with a note. A segment costs the decoding of all that lies before it,
    except in WAV and FLAC.

    Raises AudioError for a file that is missing, undecodable, cut off, empty or not finite, for a segment outside it,
    and for a `duration` that is above what there is by more than rounding.
    """
    label = name or ("<bytes>" if isinstance(source, bytes) else str(source))
    if not (0 <= offset < math.inf) or (duration is not None and not (0 < duration < math.inf)):
        raise AudioError(
            f"{label}: segment offset {offset!r} s, duration {duration!r} s; expected an offset of 0 or "
            "more and a duration above 0, both finite"
        )
    with opened(source, label) as file:
        decoded = decode(file, label, offset, duration)
        _check_segment(decoded, label, offset, duration)
        parts = [_resample(_mono(samples, label), rate, label) for samples, rate in decoded.pieces]
        waveform = parts[0] if len(parts) == 1 else torch.cat(parts)
    # A finite sum has finite terms only, and takes a twentieth of the time.
    if not (waveform.sum().isfinite() or waveform.isfinite().all()):
        raise AudioError(f"{label}: holds NaN or infinite samples; expected finite audio: export it again")
    return waveform


def audio_seconds(source: str | Path | bytes, *, name: str | None = None) -> float:
    """Measure a recording's length in seconds; `name` stands for it in messages, AudioError says why it cannot be read.

    The header tells it for a plain WAV, the frames' headers for a FLAC; anything else is decoded.
    """
    label = name or str(source)
    with opened(source, label) as file:
        return measure(file, label)


def check_duration(seconds: float, claimed: float | None, label: str) -> None:
    """Raise AudioError if the `claimed` duration is above the decoded `seconds` by more than rounding."""
    if claimed is not None and claimed > _ROUNDING * seconds + _ROUNDING_SECONDS:
        raise AudioError(
            f"{label}: lasts {seconds:.3f} s, expected the {claimed:.3f} s that its duration says: mend it, or copy "
            "the audio again"
        )


def _check_segment(decoded: Decoded, label: str, offset: float, duration: float | None) -> None:
    end = decoded.end
    if end == 0:
        raise AudioError(f"{label}: holds no audio; expected at least one sample: remove it or record it again")
    if not decoded.pieces:
        length = "" if duration is None else f" of {duration} s"
        raise AudioError(
            f"{label}: its segment at {offset} s{length} holds no sample; it was read to {end:.3f} s: mend it"
        )
    check_duration(end - offset, duration, f"{label} from {offset:g} s on" if offset else label)


def _mono(samples: NDArray[np.float32], label: str) -> Tensor:
    """(S, C) -> (S,): the mean of the channels, or the loudest where they cancel each other out."""
    channels = samples.shape[1]
    if channels == 1:
        return torch.from_numpy(samples[:, 0])
    tracks = torch.from_numpy(samples).T.contiguous()
    mean, powers = tracks.mean(0), tracks.var(1, correction=0)
    if mean.var(correction=0) < _CANCELLED * powers.sum() / channels**2:
        loudest = int(powers.argmax())
        logger.warning(
            "note: %s: its channels cancel each other out, as when one is inverted; only channel %d of %d is used",
            label, loudest + 1, channels,
        )  # fmt: skip
        return tracks[loudest].clone()
    return mean


def _resample(mono: Tensor, rate: int, label: str) -> Tensor:
    """(S,) at `rate` -> (S,) at 16 kHz."""
    if rate == SAMPLE_RATE:
        return mono
    check_size(len(mono) * SAMPLE_RATE / rate, label)
    common = math.gcd(rate, SAMPLE_RATE)
    if (rate // common) * (SAMPLE_RATE // common) > _MAX_RESAMPLE_TAPS:
        return _resample_any(mono, rate)
    from torchaudio.functional import resample

    resampled: Tensor = resample(mono, rate, SAMPLE_RATE)
    return resampled


def _resample_any(mono: Tensor, rate: int) -> Tensor:
    """FFmpeg's interpolated filter, for rates with no useful ratio to 16 kHz."""
    import av

    frame = av.AudioFrame.from_ndarray(mono.numpy()[None], format="flt", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
    blocks = [block.to_ndarray()[0] for part in (frame, None) for block in resampler.resample(part)]
    return torch.from_numpy(np.concatenate(blocks))
