"""Raw samples through a pipe: what is read of them, and what a terminal or a file shows."""

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from torch import Tensor

from rwkv_speech.decoding.live import Lines, Terminal, transcribe_live
from rwkv_speech.decoding.results import Segment
from rwkv_speech.decoding.streaming import Committed, Event, Partial
from rwkv_speech.errors import UserError


def end(text: str = "") -> Committed:
    return Committed(text, [], Segment(0, 0.0, 1.0, text, [], 0.0, 0.0, 1.0, 0.0))


class Recorder:
    """A stream that keeps what is pushed."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []

    def push(self, samples: Tensor) -> list[Event]:
        self.samples.append(samples)
        return []

    def finish(self) -> list[Event]:
        return [end("the end")]


class Dribble(io.RawIOBase):
    """A pipe that gives so many bytes at a time."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes = data, sizes

    def read1(self, most: int) -> bytes:
        size = min(most, self._sizes.pop(0) if self._sizes else most)
        data, self._data = self._data[:size], self._data[size:]
        return data


def test_a_segment_without_a_text_of_its_own_has_no_line():
    for screen in (Lines, Terminal):
        out = io.StringIO()
        screen(out).show([end(), Partial("anger"), end(), end("anger")])
        assert out.getvalue().count("\n") == 1 and "anger\n" in out.getvalue()


@pytest.mark.parametrize("sizes", [[], [1, 1, 1, 3, 7, 2], [5] * 500, [999]])
def test_samples_come_whole_however_the_pipe_cuts_them(sizes: list[int], capsys: pytest.CaptureFixture[str]):
    samples = np.arange(-500, 500, dtype="<i2") * 60
    for extra in (b"", b"\x01"):
        stream, out = Recorder(), io.StringIO()
        transcribe_live(stream, Dribble(samples.tobytes() + extra, list(sizes)), out)  # type: ignore[arg-type]
        assert np.array_equal(np.concatenate([np.asarray(x) for x in stream.samples]), samples)
        assert out.getvalue() == "the end\n"
        assert ("ends within a sample" in capsys.readouterr().err) == bool(extra)


@pytest.mark.parametrize("head", [b"RIFF1234WAVE", b"fLaC", b"OggS", b"ID3"])
def test_a_file_with_a_header_is_no_raw_samples(head: bytes):
    with pytest.raises(UserError, match="--stream -: found a .* file, expected raw 16-bit samples without a header"):
        transcribe_live(Recorder(), Dribble(head + bytes(90), [3, 1]), io.StringIO())  # type: ignore[arg-type]


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_no_source():
    with pytest.raises(UserError, match="found a terminal, expected raw 16-bit samples from a pipe"):
        transcribe_live(Recorder(), Tty(), io.StringIO())  # type: ignore[arg-type]


def test_lines_hold_committed_text_alone():
    out = io.StringIO()
    lines = Lines(out)
    for events in (
        [Partial("fi")],
        [Committed(" five", []), Partial(" ni")],
        [end(" nine\x1b[2J\nsix")],
        [end(" ten")],
    ):
        lines.show(events)
    assert out.getvalue() == "five nine [2J six\nten\n"


def screen(written: str, columns: int) -> list[str]:
    """What a terminal shows: the lines above stay, the last is written over."""
    lines = [""]
    for token in re.findall(r"\r\x1b\[K|\x1b\[[0-9]+m|\n|[^\r\n\x1b]+", written):
        if token == "\n":
            lines.append("")
        elif token.startswith("\r"):
            lines[-1] = ""
        elif not token.startswith("\x1b"):
            lines[-1] += token
            # A line that is too long would wrap, and what is written over it would be its end alone.
            assert sum(2 if character >= "\u2e80" else 1 for character in lines[-1]) < columns
    return lines


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((20, 5)))
    return 20


def test_a_terminal_writes_over_what_may_change_and_keeps_the_rest(columns: int):
    out = Tty()
    terminal = Terminal(out)
    terminal.show([Partial("fi")])
    assert screen(out.getvalue(), columns) == ["fi"]
    terminal.show([Committed("five", []), Partial(" nigh")])
    assert screen(out.getvalue(), columns) == ["five nigh"]
    terminal.show([end(" nine"), Partial(" one")])
    assert screen(out.getvalue(), columns) == ["five nine", "one"]
    terminal.show([Partial("")])
    assert screen(out.getvalue(), columns) == ["five nine", ""]


def test_a_terminal_wraps_committed_text_and_shows_the_end_of_what_is_too_long(columns: int):
    out = Tty()
    terminal = Terminal(out)
    terminal.show([Partial("one two three four five six")])
    assert screen(out.getvalue(), columns) == ["…e four five six"[-18:]] or screen(out.getvalue(), columns)[0].endswith(
        "five six"
    )
    terminal.show([Committed("one two three four five six", []), Partial(" seven")])
    assert screen(out.getvalue(), columns) == ["one two three four", "five six seven"]
    terminal.show([end(" 今日は晴れ今日は晴れ今日は晴れ")])
    assert screen(out.getvalue(), columns)[-1] == ""
    assert "".join(screen(out.getvalue(), columns)[2:]) == "今日は晴れ今日は晴れ今日は晴れ"


SERVE = """
    import sys
    from rwkv_speech.decoding.live import transcribe_live
    from rwkv_speech.decoding.results import Segment
    from rwkv_speech.decoding.streaming import Committed

    class Counting:
        count = 0
        def push(self, samples):
            self.count += len(samples)
            return [Committed(f"{self.count}", [], Segment(0, 0.0, 0.0, "", [], 0.0, 0.0, 0.0, 0.0))]
        def finish(self):
            return [Committed(f"end {self.count}", [], Segment(0, 0.0, 0.0, "", [], 0.0, 0.0, 0.0, 0.0))]

    transcribe_live(Counting(), sys.stdin.buffer, sys.stdout)
"""


def serve() -> subprocess.Popen[bytes]:
    code = textwrap.dedent(SERVE)
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


def test_ctrl_c_ends_a_stream_as_its_end_does():
    """And each line is there as soon as its samples are, however few."""
    with serve() as process:
        assert process.stdin and process.stdout
        process.stdin.write(bytes(2000))
        assert process.stdout.readline() == b"1000\n"
        process.stdin.write(bytes(4))
        assert process.stdout.readline() == b"1002\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"end 1002\n" and process.wait() == 0
