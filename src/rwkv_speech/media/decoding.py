"""The samples of an audio file, whatever its container and codec.

No length that a header claims is believed: a file is decoded until there is no more. libsndfile reads plain WAV and
FLAC, which it does fastest and with exact seeks; FFmpeg reads everything else, and any WAV or FLAC that is not what its
header says.

S samples · C channels
"""

import io
import math
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import BinaryIO

import soundfile

from rwkv_speech.errors import AudioError
from rwkv_speech.media.ffmpeg import Block, opened_by_ffmpeg, read_ffmpeg
from rwkv_speech.media.headers import plain_size
from rwkv_speech.media.opening import Undecodable

# Plain samples, and what FFmpeg decodes to noise, for it takes them for other codecs.
_PLAIN_SUBTYPES = frozenset(
    "PCM_U8 PCM_S8 PCM_16 PCM_24 PCM_32 FLOAT DOUBLE G721_32 NMS_ADPCM_16 NMS_ADPCM_24 NMS_ADPCM_32".split()
)
# Values (samples x channels) that libsndfile reads at a time, and the most that are kept: 8 GiB.
_BLOCK, _MOST_VALUES = 1 << 20, 1 << 31
# People round the durations of manifests, some to whole seconds.
_ROUNDING_SECONDS, _ROUNDING = 0.5, 1.01


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
    if plain_size(file):
        with suppress(soundfile.SoundFileError), _libsndfile(file) as sound:
            if sound.format != "FLAC" and sound.subtype in _PLAIN_SUBTYPES and sound.frames:
                return float(sound.frames / sound.samplerate)
            if sound.format == "FLAC":
                with opened_by_ffmpeg(file, label) as (container, stream):
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
    with opened_by_ffmpeg(file, "") as (container, _):
        return max(0.0, (container.duration or 0) / 1e6)


def _libsndfile(file: BinaryIO) -> soundfile.SoundFile:
    file.seek(0)
    # By number it reads up to a fifth faster than through Python.
    return soundfile.SoundFile(file.fileno() if isinstance(file, io.FileIO) else file, closefd=False)


def _decode(file: BinaryIO, label: str, offset: float, duration: float | None) -> Generator[Block, None, float]:
    """Yield a segment; returns where it ends."""
    size, given = plain_size(file), 0
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
        return (yield from read_ffmpeg(file, label, offset, duration, given))
    except Undecodable:
        # Formats of old programs; what FFmpeg knows and refuses, libsndfile would take for as long as its header says.
        # FFmpeg raises this before its first block.
        with suppress(soundfile.SoundFileError), _libsndfile(file) as sound:
            is_old = sound.format not in ("MP3", "OGG", "FLAC") and not given
            if is_old and (end := (yield from _read_libsndfile(sound, offset, duration))):
                return end
        raise


def check_size(num_values: float, label: str) -> None:
    """Raise AudioError for more samples than one recording may have."""
    if num_values > _MOST_VALUES:
        raise AudioError(
            f"{label}: holds more than {_MOST_VALUES:,} samples; expected at most 8 GiB at once: split it, or read "
            "segments of it"
        )
