"""Tar shards in WebDataset's layout as a source: KEY.flac (or .wav ...) beside KEY.txt or KEY.json.

A shard's members are listed and measured once, in an index file; afterwards any utterance is one read at its place in
the shard. Only the index's line ends and the durations stay in memory, 12 bytes an utterance.
"""

import glob
import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.audio import AudioError, audio_seconds, load_audio
from rwkv_speech.data.manifest import ANSWER, TEXTS, row_faults, summary, texts_of, tidied
from rwkv_speech.data.source import AUDIO_SUFFIXES, TaskCounts, Utterance, digest
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_text_atomically

logger = logging.getLogger(__name__)

_VERSION = 4
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BLOCK = 512
# Behind its end mark an archive is filled up to a record, of 10 KB customarily.
_MAX_PADDING = 1 << 20


@dataclass(frozen=True)
class Shard:
    """An indexed shard.

    `stamp` tells it from a changed one; `ends` (N + 1,) is where the lines of its index start and end; `durations` (N,)
    are seconds, NaN where unknown.
    """

    path: str
    stamp: list[int]
    index: str
    ends: NDArray[np.int64]
    durations: NDArray[np.float32]


class TarSource:
    """The utterances of tar shards, in their order; every access opens its file itself, so that workers share none."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._first = np.cumsum([0, *(len(shard.durations) for shard in shards)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one utterance, without decoding."""
        shard, row = self._row(index)
        return Utterance(
            id=row.get("id") or f"{Path(shard.path).name}/{row['key']}",
            audio=None,
            duration=row.get("duration"),
            lang=row.get("lang"),
            task=row.get("task"),
            speaker=row.get("speaker"),
            identity=json.dumps([shard.path, *shard.stamp, row["offset"], row["size"]]),
            **texts_of(row),
        )

    def load(self, index: int) -> Tensor:
        """Decode one utterance to float32 (S,), 16 kHz mono; raises AudioError."""
        shard, row = self._row(index)
        name = f"{shard.path}: {row['member']}"
        try:
            content = _read(shard.path, row["offset"], row["size"])
        except OSError as error:
            raise AudioError(f"{name}: cannot be read ({error}); expected the shard as it was indexed") from error
        if len(content) < row["size"]:
            raise AudioError(f"{name}: is cut off, {len(content)} of {row['size']} bytes: copy the shard again")
        return load_audio(content, name=name)

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every utterance, (N,), NaN where they are not known."""
        return np.concatenate([np.zeros(0, np.float32), *(shard.durations for shard in self._shards)])

    def tasks(self) -> TaskCounts:
        """Give the number of utterances of each task and language, None where they name none."""
        counts = TaskCounts()
        for shard in self._shards:
            lines = _read(shard.index, int(shard.ends[0]), int(shard.ends[-1] - shard.ends[0])).splitlines()
            counts.update((row.get("task"), row.get("lang")) for row in map(json.loads, lines))
        return counts

    def fingerprint(self) -> str:
        """SHA-256 (hex) of every shard's name and its utterances' metadata, places and sizes."""
        return digest(
            (Path(shard.path).name, _read(shard.index, int(shard.ends[0]), int(shard.ends[-1] - shard.ends[0])))
            for shard in self._shards
        )

    def _row(self, index: int) -> tuple[Shard, dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} of {len(self)}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        shard, local = self._shards[number], index - int(self._first[number])
        start, end = shard.ends[local : local + 2].tolist()
        row: dict[str, Any] = json.loads(_read(shard.index, start, end - start))
        return shard, row


def open_tar(spec: str) -> TarSource:
    """Open `tar:` and a folder, a file, a glob pattern or a pattern with ranges such as train-{000..099}.tar.

    Raises UserError for a pattern without files, and naming shard and member for a shard that is damaged or holds an
    utterance without audio or text.
    """
    paths = _expand(spec)
    shards = []
    for path in paths:
        shard = _read_index(path)
        if shard is None:
            logger.info("indexing %s, once", path)
            _write_index(path)
            shard = _read_index(path)
        if shard is None:
            raise UserError(f"data source {spec!r}: {path} changes while it is read; expected a finished file")
        shards.append(shard)
    return TarSource(shards)


def _expand(spec: str) -> list[str]:
    """The shards that a specification names, as absolute paths."""
    pattern = spec.removeprefix("tar:")
    if os.path.isdir(pattern):
        found = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
        if not found:
            raise UserError(f"data source {spec!r}: the folder holds no .tar file; expected shards")
        return [os.path.abspath(path) for path in found]
    paths: list[str] = []
    for named in _braces(pattern):
        found = [named] if os.path.isfile(named) else sorted(glob.glob(named))
        if not found:
            raise UserError(
                f"data source {spec!r}: no file {named}; expected tar: and a folder, a file, a glob pattern, or a "
                "range such as train-{000..099}.tar"
            )
        paths += found
    return [os.path.abspath(path) for path in paths]


def _braces(pattern: str) -> Iterator[str]:
    """The names that a pattern with ranges stands for; digits keep the width of the first number."""
    pieces = _RANGE.split(pattern)  # text, first, last, text, first, last, text
    ranges = [
        [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        for first, last in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    for numbers in itertools.product(*ranges):
        yield "".join(itertools.chain(*itertools.zip_longest(pieces[0::3], numbers, fillvalue="")))


def _index_paths(path: str) -> list[Path]:
    """Where the index of a shard may lie: beside it, or where that is not writable in the user's cache."""
    digest = hashlib.sha256(path.encode()).hexdigest()[:16]
    cache = Path.home() / ".cache" / "rwkv_speech" / "tar" / f"{digest}-{Path(path).name}.index"
    return [Path(f"{path}.index"), cache]


def _read_index(path: str) -> Shard | None:
    """The shard, if there is an index of the file as it is now."""
    wanted = _stamp(path)
    for index in _index_paths(path):
        try:
            with index.open("rb") as file:
                header = json.loads(file.readline())
                if header["of"] != wanted:
                    continue
                ends = np.cumsum([file.tell(), *header["lengths"]])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none, or another program's: made again
        return Shard(path, wanted, str(index), ends, np.array(header["durations"], np.float32))
    return None


def _stamp(path: str) -> list[int]:
    """What tells a shard from a changed one, and this form of the index from others."""
    status = os.stat(path)
    return [_VERSION, status.st_size, status.st_mtime_ns]


def _write_index(path: str) -> None:
    stamp = _stamp(path)
    rows = _scan(path)
    lines = [json.dumps(row) + "\n" for row in rows]  # ASCII, so that lengths are those of bytes
    header = {
        "of": stamp,
        "lengths": [len(line) for line in lines],
        "durations": [row.get("duration") for row in rows],
    }
    places = _index_paths(path)
    for place in places:
        try:
            write_text_atomically(place, json.dumps(header) + "\n" + "".join(lines))
            return
        except OSError:
            continue  # a read-only place
    raise UserError(f"{path}: its index can be written neither to {places[0]} nor to {places[1]}; make one writable")


@dataclass
class _Entry:
    """What the members of one key hold."""

    audio: tarfile.TarInfo | None = None
    suffixes: set[str] = field(default_factory=set)
    fields: dict[str, Any] = field(default_factory=dict)


def _scan(path: str) -> list[dict[str, Any]]:
    """One row for each utterance of a shard; raises UserError that lists the members that do not fit."""
    entries: dict[str, _Entry] = {}
    problems: list[str] = []
    with open(path, "rb") as file:
        for member in _members(path, file):
            folder, _, base = member.name.rpartition("/")
            if not member.isfile() or base.startswith("."):
                continue
            # WebDataset's rule: what stands before the first dot of a file's name is the key.
            key = "/".join(part for part in (folder, base.partition(".")[0]) if part)
            try:
                _add(entries.setdefault(key, _Entry()), member, file)
            except ValueError as error:
                problems.append(f"{member.name}: {error}")
        used = {key: entry for key, entry in entries.items() if entry.suffixes}
        rows = [_row(key, entry, file) for key, entry in used.items() if entry.audio]
    problems += [f"{key}: has a text but no audio" for key, entry in used.items() if not entry.audio]
    problems += [
        f"{row['key']}: has no text, neither KEY.txt nor 'text' or {ANSWER!r} in KEY.json"
        for row in rows
        if "text" not in row and ANSWER not in row
    ]
    if problems:
        raise UserError(summary(f"{path}: {len(problems)} members do not fit", problems))
    if not rows:
        raise UserError(f"{path}: holds no utterance; expected KEY.flac, KEY.wav or the like, with KEY.txt or KEY.json")
    return rows


def _members(path: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of an archive; raises UserError where it is damaged, which tarfile takes for its end."""
    last = "its start"
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                yield member
                last = member.name
            end = archive.offset
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path}: is damaged after {last} ({error}); expected an uncompressed tar file: make or copy it again"
        ) from error
    file.seek(end)
    rest = file.read(_MAX_PADDING)
    if len(rest) < _BLOCK or len(rest) == _MAX_PADDING or rest.strip(b"\0"):
        raise UserError(
            f"{path}: is cut off or damaged after {last}, at byte {end}; expected another member or the end of the "
            "archive: copy it again"
        )


def _add(entry: _Entry, member: tarfile.TarInfo, file: BinaryIO) -> None:
    """Take what one member holds; raises ValueError for one that is bad or comes twice."""
    suffix = os.path.splitext(member.name)[1].lower()
    if suffix not in AUDIO_SUFFIXES | {".txt", ".json"}:
        return
    if suffix in entry.suffixes or (suffix in AUDIO_SUFFIXES and entry.audio):
        raise ValueError("its key has such a member already")
    entry.suffixes.add(suffix)
    if suffix in AUDIO_SUFFIXES:
        entry.audio = member
        return
    content = _read_at(file, member.offset_data, member.size).decode("utf-8-sig")
    found: Any = {"text": content.strip()} if suffix == ".txt" else json.loads(content)
    if not isinstance(found, dict):
        raise ValueError(f"is not a JSON object but {type(found).__name__}")
    known = ("duration", "lang", "task", "id", "speaker", *TEXTS)
    found = tidied({name: found[name] for name in known if name in found})
    if faults := row_faults(found, required=()):
        raise ValueError("; ".join(faults))
    # KEY.json's text goes before KEY.txt's, whichever comes first.
    entry.fields = {**entry.fields, **found} if suffix == ".json" else {**found, **entry.fields}


def _row(key: str, entry: _Entry, file: BinaryIO) -> dict[str, Any]:
    member = entry.audio
    assert member is not None
    row = {"key": key, "member": member.name, "offset": member.offset_data, "size": member.size, **entry.fields}
    if "duration" not in row:
        # Broken audio is listed when it is used.
        with suppress(AudioError):
            row["duration"] = audio_seconds(_read_at(file, member.offset_data, member.size), name=member.name)
    return row


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, offset)


def _read(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return _read_at(file, offset, size)
