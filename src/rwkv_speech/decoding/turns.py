"""A conversation that is spoken, half-duplex: a silence ends a turn, which is answered before the next one is heard."""

# S samples

import os
import select
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, TextIO

import numpy as np
import torch
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE, Resampler, as_waveform
from rwkv_speech.decoding.live import printable, samples_of
from rwkv_speech.decoding.long_audio import Piece, Segmenter
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.session import Session
from rwkv_speech.errors import UserError

# Of a longer turn the first part is answered.
MOST_SECONDS = 60.0
_POLL_SECONDS, _MOST_BYTES = 0.05, 1 << 16


class Turns:
    """Takes samples as they come, and gives what is said between two silences of so many seconds, as one waveform."""

    def __init__(self, segmenter: Segmenter, silence: float, sample_rate: int, most_seconds: float = MOST_SECONDS):
        self._segmenter, self._resampler = segmenter, Resampler(sample_rate, "stream")
        self._silence, self._most = round(silence * SAMPLE_RATE), round(most_seconds * SAMPLE_RATE)
        self._pieces, self._heard = list[Piece](), 0

    def push(self, samples: np.ndarray) -> list[Tensor]:
        """The turns (S,), 16 kHz, that the next samples (S,) end."""
        turns = list[Tensor]()
        # A second at a time: a file may come at once.
        for part in self._resampler.push(as_waveform(samples, "stream")).split(SAMPLE_RATE):
            self._heard += len(part)
            turns += self._add(self._segmenter.push(part), self._segmenter.speech_start)
        return turns

    def finish(self) -> list[Tensor]:
        """The turn that is left."""
        rest = [*self._segmenter.push(self._resampler.finish()), *self._segmenter.finish()]
        return [*self._add(rest, self._heard), *self._end()]

    def _add(self, pieces: Iterable[Piece], speech_start: int | None) -> list[Tensor]:
        turns = list[Tensor]()
        for piece in pieces:
            if self._pieces and piece.start - self._pieces[-1].end >= self._silence:
                turns += self._end()
            self._pieces.append(piece)
        said = sum(len(piece.waveform) for piece in self._pieces)
        now = self._heard if speech_start is None else speech_start
        if self._pieces and (now - self._pieces[-1].end >= self._silence or said >= self._most):
            turns += self._end()
        return turns

    def _end(self) -> list[Tensor]:
        pieces, self._pieces = self._pieces, []
        return [torch.cat([piece.waveform for piece in pieces])[: self._most]] if pieces else []


class Speaker:
    """Speaks answers: `synthesise` makes a WAV file of a text, which the command `play` reads from its input."""

    def __init__(self, synthesise: Callable[[str], bytes], play: str) -> None:
        self._synthesise, self._play = synthesise, play

    def say(self, text: str, source: BinaryIO) -> None:
        """Return when the text has been spoken; what a microphone hears meanwhile is left out, a file waits."""
        if not text.strip():
            return
        with tempfile.TemporaryFile() as sound:  # a pipe would be full while nobody listens to the microphone
            sound.write(self._synthesise(text))
            sound.seek(0)
            process = started("play", self._play, stdin=sound, stdout=subprocess.DEVNULL)
            is_live = not stat.S_ISREG(os.fstat(source.fileno()).st_mode)
            while process.poll() is None:
                if is_live and select.select([source], (), (), _POLL_SECONDS)[0]:
                    is_live = bool(os.read(source.fileno(), _MOST_BYTES))
                elif not is_live:
                    process.wait()
        check_ended("play", self._play, process.returncode)


def synthesised_by(command: str) -> Callable[[str], bytes]:
    """A synthesiser that is another program: it reads a text from its input, and writes a WAV file to its output."""

    def synthesise(text: str) -> bytes:
        with started("speak", command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            sound, _ = process.communicate(text.encode())
        check_ended("speak", command, process.returncode)
        return bytes(sound)

    return synthesise


def started(flag: str, command: str, **pipes: Any) -> "subprocess.Popen[bytes]":
    """A program that a flag names; raises UserError if it cannot be started."""
    try:
        return subprocess.Popen(shlex.split(command), **pipes)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"--{flag}: found {command!r}, expected a program that can be started; install it") from error


def check_ended(flag: str, command: str, code: int) -> None:
    """Raises UserError for a program that failed."""
    if code:
        raise UserError(f"--{flag}: found that {command!r} ended with code {code}, expected 0; try it by itself")


def converse_live(
    session: Session,
    options: Options,
    turns: Turns,
    source: BinaryIO,
    out: TextIO,
    speaker: Speaker | None,
    remember: Callable[[], None],
) -> None:
    """Answer what is said in 16-bit mono samples until they end or Ctrl-C; each answer on a line, as it is written.

    `remember` is called after each turn. Raises UserError as `transcribe_live`.
    """

    def answer(waveform: Tensor) -> None:
        found, said = session.answer(waveform, options), list[str]()
        for part in found:
            said.append(part)
            out.write(printable(part))
            out.flush()
        out.write("\n")
        out.flush()
        remember()
        if speaker:
            speaker.say("".join(said), source)

    if out.isatty():
        print("listening; Ctrl-C ends", file=sys.stderr)
    for samples in samples_of(source):
        for waveform in turns.push(samples):
            answer(waveform)
    for waveform in turns.finish():
        answer(waveform)
