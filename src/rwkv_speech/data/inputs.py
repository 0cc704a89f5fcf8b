"""What people name to be transcribed: audio files, folders, patterns, and manifests, whose lines need no text."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from rwkv_speech.audio import load_audio
from rwkv_speech.data.manifest import BYTE_ORDER_MARK, JSON_SUFFIXES, parse_lines
from rwkv_speech.data.source import AUDIO_SUFFIXES
from rwkv_speech.errors import printable


@dataclass(frozen=True)
class Input:
    """A recording, or the part of it that `offset` and `duration` (s) choose.

    `output` is the path of its results, below some folder and without an ending: of what lies in a folder or is named
    by a manifest, the path from there; of any other file its name; with `@offset` for a part. Where several would
    share it, all but the first are numbered.
    """

    audio: str
    output: str
    offset: float = 0.0
    duration: float | None = None
    task: str | None = None
    lang: str | None = None

    @property
    def label(self) -> str:
        """What it is called on the screen."""
        return printable(self.audio) + (f"@{self.offset:g}" if self.offset else "")

    def load(self) -> Tensor:
        """Decode it to float32 (S,), 16 kHz mono; raises AudioError."""
        return load_audio(self.audio, self.offset, self.duration)


def find_inputs(names: Iterable[str]) -> tuple[list[Input], list[str]]:
    """Find the recordings behind what was named, in order and each once, and a line about each thing that is none.

    Nothing is decoded.
    """
    everything = [item for name in names for item in _behind(name)]
    faults = [item for item in everything if isinstance(item, str)]
    inputs = [item for item in everything if isinstance(item, Input)]
    each = {(os.path.abspath(x.audio), x.offset, x.duration, x.task): x for x in reversed(inputs)}
    return _numbered(list(each.values())[::-1]), faults


def _numbered(inputs: Sequence[Input]) -> list[Input]:
    """The same, each with an `output` of its own."""
    wanted, given, unique = Counter(found.output for found in inputs), set[str](), list[Input]()
    for found in inputs:
        output, number = found.output, 1
        while output in given or (number > 1 and output in wanted):
            number += 1
            output = f"{found.output}-{number}"
        given.add(output)
        unique.append(replace(found, output=output))
    return unique


def _behind(name: str) -> Iterator[Input | str]:
    """The recordings behind one name, and lines about what is wrong with it."""
    if os.path.isdir(name):
        yield from _in_folder(name)
    elif os.path.lexists(name):
        is_manifest = Path(name).suffix.lower() in JSON_SUFFIXES and os.path.isfile(name)
        yield from _in_manifest(name) if is_manifest else [_of(name)]
    elif matches := sorted(filter(os.path.lexists, glob.glob(name, recursive=True))):
        for match in matches:
            yield from _behind(match)
    else:
        nothing = "no file matches" if glob.has_magic(name) else "no such file"
        yield f"{printable(name) or repr(name)}: {nothing}; expected audio, a folder or a manifest: check the path"


def _of(path: str, below: str = "") -> Input:
    relative = os.path.relpath(path, below) if below else os.path.basename(path)
    return Input(path, os.path.splitext(relative)[0])


def _in_folder(folder: str) -> Iterator[Input | str]:
    """The audio files at any depth, in order; no name on the way may start with a dot."""
    paths = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        named = (name for name in files if not name.startswith("."))
        paths += [os.path.join(where, x) for x in named if os.path.splitext(x)[1].lower() in AUDIO_SUFFIXES]
    yield from (_of(path, below=folder) for path in sorted(paths))
    if not paths:
        known = " ".join(sorted(AUDIO_SUFFIXES))
        yield f"{printable(folder)}: a folder without an audio file; expected any of: {known}"


def _in_manifest(path: str) -> Iterator[Input | str]:
    """The lines' recordings."""
    try:
        content = Path(path).read_bytes().removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        yield f"{printable(path)}: cannot be read ({error.strerror}); expected a manifest: check its permissions"
        return
    folder, count = os.path.dirname(path), 0
    for count, row, reasons in parse_lines(content, 1, required=(("audio_filepath",),)):
        if reasons:
            yield f"{printable(path)}, line {count}: {'; '.join(reasons):.200}"
            continue
        name, offset, duration = row["audio_filepath"], float(row.get("offset", 0)), row.get("duration")
        is_inside = not os.path.isabs(name) and ".." not in Path(name).parts
        output = os.path.splitext(os.path.normpath(name) if is_inside else os.path.basename(name))[0]
        output += f"@{offset:g}" if offset else ""
        yield Input(os.path.join(folder, name), output, offset, duration and float(duration),
                    row.get("task"), row.get("lang"))  # fmt: skip
    if not count:
        yield f"{printable(path)}: a manifest without a line; expected JSON objects with audio_filepath, one a line"
