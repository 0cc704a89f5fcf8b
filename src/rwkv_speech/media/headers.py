"""What the headers of WAV, FLAC and Ogg files say, as far as decoders do not."""

import itertools
import os
from typing import BinaryIO

from rwkv_speech.media.opening import Part

# A promise of a header that is missed by less is met: lossy formats count to within a codec block or two.
SLACK_SECONDS = 0.1
# From here on a WAV's data size means that its writer did not know it.
_UNKNOWN_BYTES = 0x7FFF_0000


def plain_size(file: BinaryIO) -> int:
    """The bytes of a WAV or FLAC file, 0 of any other and of a WAV that by its header should be longer."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        return size if int.from_bytes(head[4:8], "little") + 8 <= size else 0
    return size if head[:4] == b"fLaC" else 0


def ogg_links(file: BinaryIO) -> list[BinaryIO]:
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
    return [Part(file, first, last) for first, last in itertools.pairwise([*starts, size])]


def lacks_data(file: BinaryIO) -> bool:
    """Whether a WAV's data is shorter than its header says, by more than the slack."""
    size = file.seek(0, os.SEEK_END)
    at = file.seek(12)
    bytes_per_second = 0
    while len(head := file.read(24)) >= 8:
        length = int.from_bytes(head[4:8], "little")
        if head[:4] == b"data":
            missing = at + 8 + length - size
            return length < _UNKNOWN_BYTES and missing > max(SLACK_SECONDS * bytes_per_second, 8)
        if head[:4] == b"fmt ":
            bytes_per_second = int.from_bytes(head[16:20], "little")
        at = file.seek(at + 8 + length + length % 2)
    return False
