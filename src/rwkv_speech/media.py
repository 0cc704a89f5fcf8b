"""The samples of an audio file, whatever its container and codec.

No length that a header claims is believed: a file is decoded until there is no more. libsndfile reads plain WAV and
FLAC, which it does fastest and with exact seeks; FFmpeg's libraries (PyAV) read everything else, and any WAV or FLAC
that is not what its header says.

S samples · C channels
"""

import io
import itertools
import logging
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from rwkv_speech.errors import AudioError

# PyAV is imported where it is used: it takes 50 ms, and plain WAV and FLAC never need it.

logger = logging.getLogger(__name__)

# A promise of a header that is missed by less is met: lossy formats count to within a codec block or two.
_SLACK_SECONDS = 0.1
# Claims of other headers are told when they are missed by more.
_CLAIM, _CLAIM_SECONDS = 1.01, 0.5
# From here on a WAV's data size means that its writer did not know it.
_UNKNOWN_BYTES = 0x7FFF_0000
# Plain samples, and what FFmpeg decodes to noise, for it takes them for other codecs.
_PLAIN_SUBTYPES = frozenset(
    "PCM_U8 PCM_S8 PCM_16 PCM_24 PCM_32 FLOAT DOUBLE G721_32 NMS_ADPCM_16 NMS_ADPCM_24 NMS_ADPCM_32".split()
)
# Bytes that FFmpeg reads and values (samples x channels) that libsndfile reads at a time, and the most kept: 8 GiB.
_BUFFER, _BLOCK, _MOST_VALUES = 1 << 17, 1 << 22, 1 << 31


class Decoded(NamedTuple):
    """The wanted samples as pieces (S, C) float32 with their rates, and the second at which decoding ended."""

    pieces: list[tuple[NDArray[np.float32], int]]
    end: float


class _Undecodable(AudioError):
    """A file that no decoder knows."""

    def __init__(self, label: str, error: object) -> None:
        super().__init__(
            f"{label}: cannot be decoded ({error}); expected WAV, FLAC, MP3, Ogg, Opus, M4A, WebM, WMA or another file "
            "that FFmpeg or libsndfile reads, with a header that tells format and sampling rate: convert it; nobody "
            "can know the rate of raw samples without one"
        )


def decode(file: BinaryIO, label: str, offset: float, duration: float | None) -> Decoded:
    """Decode a segment (s) of an open file, without a `duration` up to its end; raises AudioError."""
    return _read_plain(file, label, offset, duration) or _read_any(file, label, offset, duration)


def measure(file: BinaryIO, label: str) -> float:
    """Count the seconds of an open file; raises AudioError."""
    if _plain_size(file):
        with suppress(soundfile.SoundFileError), _libsndfile(file) as sound:
            if sound.format != "FLAC" and sound.subtype in _PLAIN_SUBTYPES and sound.frames:
                return float(sound.frames / sound.samplerate)
            if sound.format == "FLAC":
                with _ffmpeg(file, label) as (container, stream):
                    return sum(float((packet.duration or 0) * stream.time_base) for packet in container.demux(stream))
    return _read_any(file, label, 0.0, None).end


@contextmanager
def opened(source: str | Path | bytes, label: str) -> Iterator[BinaryIO]:
    """The source as an open file, without ID3 tags in front; what it makes a decoder raise becomes an AudioError."""
    with ExitStack() as stack:
        file = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(_open_file(source, label))
        try:
            yield _without_tag(file)
        except AudioError:
            raise
        except (OSError, ValueError, RuntimeError, MemoryError, ArithmeticError) as error:
            raise _Undecodable(label, error) from error


def _open_file(path: str | Path, label: str) -> BinaryIO:
    try:
        # A pipe or a device could block for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AudioError(f"{label}: is a folder, a pipe or a device; expected an audio file: check the path")
        # By number, so that no decoder guesses from a name's end what the content does not say.
        return open(os.open(path, os.O_RDONLY), "rb", buffering=0)
    except AudioError:
        raise
    except FileNotFoundError as error:
        raise AudioError(f"{label}: no such audio file; expected a readable file: check the path") from error
    except OSError as error:
        raise AudioError(
            f"{label}: cannot be read ({error.strerror}); expected an audio file: check the path"
        ) from error
    except ValueError as error:
        raise AudioError(f"{label}: is no path ({error}); expected an audio file: check the path") from error


def _without_tag(file: BinaryIO) -> BinaryIO:
    """The file itself, or what follows an ID3 tag, which decoders skip in some formats only."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(10)
    if head[:3] != b"ID3" or len(head) < 10:
        return file
    length = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    if length >= size:
        return file
    file.seek(length)
    return _without_tag(io.BytesIO(file.read(size - length)))


def _plain_size(file: BinaryIO) -> int:
    """The bytes of a WAV or FLAC file, 0 of any other and of a WAV that by its header should be longer."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        return size if int.from_bytes(head[4:8], "little") + 8 <= size else 0
    return size if head[:4] == b"fLaC" else 0


def _libsndfile(file: BinaryIO) -> soundfile.SoundFile:
    file.seek(0)
    # By number it reads up to a fifth faster than through Python.
    return soundfile.SoundFile(file.fileno() if isinstance(file, io.FileIO) else file, closefd=False)


def _read_plain(file: BinaryIO, label: str, offset: float, duration: float | None) -> Decoded | None:
    """Read a segment of a WAV or FLAC of plain samples that is what its header says; None of any other file."""
    size = _plain_size(file)
    if not size:
        return None
    with suppress(soundfile.SoundFileError), _libsndfile(file) as sound:
        decoded = _read_libsndfile(sound, label, offset, duration) if sound.subtype in _PLAIN_SUBTYPES else None
        # Behind the end of a FLAC whose header promises too little, there is something left to read.
        is_end = decoded and decoded.end * sound.samplerate >= sound.frames
        if not (is_end and sound.format == "FLAC" and file.tell() < size):
            return decoded
    return None


def _read_libsndfile(sound: soundfile.SoundFile, label: str, offset: float, duration: float | None) -> Decoded | None:
    """Read a segment; None if there is less than the header says."""
    rate, total = sound.samplerate, sound.frames
    first = round(offset * rate)
    last = total if duration is None else min(first + round(duration * rate), total)
    if not first < total < sys.maxsize:
        return None
    begin = sound.seek(first) if sound.seekable() else 0
    blocks, step = [], max(1, _BLOCK // sound.channels)
    for start in range(begin, last, step):
        wanted = min(step, last - start)
        check_size((start - begin + wanted) * sound.channels, label)
        blocks.append(sound.read(wanted, dtype="float32", always_2d=True))
        if len(blocks[-1]) < wanted:
            return None
    samples = blocks[0] if len(blocks) == 1 else np.concatenate(blocks) if blocks else np.empty((0, 1), np.float32)
    return Decoded([(samples[first - begin :], rate)] if first < last else [], last / rate)


def _read_any(file: BinaryIO, label: str, offset: float, duration: float | None) -> Decoded:
    """Read a segment of what FFmpeg knows, or libsndfile alone; raises AudioError."""
    try:
        return _read_ffmpeg(file, label, offset, duration)
    except _Undecodable:
        # Formats of old programs; what FFmpeg knows and refuses, libsndfile would take for as long as its header says.
        with suppress(soundfile.SoundFileError), _libsndfile(file) as sound:
            is_old = sound.format not in ("MP3", "OGG", "FLAC")
            if is_old and (decoded := _read_libsndfile(sound, label, offset, duration)):
                return decoded
        raise


@contextmanager
def _ffmpeg(file: BinaryIO, label: str) -> Iterator[tuple[Any, Any]]:
    """The container and its best audio stream."""
    import av

    file.seek(0)
    try:
        # Playlists must not make it open other files or addresses; tags may hold anything.
        options = {"protocol_whitelist": ""}
        with av.open(file, options=options, metadata_errors="ignore", buffer_size=_BUFFER) as container:
            stream = container.streams.best("audio")
            if stream is None or stream.codec_context is None:
                raise _Undecodable(label, "it holds no audio, or in an unknown codec")
            yield container, stream
    except av.FFmpegError as error:
        raise _Undecodable(label, error.strerror) from error


def _read_ffmpeg(file: BinaryIO, label: str, offset: float, duration: float | None) -> Decoded:
    """Read a segment by decoding all that lies before it; in a chain, rate and channels may change."""
    pieces, end, num_values, chain = [], 0.0, 0, _Chain(file, label)
    for (rate, _), run in itertools.groupby(chain, lambda frame: (frame.sample_rate, frame.layout.nb_channels)):
        first = round((offset - end) * rate)
        last = sys.maxsize if duration is None else round((offset + duration - end) * rate)
        at, blocks = 0, []
        for frame in run:
            if first < at + frame.samples and at < last:
                blocks.append(_floats(frame)[max(0, first - at) : last - at])
                num_values += blocks[-1].size
                check_size(num_values, label)
            at += frame.samples
            if at >= last:
                break
        end += at / rate
        if blocks:
            pieces.append((np.concatenate(blocks), rate))
        if at >= last:
            return Decoded(pieces, end)
    chain.check(end)
    return Decoded(pieces, end)


class _Chain:
    """The decoded frames of a file, of all links if it is a chain of Ogg streams; damaged packets are left out."""

    def __init__(self, file: BinaryIO, label: str) -> None:
        self._file, self._label = file, label
        self._sound = self._damaged = 0
        self._format, self._claimed = "", 0.0
        self._last: Any = None

    def __iter__(self) -> Iterator[Any]:
        for link in _ogg_links(self._file):
            try:
                with _ffmpeg(link, self._label) as (container, stream):
                    self._format = container.format.name
                    self._claimed += float((stream.duration or 0) * stream.time_base)
                    yield from self._frames(container.demux(stream))
            except _Undecodable:
                if not self._sound:
                    raise
                self._damaged += 1

    def _frames(self, packets: Iterator[Any]) -> Iterator[Any]:
        import av

        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet else []
            except av.FFmpegError:
                self._damaged += 1
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
            raise _Undecodable(self._label, f"{self._damaged} of {self._damaged + self._sound} packets are damaged")
        # Where the last frame says that it ends: beyond what was decoded, if frames between were lost.
        reached = (self._last.time or 0) + self._last.samples / self._last.sample_rate if self._last else 0
        is_damaged = self._damaged > 0 or reached - end > _SLACK_SECONDS
        misses_flac = self._format == "flac" and self._claimed - end > _SLACK_SECONDS and is_damaged
        if misses_flac or (self._format == "wav" and _lacks_data(self._file)):
            raise AudioError(
                f"{self._label}: is cut off or damaged: {end:.3f} s could be decoded, its header promises more: copy "
                "it again"
            )
        if self._claimed > _CLAIM * end + _CLAIM_SECONDS:
            logger.warning(
                "note: %s: %.3f s could be decoded, and are used; its header claims %.3f s",
                *(self._label, end, self._claimed),
            )


def _ogg_links(file: BinaryIO) -> list[BinaryIO]:
    """The streams that an Ogg file holds one after another, each as a file; the file itself if it is no such chain.

    A link begins with pages that are marked as beginnings of streams (RFC 3533); FFmpeg itself follows one whose header
    is that of the link before.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(4) != b"OggS":
        return [file]
    file.seek(0)
    content, starts, at, is_first, header = file.read(size), [0], 0, True, b""
    while content[at : at + 4] == b"OggS" and at + 27 <= size:
        begins = bool(content[at + 5] & 2)
        body = at + 27 + content[at + 26]
        end = body + sum(content[at + 27 : body])
        if begins and not is_first and content[body:end] != header:
            starts.append(at)
        if begins:
            header = content[body:end]
        at, is_first = end, begins
    if len(starts) == 1:
        return [file]
    return [io.BytesIO(content[first:last]) for first, last in itertools.pairwise([*starts, size])]


def _lacks_data(file: BinaryIO) -> bool:
    """Whether a WAV's data is shorter than its header says, by more than the slack."""
    size = file.seek(0, os.SEEK_END)
    at = file.seek(12)
    bytes_per_second = 0
    while len(head := file.read(24)) >= 8:
        length = int.from_bytes(head[4:8], "little")
        if head[:4] == b"data":
            missing = at + 8 + length - size
            return length < _UNKNOWN_BYTES and missing > max(_SLACK_SECONDS * bytes_per_second, 8)
        if head[:4] == b"fmt ":
            bytes_per_second = int.from_bytes(head[16:20], "little")
        at = file.seek(at + 8 + length + length % 2)
    return False


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


def check_size(num_values: float, label: str) -> None:
    """Raise AudioError for more samples than one recording may have."""
    if num_values > _MOST_VALUES:
        raise AudioError(
            f"{label}: holds more than {_MOST_VALUES:,} samples; expected at most 8 GiB at once: split it, or read "
            "segments of it"
        )
