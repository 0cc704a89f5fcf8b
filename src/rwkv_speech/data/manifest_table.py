"""Manifests too large for every process's memory: kept on disk as an Arrow table that all processes share.

The table of `m.jsonl` is `.m.jsonl.arrow` beside it, or lies under ~/.cache/rwkv_speech/manifests where that folder
cannot be written or holds another file of that name. It is made once, and again when the manifest has changed.
"""

import bisect
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.audio import load_audio
from rwkv_speech.data.manifest import no_audio, summary, unreadable
from rwkv_speech.data.manifest_writer import STAMP, write_table
from rwkv_speech.data.source import Utterance
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_atomically

_FORMAT = 1
_FILES_LOOKED_FOR = 2_000


class TableSource:
    """The utterances of a table on disk, memory-mapped; in another process it is opened anew, not copied.

    Raises UserError when the table is no longer the one with this `stamp`.
    """

    def __init__(self, table: Path, folder: Path, stamp: str) -> None:
        self._table, self._folder, self._stamp = table, folder, stamp
        reader = pa.ipc.open_file(pa.memory_map(os.fspath(table)))
        if _stamp_of(reader) != stamp:
            raise UserError(f"{table}: its manifest was changed while it was in use; expected it to stay: start again")
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ends = list(accumulate(len(batch) for batch in self._batches))

    def __reduce__(self) -> tuple[type["TableSource"], tuple[Path, Path, str]]:
        return TableSource, (self._table, self._folder, self._stamp)

    def __len__(self) -> int:
        return self._ends[-1]

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one utterance, without decoding."""
        batch, place = self._locate(index)
        (row,) = batch.slice(place, 1).to_pylist()
        name = row["audio_filepath"]
        return Utterance(
            id=name if row["id"] is None else row["id"],
            audio=os.path.join(self._folder, name),
            text=row["text"] or "",
            duration=row["duration"],
            offset=row["offset"] or 0.0,
            lang=row["lang"],
            task=row["task"],
        )

    def load(self, index: int) -> Tensor:
        """Decode one utterance to float32 (S,), 16 kHz mono; raises AudioError."""
        found = self.utterance(index)
        assert found.audio is not None
        return load_audio(found.audio, found.offset, found.duration)

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every utterance, (N,), NaN where they are not known."""
        found = np.empty(len(self), np.float32)
        for end, batch in zip(self._ends, self._batches, strict=True):
            found[end - len(batch) : end] = batch.column("duration").to_numpy(zero_copy_only=False)
        return found

    def audio(self, index: int) -> str:
        """Give the path of one utterance's audio; nothing else of it is read from the disk."""
        batch, place = self._locate(index)
        return os.path.join(self._folder, batch.column("audio_filepath")[place].as_py())

    def lacks_text(self) -> bool:
        """Whether any utterance comes without a text."""
        return any(batch.column("text").null_count for batch in self._batches)

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        batch = self._batches[number]
        return batch, index - self._ends[number] + len(batch)


def open_manifest(path: Path, *, require_text: bool = True) -> TableSource:
    """Open a manifest of JSON lines, or one with the same columns in a .parquet or .arrow file.

    Of the audio files a sample is looked for, all if they are few: asking for ten million would take a network drive
    hours. Raises UserError as `read_manifest` does.
    """
    manifest = path.absolute()
    source = _open_or_write(manifest, require_text)
    count = min(len(source), _FILES_LOOKED_FOR)
    problems = []
    for index in np.linspace(0, len(source) - 1, count).astype(int).tolist():
        audio = source.audio(index)
        if not os.path.isfile(audio):
            problems.append(f"utterance {index + 1}: {no_audio(audio)}")
    if problems:
        raise UserError(summary(f"manifest {path}: {len(problems)} of {count} utterances looked at are bad", problems))
    return source


def _open_or_write(manifest: Path, require_text: bool) -> TableSource:
    try:
        status = manifest.stat()
    except OSError as error:
        raise unreadable(manifest, error) from error
    stamp = f"{_FORMAT}/{status.st_size}/{status.st_mtime_ns}"
    if found := _find(manifest, stamp, require_text):
        return found
    table = next((place for place in _places(manifest) if _may_write(place)), None)
    if table is None:
        places = " or ".join(map(str, _places(manifest)))
        raise UserError(
            f"manifest {manifest}: needs a table, but cannot write {places}; expected either to be possible"
        )
    with _locked(table):
        # Another process may have written it while this one waited.
        found = _find(manifest, stamp, require_text)
        return found or _write(manifest, table, stamp, require_text)


def _write(manifest: Path, table: Path, stamp: str, require_text: bool) -> TableSource:
    try:
        write_atomically(table, lambda temporary: write_table(manifest, temporary, stamp, require_text=require_text))
    except OSError as error:
        raise UserError(
            f"manifest {manifest}: its table {table} cannot be written ({error}); expected room for about as "
            "much as the manifest itself holds"
        ) from error
    source = TableSource(table, manifest.parent, stamp)
    print(
        f"note: {manifest}: {len(source):,} utterances, now also in {table}, which later runs open at once; of its "
        f"audio files {_FILES_LOOKED_FOR:,} are looked for, and what else is missing is listed when it is met"
    )
    return source


def _places(manifest: Path) -> list[Path]:
    """Where a manifest's table may be, the best place first."""
    name = hashlib.sha256(os.fsencode(manifest)).hexdigest()[:16]
    cache = Path.home() / ".cache" / "rwkv_speech" / "manifests"
    return [manifest.with_name(f".{manifest.name}.arrow"), cache / f"{name}.arrow"]


def _find(manifest: Path, stamp: str, require_text: bool) -> TableSource | None:
    for place in _places(manifest):
        if _stamp_at(place) == stamp:
            source = TableSource(place, manifest.parent, stamp)
            # One that was written for prediction may lack texts: written again, it names the lines.
            if not (require_text and source.lacks_text()):
                return source
    return None


def _may_write(place: Path) -> bool:
    """Whether the folder can be written and no file of somebody else's is in the way."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        return os.access(place.parent, os.W_OK) and (not place.exists() or _stamp_at(place) is not None)
    return False


def _stamp_at(place: Path) -> str | None:
    try:
        return _stamp_of(pa.ipc.open_file(pa.memory_map(os.fspath(place))))
    except (OSError, pa.ArrowException):
        return None


def _stamp_of(reader: pa.ipc.RecordBatchFileReader) -> str | None:
    stamp = (reader.schema.metadata or {}).get(STAMP)
    return None if stamp is None else stamp.decode()


@contextmanager
def _locked(table: Path) -> Iterator[None]:
    """Let one process at a time in, where the file system has locks.

    Where it has none, several may write the same table at once, and each puts a whole one in place.
    """
    with table.with_suffix(".lock").open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
