"""The samples of an audio file, whatever its container and codec.

No length that a header claims is believed: a file is decoded until there is no more. libsndfile reads plain WAV and
FLAC, which it does fastest and with exact seeks; FFmpeg's libraries (PyAV) read everything else, and any WAV or FLAC
that is not what its header says.

S samples · C channels
"""

import io
import itertools
import logging
import math
import os
import stat
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

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
_BUFFER, _BLOCK, _MOST_VALUES = 1 << 17, 1 << 20, 1 << 31
# People round the durations of manifests, some to whole seconds.
_ROUNDING_SECONDS, _ROUNDING = 0.5, 1.01
# What decoders raise for broken files.
FAILURES = (OSError, ValueError, RuntimeError, MemoryError, ArithmeticError)

# Samples (S, C) float32 and their rate.
Block = tuple[NDArray[np.float32], int]


class _Undecodable(AudioError):
    """A file that no decoder knows."""

    def __init__(self, label: str, error: object) -> None:
        super().__init__(
            f"{label}: cannot be decoded ({error}); expected WAV, FLAC, MP3, Ogg, Opus, M4A, WebM, WMA or another file "
            "that FFmpeg or libsndfile reads, with a header that tells format and sampling rate: convert it; nobody "
            "can know the rate of raw samples without one"
        )


def decode(file: BinaryIO, label: str, offset: float, duration: float | None) -> Iterator[Block]:
    """Yield a segment (s) of an open file in blocks, without a `duration` up to its end.

    Raises AudioError, behind the blocks if it is for what comes after them.
    """
    is_empty = True
    blocks = _decode(file, label, offset, duration)
    try:
        while True:
            yield next(blocks)
            is_empty = False
    except StopIteration as stop:
        end: float = stop.value
    if end == 0:
        raise AudioError(f"{label}: holds no audio; expected at least one sample: remove it or record it again")
    if is_empty:
        length = "" if duration is None else f" of {duration} s"
        raise AudioError(
            f"{label}: its segment at {offset} s{length} holds no sample; it was read to {end:.3f} s: mend it"
        )
    check_duration(end - offset, duration, f"{label} from {offset:g} s on" if offset else label)


def check_duration(seconds: float, claimed: float | None, label: str) -> None:
    """Raise AudioError if the `claimed` duration is above the decoded `seconds` by more than rounding."""
    if claimed is not None and claimed > _ROUNDING * seconds + _ROUNDING_SECONDS:
        raise AudioError(
            f"{label}: lasts {seconds:.3f} s, expected the {claimed:.3f} s that its duration says: mend it, or copy "
            "the audio again"
        )


def measure(file: BinaryIO, label: str) -> float:
    """Count the seconds of an open file; raises AudioError."""
    if _plain_size(file):
        with suppress(soundfile.SoundFileError), _libsndfile(file) as sound:
            if sound.format != "FLAC" and sound.subtype in _PLAIN_SUBTYPES and sound.frames:
                return float(sound.frames / sound.samplerate)
            if sound.format == "FLAC":
                with _ffmpeg(file, label) as (container, stream):
                    packets = [(p.duration or 0, p.size) for p in container.demux(stream) if p.size]
                    units = [duration for duration, _ in packets]
                    # Of a damaged file there may be more or less than the frames' headers say: some packets are longer
                    # than the longest frame (bytes 7 to 9 of STREAMINFO; 0: not known).
                    longest = int.from_bytes((stream.codec_context.extradata or b"")[7:10], "big") or math.inf
                    is_sound = all(units) and max((size for _, size in packets), default=0) <= longest
                    if is_sound and sum(units) == stream.duration:
                        return float(sum(units) * stream.time_base)
    blocks = _read_any(file, label, 0.0, None)
    try:
        while True:
            next(blocks)
    except StopIteration as stop:
        return float(stop.value)


def claimed(file: BinaryIO) -> float:
    """The seconds that an open file's header claims, 0 if none; raises AudioError."""
    with _ffmpeg(file, "") as (container, _):
        return max(0.0, (container.duration or 0) / 1e6)


@contextmanager
def opened(source: str | Path | bytes, label: str) -> Iterator[BinaryIO]:
    """The source as an open file, without ID3 tags in front; what it makes a decoder raise becomes an AudioError."""
    with ExitStack() as stack:
        file = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(_open_file(source, label))
        try:
            yield _without_tag(file)
        except AudioError:
            raise
        except FAILURES as error:
            raise _Undecodable(label, error) from error


def _open_file(path: str | Path, label: str) -> BinaryIO:
    try:
        # A pipe or a device could block for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AudioError(f"{label}: is a folder, a pipe or a device; expected an audio file: check the path")
        # By number, so that no decoder guesses from a name's end what the content does not say.
        return _File(os.open(path, os.O_RDONLY))
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


class _File(io.FileIO):
    """A file in which a position that no file has, as a broken header may name it, is the end; as in io.BytesIO."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move as io.FileIO does."""
        try:
            return super().seek(offset, whence)
        except OSError:
            return super().seek(0, os.SEEK_END)


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
    return _without_tag(_Part(file, length, size))


class _Part(io.RawIOBase, BinaryIO):
    """Some of an open file's bytes, as a file."""

    def __init__(self, file: BinaryIO, first: int, last: int) -> None:
        self._file, self._first, self._size, self._at = file, first, last - first, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._first + self._at)
        found = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


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


def _decode(file: BinaryIO, label: str, offset: float, duration: float | None) -> Generator[Block, None, float]:
    """Yield a segment; returns where it ends."""
    size, given = _plain_size(file), 0
    if size:
        with suppress(soundfile.SoundFileError), _libsndfile(file) as sound:
            if sound.subtype in _PLAIN_SUBTYPES:
                blocks = _read_libsndfile(sound, offset, duration)
                try:
                    while True:
                        block = next(blocks)
                        given += len(block[0])
                        yield block
                except StopIteration as stop:
                    end: float | None = stop.value
                # Behind the end of a FLAC whose header promises too little, there is something left to read.
                is_end = end is not None and end * sound.samplerate >= sound.frames
                if end is not None and not (is_end and sound.format == "FLAC" and file.tell() < size):
                    return end
    # The header lies, or there is damage: FFmpeg goes on.
    return (yield from _read_any(file, label, offset, duration, given))


def _read_libsndfile(
    sound: soundfile.SoundFile, offset: float, duration: float | None
) -> Generator[Block, None, float | None]:
    """Yield a segment; returns where it ends, None if there is less than the header says."""
    rate, total = sound.samplerate, sound.frames
    first = round(offset * rate)
    last = total if duration is None else min(first + round(duration * rate), total)
    if not first < total < sys.maxsize:
        return None
    begin, step = sound.seek(first) if sound.seekable() else 0, max(1, _BLOCK // sound.channels)
    for start in range(begin, last, step):
        wanted = min(step, last - start)
        samples = sound.read(wanted, dtype="float32", always_2d=True)
        if start + len(samples) > first:
            yield samples[max(0, first - start) :], rate
        if len(samples) < wanted:
            return None
    return last / rate


def _read_any(
    file: BinaryIO, label: str, offset: float, duration: float | None, given: int = 0
) -> Generator[Block, None, float]:
    """Yield a segment of what FFmpeg knows, or libsndfile alone, but for the first `given` samples of it."""
    try:
        return (yield from _read_ffmpeg(file, label, offset, duration, given))
    except _Undecodable:
        # Formats of old programs; what FFmpeg knows and refuses, libsndfile would take for as long as its header says.
        # FFmpeg raises this before its first block.
        with suppress(soundfile.SoundFileError), _libsndfile(file) as sound:
            is_old = sound.format not in ("MP3", "OGG", "FLAC") and not given
            if is_old and (end := (yield from _read_libsndfile(sound, offset, duration))):
                return end
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


def _read_ffmpeg(
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
        for link in _ogg_links(self._file):
            try:
                with _ffmpeg(link, self._label) as (container, stream):
                    self._format = container.format.name
                    self._claimed += float((stream.duration or 0) * stream.time_base)
                    yield from self._frames(container, stream)
            except _Undecodable:
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
            raise _Undecodable(self._label, count) if self._last is None else _damaged(self._label, count)
        # Where the last frame says that it ends: beyond what was decoded, if frames between were lost.
        reached = (self._last.time or 0) + self._last.samples / self._last.sample_rate if self._last else 0
        is_damaged = self._damaged > 0 or reached - end > _SLACK_SECONDS
        misses_flac = self._format == "flac" and self._claimed - end > _SLACK_SECONDS and is_damaged
        if misses_flac or (self._format == "wav" and _lacks_data(self._file)):
            raise _damaged(self._label, f"{end:.3f} s could be decoded, its header promises more")
        if self._claimed > _CLAIM * end + _CLAIM_SECONDS:
            logger.warning(
                "note: %s: %.3f s could be decoded, and are used; its header claims %.3f s",
                *(self._label, end, self._claimed),
            )


def _damaged(label: str, what: str) -> AudioError:
    return AudioError(f"{label}: is cut off or damaged: {what}; expected a whole file: copy it again")


def _ogg_links(file: BinaryIO) -> list[BinaryIO]:
    """The streams that an Ogg file holds one after another, each as a file; the file itself if it is no such chain.

    A link begins with pages that are marked as beginnings of streams (RFC 3533); FFmpeg itself follows one whose header
    is that of the link before.
    """
    size = file.seek(0, os.SEEK_END)
    starts, at, was_first, header = [0], 0, True, b""
    while True:
        file.seek(at)
        page = file.read(27 + 255)
        if len(page) < 27 or page[:4] != b"OggS":
            break
        is_first, body = bool(page[5] & 2), 27 + page[26]
        length = body + sum(page[27:body])
        if is_first:
            file.seek(at + body)
            content = file.read(length - body)
            if not was_first and content != header:
                starts.append(at)
            header = content
        at, was_first = at + length, is_first
    if len(starts) == 1:
        return [file]
    return [_Part(file, first, last) for first, last in itertools.pairwise([*starts, size])]


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
