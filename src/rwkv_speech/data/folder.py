"""Utterances whose audio lies in files, and folders of them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.data.manifest import summary
from rwkv_speech.data.source import AUDIO_SUFFIXES, TaskCounts, Utterance, digest, load_turn
from rwkv_speech.errors import UserError


class FileSource:
    """Utterances whose audio lies in files: a manifest or a folder."""

    def __init__(self, utterances: Sequence[Utterance]) -> None:
        self._utterances = list(utterances)

    def __len__(self) -> int:
        return len(self._utterances)

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one utterance, without decoding."""
        return self._utterances[index]

    def load(self, index: int) -> Tensor:
        """Decode one utterance to float32 (S,), 16 kHz mono; raises AudioError."""
        return load_turn(self._utterances[index])

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every utterance, (N,), NaN where they are not known."""
        return np.array([found.seconds for found in self._utterances], np.float32)

    def tasks(self) -> TaskCounts:
        """Give the number of utterances of each task and language, None where they name none."""
        return TaskCounts((found.task, found.lang) for found in self._utterances)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of every utterance's metadata and the size of its file."""
        return digest(_content(found) for found in self._utterances)


def _content(found: Utterance) -> tuple[object, ...]:
    """What is learned of an utterance."""
    turns = tuple(map(_content, found.then))
    more = found.source_lang, found.source_text, found.answers, found.prompt, found.input_text, turns
    known = found.id, found.text, found.offset, found.duration, found.lang, found.task, _size(found.audio)
    return (*known, *filter(None, more))


def _size(path: str | None) -> int | None:
    return os.path.getsize(path) if path and os.path.isfile(path) else None


def read_folder(path: str | Path) -> list[Utterance]:
    """Read every audio file under a folder, sorted by path, with the text of the same-named `.txt` beside it.

    Names that start with a dot are left out. Raises UserError that lists the audio files without a readable
    text.
    """
    root = Path(path).absolute()
    files = sorted(
        (found for found in root.rglob("*") if found.suffix.lower() in AUDIO_SUFFIXES and found.is_file()),
        key=lambda found: found.relative_to(root).as_posix(),
    )
    utterances: list[Utterance] = []
    problems: list[str] = []
    for file in files:
        name = file.relative_to(root)
        if any(part.startswith(".") for part in name.parts):
            continue
        transcript = file.with_suffix(".txt")
        text = ""
        if transcript.is_file():
            try:
                text = transcript.read_text(encoding="utf-8-sig").strip()
            except (UnicodeDecodeError, OSError) as error:
                problems.append(f"{name}: {transcript.name} cannot be read as UTF-8 ({error})")
        else:
            problems.append(f"{name}: no {transcript.name} beside it")
        utterances.append(Utterance(id=name.as_posix(), audio=str(file), text=text))
    if problems:
        raise UserError(
            summary(f"folder {path}: {len(problems)} of {len(utterances)} audio files lack a text", problems)
        )
    if not utterances:
        raise UserError(f"folder {path}: holds no audio file; expected any of: {' '.join(sorted(AUDIO_SUFFIXES))}")
    return utterances
