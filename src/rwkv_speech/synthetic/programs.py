"""Other speech synthesizers than eSpeak NG: programs that write a sound file, as flite, pico2wave or piper."""

import random
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torchaudio.functional as F
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE, AudioError, load_audio
from rwkv_speech.errors import UserError

_SECONDS = 60  # that a program may take for a line
# A program has one voice: by resampling, speed, pitch and formants are moved together, as between people.
_SPEEDS = (0.86, 1.17)


@dataclass(frozen=True)
class Program:
    """A voice of a language: the words of a command in which {text} and {wav} stand for the line and the file.

    Without {text} among them the line comes from the standard input.
    """

    name: str
    lang: str
    words: tuple[str, ...]

    def say(self, text: str, rng: random.Random) -> Tensor:
        """Speak a line as somebody else each time: (S,) float32 at 16 kHz.

        Raises UserError where the program fails or writes no sound.
        """
        with tempfile.TemporaryDirectory() as folder:
            wav = Path(folder) / "line.wav"
            # By hand, not str.format: a command may have other braces.
            words = [word.replace("{wav}", str(wav)).replace("{text}", text) for word in self.words]
            given = None if any("{text}" in word for word in self.words) else text
            try:
                done = subprocess.run(words, input=given, capture_output=True, text=True, timeout=_SECONDS)
                if done.returncode:
                    raise UserError(f"{self.name}: {words[0]} ended with {done.returncode}: {_last(done.stderr)}")
                return F.resample(load_audio(wav), round(SAMPLE_RATE * rng.uniform(*_SPEEDS) / 100) * 100, SAMPLE_RATE)
            except (OSError, subprocess.TimeoutExpired, AudioError) as error:
                raise UserError(f"{self.name}: {words[0]} spoke no line: {error}; expected sound in {{wav}}") from error


def read_programs(path: str) -> list[Program]:
    """The voices that a file lists, one a line: a language and a command. Lines that begin with # are notes.

    Raises UserError naming the line that is no such, or whose program is not there.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--voices {path}: {error}; expected a file of lines such as: en flite -o {{wav}} -t {{text}}"
        ) from error
    programs = list[Program]()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path}, line {number}"
        try:
            lang, *words = shlex.split(line)
        except ValueError as error:
            raise UserError(f"{where}: {error}; expected a language and a command") from error
        if not any("{wav}" in word for word in words):
            raise UserError(f"{where}: found {line!r}, expected a language and a command with {{wav}} in it")
        if shutil.which(words[0]) is None:
            raise UserError(f"{where}: found no program {words[0]!r}; install it, or take the line out")
        programs.append(Program(f"{lang}-{number}", lang, tuple(words)))
    return programs


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]
