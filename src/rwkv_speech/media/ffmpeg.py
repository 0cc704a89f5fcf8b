"""What FFmpeg's libraries (PyAV) decode: nearly everything, chains of streams and damaged files, too.

S samples · C channels
"""

import itertools
import logging
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rwkv_speech.errors import AudioError
from rwkv_speech.media.headers import SLACK_SECONDS, lacks_data, ogg_links
from rwkv_speech.media.opening import Undecodable

# PyAV is imported where it is used: it takes 50 ms, and plain WAV and FLAC never need it.

logger = logging.getLogger(__name__)

# Claims of other headers are told when they are missed by more.
_CLAIM, _CLAIM_SECONDS = 1.01, 0.5
_BUFFER = 1 << 17  # bytes that are read at a time

# Samples (S, C) float32 and their rate.
Block = tuple[NDArray[np.float32], int]


@contextmanager
def opened_by_ffmpeg(file: BinaryIO, label: str) -> Iterator[tuple[Any, Any]]:
    """The container and its best audio stream."""
    import av

    file.seek(0)
    try:
        # Playlists must not make it open other files or addresses; tags may hold anything.
        options = {"protocol_whitelist": ""}
        with av.open(file, options=options, metadata_errors="ignore", buffer_size=_BUFFER) as container:
            stream = container.streams.best("audio")
            if stream is None or stream.codec_context is None:
                raise Undecodable(label, "it holds no audio, or in an unknown codec")
            yield container, stream
    except av.FFmpegError as error:
        raise Undecodable(label, error.strerror) from error


def read_ffmpeg(
    file: BinaryIO, label: str, offset: float, duration: float | None, given: int
) -> Generator[Block, None, float]:
    """Yield a segment by decoding all that lies before it; in a chain, rate and channels may change."""
    end, chain = 0.0, _Chain(file, label)
    for (rate, _), run in itertools.groupby(chain, lambda frame: (frame.sample_rate, frame.layout.nb_channels)):
        first = round((offset - end) * rate) + given
        last = sys.maxsize if duration is None else round((offset + duration - end) * rate)
        at = given = 0
        for frame in run:
            if first < at + frame.samples and at < last:
                yield _floats(frame)[max(0, first - at) : last - at], rate
            at += frame.samples
            if at >= last:
                break
        end += at / rate
        if at >= last:
            return end
    chain.check(end)
    return end


class _Chain:
    """The decoded frames of a file, of all links if it is a chain of Ogg streams; damaged packets are left out."""

    def __init__(self, file: BinaryIO, label: str) -> None:
        self._file, self._label = file, label
        self._sound = self._damaged = 0
        self._format, self._claimed = "", 0.0
        self._last: Any = None

    def __iter__(self) -> Iterator[Any]:
        for link in ogg_links(self._file):
            try:
                with opened_by_ffmpeg(link, self._label) as (container, stream):
                    self._format = container.format.name
                    self._claimed += float((stream.duration or 0) * stream.time_base)
                    yield from self._frames(container, stream)
            except Undecodable:
                if not self._sound:
                    raise
                self._damaged += 1

    def _frames(self, container: Any, stream: Any) -> Iterator[Any]:
        import av

        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet else []
            except av.FFmpegError:
                self._damaged += 1
                continue
            except IndexError:
                # PyAV does not know a stream that begins later.
                packets = container.demux(stream)
                continue
            if packet is None:
                return
            self._sound += 1
            for self._last in frames:
                yield self._last

    def check(self, end: float) -> None:
        """Raise AudioError if less could be decoded, up to the second `end`, than there should be.

        A WAV's data size is a promise, unless it stands for an unknown one; a FLAC's length is one if frames are
        damaged or missing. Other claims are often estimates, or wrong: a note.
        """
        if self._damaged > self._sound:
            count = f"{self._damaged} of {self._damaged + self._sound} packets are damaged"
            # Another decoder may try only what has given nothing so far.
            raise Undecodable(self._label, count) if self._last is None else _damaged(self._label, count)
        # Where the last frame says that it ends: beyond what was decoded, if frames between were lost.
        reached = (self._last.time or 0) + self._last.samples / self._last.sample_rate if self._last else 0
        is_damaged = self._damaged > 0 or reached - end > SLACK_SECONDS
        misses_flac = self._format == "flac" and self._claimed - end > SLACK_SECONDS and is_damaged
        if misses_flac or (self._format == "wav" and lacks_data(self._file)):
            raise _damaged(self._label, f"{end:.3f} s could be decoded, its header promises more")
        if self._claimed > _CLAIM * end + _CLAIM_SECONDS:
            logger.warning(
                "note: %s: %.3f s could be decoded, and are used; its header claims %.3f s",
                *(self._label, end, self._claimed),
            )


def _damaged(label: str, what: str) -> AudioError:
    return AudioError(f"{label}: is cut off or damaged: {what}; expected a whole file: copy it again")


def _floats(frame: Any) -> NDArray[np.float32]:
    """The samples of a frame as (S, C), integers scaled to -1..1."""
    # PyAV reads past the memory of 8 and more channels that lie apart, and leaves 64-bit integers to others.
    if (frame.format.is_planar and frame.layout.nb_channels >= 8) or frame.format.name in ("s64", "s64p"):
        import av

        (frame,) = av.AudioResampler("flt").resample(frame)
    samples = frame.to_ndarray()  # (C, S), or (1, S * C) where channels alternate
    samples = samples.T if frame.format.is_planar else samples.reshape(frame.samples, -1)
    with np.errstate(over="ignore"):  # infinite samples are reported as such
        scaled = samples.astype(np.float32, copy=False)
    if samples.dtype.kind == "f":
        return scaled
    half = np.float32(2 ** (8 * samples.itemsize - 1))
    return (scaled - half if samples.dtype.kind == "u" else scaled) / half
