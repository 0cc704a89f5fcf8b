"""A microphone, or other raw samples, through a pipe: its text on a terminal, or line by line."""

import shutil
import signal
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, BinaryIO, TextIO

import numpy as np

from rwkv_speech.decoding.streaming import Committed, Event, Partial, Stream
from rwkv_speech.errors import UserError

_MOST_BYTES = 1 << 16  # at once: two seconds of what is there already
_CONTAINERS = {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3"}
_LINE_START, _DIM, _PLAIN = "\r\x1b[K", "\x1b[2m", "\x1b[0m"


def transcribe_live(stream: Stream, source: BinaryIO, out: TextIO) -> None:
    """Write what is said in 16-bit little-endian mono samples, which are read as they come, until they end or Ctrl-C.

    Raises UserError for a terminal in place of samples, and for a file with a header.
    """
    screen = Terminal(out) if out.isatty() else Lines(out)
    if out.isatty():
        print("listening; Ctrl-C ends", file=sys.stderr)
    for samples in samples_of(source):
        screen.show(stream.push(samples))
    screen.show([*stream.finish(), Partial("")])


def samples_of(source: BinaryIO) -> Iterator[Any]:
    """Arrays (S,) of int16, as they come; raises UserError for a terminal, and for a file with a header."""
    if source.isatty():
        raise UserError(
            "--stream -: found a terminal, expected raw 16-bit samples from a pipe, as of "
            "arecord -f S16_LE -r 16000 -t raw | python predict.py --stream -"
        )
    left, is_first = b"", True
    with _interruptible() as read:
        while data := read(source):
            left += data
            if is_first and len(left) >= 4:
                _check_raw(left)
                is_first = False
            size = 0 if is_first else len(left) // 2 * 2
            if size:
                yield np.frombuffer(left[:size], "<i2")
            left = left[size:]
    if left:
        print("warning: --stream -: ends within a sample, which is left out", file=sys.stderr)


def _check_raw(head: bytes) -> None:
    name = next((name for start, name in _CONTAINERS.items() if head.startswith(start)), None)
    if name:
        raise UserError(
            f"--stream -: found a {name} file, expected raw 16-bit samples without a header: convert it with "
            "ffmpeg -i FILE -f s16le -ac 1 -ar 16000 -, or give it to predict.py by its name"
        )


@contextmanager
def _interruptible() -> Iterator[Any]:
    """A function that reads what is there, and nothing any more after Ctrl-C; a second Ctrl-C is an interrupt."""
    is_reading, is_asked = False, False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        if is_asked or is_reading:
            is_asked = True
            raise KeyboardInterrupt
        is_asked = True

    def read(source: Any) -> bytes:
        nonlocal is_reading
        is_reading = True
        try:
            return b"" if is_asked else source.read1(_MOST_BYTES)
        except KeyboardInterrupt:
            return b""
        finally:
            is_reading = False

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield read
    finally:
        signal.signal(signal.SIGINT, before)


class Lines:
    """Committed text as it comes, each segment on a line of its own."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._line = ""

    def show(self, events: Iterable[Event]) -> None:
        """Write what has been committed."""
        for event in events:
            if isinstance(event, Committed):
                text = printable(event.text)
                text = text if self._line else text.lstrip()
                self._line += text
                if event.segment and self._line:  # one without a text of its own has no line
                    text, self._line = f"{text}\n", ""
                self._out.write(text)
                self._out.flush()


class Terminal:
    """Committed text stays, each segment on lines of its own; behind it what may change, which is written over."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._line = ""  # what is committed of the last line

    def show(self, events: Iterable[Event]) -> None:
        """Write what has changed."""
        partial = None
        for event in events:
            text, partial = printable(event.text), ""
            if isinstance(event, Committed):
                self._line += text if self._line else text.lstrip()
                self._wrap()
                if event.segment and self._line:
                    self._end_line(self._line)
            else:
                partial = text if self._line else text.lstrip()
        if partial is not None:
            self._draw(partial)

    def _wrap(self) -> None:
        while len(fitting := _head(self._line, self._columns)) < len(self._line):
            at = fitting.rfind(" ") + 1 or len(fitting)
            rest = self._line[at:]
            self._end_line(self._line[:at].rstrip())
            self._line = rest

    def _end_line(self, text: str) -> None:
        self._out.write(f"{_LINE_START}{text}\n")
        self._line = ""

    def _draw(self, partial: str) -> None:
        shown = self._line + partial
        tail = _head(shown[::-1], self._columns)[::-1]
        if len(tail) < len(shown):
            tail = "…" + _head(shown[::-1], self._columns - 1)[::-1]
        committed = tail[: max(0, len(tail) - len(partial))]
        self._out.write(f"{_LINE_START}{committed}{_DIM}{tail[len(committed) :]}{_PLAIN}")
        self._out.flush()

    @property
    def _columns(self) -> int:
        # The last column stays free: a terminal would begin another line there.
        return max(2, shutil.get_terminal_size().columns - 1)


def printable(text: str) -> str:
    """A text in which nothing moves a cursor."""
    return "".join(character if character.isprintable() else " " for character in text)


def _head(text: str, columns: int) -> str:
    """As much of a text as so many columns hold."""
    width = 0
    for place, character in enumerate(text):
        wide = unicodedata.east_asian_width(character) in "WF"
        width += 0 if unicodedata.combining(character) else 1 + wide
        if width > columns:
            return text[:place]
    return text
