"""Audio files as bytes that decoders read: whatever path it is, an ID3 tag left out, and what goes wrong said."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_speech.errors import AudioError

# What decoders raise for broken files.
FAILURES = (OSError, ValueError, RuntimeError, MemoryError, ArithmeticError)


class Undecodable(AudioError):
    """A file that no decoder knows."""

    def __init__(self, label: str, error: object) -> None:
        super().__init__(
            f"{label}: cannot be decoded ({error}); expected WAV, FLAC, MP3, Ogg, Opus, M4A, WebM, WMA or another file "
            "that FFmpeg or libsndfile reads, with a header that tells format and sampling rate: convert it; nobody "
            "can know the rate of raw samples without one"
        )


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
            raise Undecodable(label, error) from error


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
    return _without_tag(Part(file, length, size))


class Part(io.RawIOBase, BinaryIO):
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
