"""Audio files -> 16 kHz mono samples -> an encoder's frames -> audio tokens.

S samples · C channels · F frames · A audio tokens
"""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.errors import AudioError as AudioError
from rwkv_speech.errors import printable
from rwkv_speech.media import FAILURES, Block, check_size, claimed, decode, measure, opened
from rwkv_speech.media import check_duration as check_duration

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000

# torchaudio builds a dense filter of rate x rate / gcd^2 taps: 0.1 M for 44.1 kHz, 256 M for 15,999 Hz.
_MAX_RESAMPLE_TAPS = 20_000_000
# Beyond these a header lies: of a few Hz, some bytes would be hours.
_MIN_RATE, _MAX_RATE = 1_000, 10_000_000
# The mean of unrelated channels has the power of all of them by C^2; far below that, they cancel each other out.
_CANCELLED = 0.1

Lengths = TypeVar("Lengths", int, Tensor)


@dataclass(frozen=True)
class Framing:
    """How an encoder makes frames of samples: by convolutions of these kernels and strides, one after another.

    `centre` is the sample in the middle of the first frame.
    """

    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    centre: float

    @classmethod
    def of_convolutions(cls, kernels: Iterable[int], strides: Iterable[int]) -> "Framing":
        """Without padding: the first frame sees the first samples."""
        seen = cls(tuple(kernels), tuple(strides), 0.0)
        return replace(seen, centre=seen.min_samples / 2)

    @property
    def min_samples(self) -> int:
        """The shortest input that gives a frame at all: the samples that one frame sees."""
        return 1 + sum((kernel - 1) * math.prod(self.strides[:i]) for i, kernel in enumerate(self.kernels))

    @property
    def samples_per_frame(self) -> int:
        """From one frame to the next."""
        return math.prod(self.strides)

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return SAMPLE_RATE / self.samples_per_frame

    def count(self, num_samples: Lengths) -> Lengths:
        """The frames F of S samples, 0 below `min_samples`; an int or a tensor."""
        length = num_samples
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            length = (length - kernel) // stride + 1
        # A length that has fallen to zero or below never climbs back, so one clamp at the end is exact.
        return length.clamp(min=0) if isinstance(length, Tensor) else max(length, 0)

    def shortest(self, frames: int) -> int:
        """The fewest samples that give so many frames."""
        return self.min_samples + (frames - 1) * self.samples_per_frame


def length_mask(lengths: Tensor, size: int, device: torch.device | None = None) -> Tensor:
    """True inside each of the B lengths, (B, size), on `device`, else on that of the lengths."""
    device = device or lengths.device
    return torch.arange(size, device=device)[None] < lengths.to(device, non_blocking=True)[:, None]


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
    blocks = list(read_blocks(source, math.inf, offset, duration, name=name))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def read_blocks(
    source: str | Path | bytes,
    seconds: float = 30.0,
    offset: float = 0.0,
    duration: float | None = None,
    *,
    name: str | None = None,
) -> Iterator[Tensor]:
    """Decode a recording of any length, as `load_audio` does, in blocks (S,) of about `seconds`, in constant memory.

    One after another they are what `load_audio` gives, where it resamples to 1e-6: how a convolution rounds depends on
    its length. Whether channels cancel each other out is decided from what came so far.

    Raises AudioError as `load_audio`, after the blocks that could be decoded.
    """
    label = name or ("<bytes>" if isinstance(source, bytes) else printable(source))
    if not (0 <= offset < math.inf) or (duration is not None and not (0 < duration < math.inf)):
        raise AudioError(
            f"{label}: segment offset {offset!r} s, duration {duration!r} s; expected an offset of 0 or "
            "more and a duration above 0, both finite"
        )
    failures = list[Exception]()

    def decoded(file: BinaryIO) -> Iterator[Block]:
        try:
            yield from decode(file, label, offset, duration)
        except FAILURES as error:
            failures.append(error)

    with opened(source, label) as file:
        for (rate, _), run in itertools.groupby(decoded(file), lambda block: (block[1], block[0].shape[1])):
            mixer, resampler = _Mixer(label), Resampler(rate, label)
            for samples in _joined(run, seconds * rate, label):
                yield _finite(resampler.push(mixer.mono(samples)), label)
            if len(rest := resampler.finish()):
                yield _finite(rest, label)
        if failures:
            raise failures[0]


def as_waveform(samples: Tensor | np.ndarray, name: str) -> Tensor:
    """(S,) float32; raises AudioError for other shapes and kinds."""
    kind = samples.dtype.name if isinstance(samples, np.ndarray) else str(samples.dtype).removeprefix("torch.")
    if samples.ndim != 1 or not ("float" in kind or kind == "int16"):
        raise AudioError(
            f"{name}: found {kind} of shape {tuple(samples.shape)}, expected samples at {SAMPLE_RATE} Hz of shape "
            "(S,), floating-point numbers between -1 and 1 or int16: convert them, or give a file"
        )
    if isinstance(samples, np.ndarray):
        samples = torch.from_numpy(samples.astype(np.float32))
    waveform = samples.detach().cpu().float() / (2**15 if kind == "int16" else 1)
    if not waveform.isfinite().all():
        raise AudioError(f"{name}: holds NaN or infinite samples; expected finite audio")
    return waveform


def audio_seconds(source: str | Path | bytes, *, name: str | None = None) -> float:
    """Measure a recording's length in seconds; `name` stands for it in messages, AudioError says why it cannot be read.

    The header tells it for a plain WAV, the frames' headers for a FLAC; anything else is decoded.
    """
    label = name or ("<bytes>" if isinstance(source, bytes) else printable(source))
    with opened(source, label) as file:
        return measure(file, label)


def claimed_seconds(path: str | Path) -> float:
    """The length that a file's header claims, in seconds, which may be wrong; 0 where there is none."""
    with suppress(AudioError), opened(path, str(path)) as file:
        return claimed(file)
    return 0.0


def _joined(blocks: Iterator[Block], size: float, label: str) -> Iterator[NDArray[np.float32]]:
    """Blocks (S, C) of one rate as blocks of at least `size` samples, but for the last."""
    waiting, count = list[NDArray[np.float32]](), 0
    for samples, _ in blocks:
        waiting.append(samples)
        count += len(samples)
        check_size(count * samples.shape[1], label)
        if count >= size:
            yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            waiting, count = [], 0
    if waiting:
        yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)


def _finite(waveform: Tensor, label: str) -> Tensor:
    # A finite sum has finite terms only, and takes a twentieth of the time.
    if not (waveform.sum().isfinite() or waveform.isfinite().all()):
        raise AudioError(f"{label}: holds NaN or infinite samples; expected finite audio: export it again")
    return waveform


class _Mixer:
    """From channels to one: their mean, or the loudest where they cancel each other out."""

    def __init__(self, label: str) -> None:
        self._label, self._is_told = label, False
        self._count, self._centres, self._powers = 0, torch.zeros(1), torch.zeros(1)  # of the channels and their mean

    def mono(self, samples: NDArray[np.float32]) -> Tensor:
        """The next (S, C) -> (S,)."""
        channels = samples.shape[1]
        if channels == 1:
            return torch.from_numpy(samples[:, 0])
        tracks = torch.from_numpy(samples).T.contiguous()
        mean = tracks.mean(0)
        self._add(len(samples), *(torch.cat([f(tracks, 1), f(mean[None], 1)]).double() for f in (torch.mean, _power)))
        *powers, of_mean = self._powers.tolist()
        if of_mean >= _CANCELLED * sum(powers) / channels**2:
            return mean
        loudest = powers.index(max(powers))
        if not self._is_told:
            self._is_told = True
            logger.warning(
                "note: %s: its channels cancel each other out, as when one is inverted; only channel %d of %d is used",
                self._label, loudest + 1, channels,
            )  # fmt: skip
        return tracks[loudest].clone()

    def _add(self, count: int, centres: Tensor, powers: Tensor) -> None:
        """Means and variances of all samples so far from those of a block (Chan et al., 1979)."""
        self._count += count
        share, change = count / self._count, centres - self._centres
        self._powers = (1 - share) * self._powers + share * powers + share * (1 - share) * change.square()
        self._centres = self._centres + share * change


def _power(tracks: Tensor, dim: int) -> Tensor:
    return tracks.var(dim, correction=0)


class Resampler:
    """From `rate` to 16 kHz, block by block."""

    def __init__(self, rate: int, label: str) -> None:
        self._rate, self._label = rate, label
        if not _MIN_RATE <= rate <= _MAX_RATE:
            raise AudioError(
                f"{label}: has {rate:,} samples a second; expected {_MIN_RATE:,} to {_MAX_RATE:,}: mend its header"
            )
        common = math.gcd(rate, SAMPLE_RATE)
        # So many samples become so many.
        self._step, self._made = rate // common, SAMPLE_RATE // common
        self._is_sinc = rate != SAMPLE_RATE and self._step * self._made <= _MAX_RESAMPLE_TAPS
        self._waiting, self._skip = torch.zeros(0), 0  # what the next steps see; the first ones of them are made
        self._any: Any = None

    def push(self, mono: Tensor) -> Tensor:
        """The next (S,) -> what they make certain."""
        if self._rate == SAMPLE_RATE:
            return mono
        check_size(len(mono) * SAMPLE_RATE / self._rate, self._label)
        if not self._is_sinc:
            return self._through_ffmpeg(mono)
        sinc = _sinc(self._rate)
        samples = torch.cat([self._waiting, mono]) if len(self._waiting) else mono
        steps = (len(samples) - sinc.width) // self._step
        if steps <= self._skip:
            self._waiting = samples
            return samples[:0]
        made: Tensor = sinc(samples)[self._skip * self._made : steps * self._made]
        # A step sees `width` samples before it and behind it.
        self._skip = min(steps, -(-sinc.width // self._step))
        self._waiting = samples[(steps - self._skip) * self._step :].clone()
        return made

    def finish(self) -> Tensor:
        """The rest (S,)."""
        if self._is_sinc and len(self._waiting):
            rest: Tensor = _sinc(self._rate)(self._waiting)[self._skip * self._made :]
            return rest
        return self._through_ffmpeg(None) if self._any else torch.zeros(0)

    def _through_ffmpeg(self, mono: Tensor | None) -> Tensor:
        """Its interpolated filter, for rates with no useful ratio to 16 kHz; None for the rest."""
        import av

        self._any = self._any or av.AudioResampler("flt", "mono", SAMPLE_RATE)
        frame = None
        if mono is not None:
            frame = av.AudioFrame.from_ndarray(mono.numpy()[None], format="flt", layout="mono")
            frame.sample_rate = self._rate
        blocks = [block.to_ndarray()[0] for block in self._any.resample(frame)]
        return torch.from_numpy(np.concatenate(blocks)) if blocks else torch.zeros(0)


@lru_cache(8)
def _sinc(rate: int) -> Any:
    from torchaudio.transforms import Resample

    return Resample(rate, SAMPLE_RATE, dtype=torch.float32)
