"""Writes the table of a manifest: its rows as one Arrow file, checked as `read_manifest` does, in bounded memory."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rwkv_speech.data.manifest import TABLE_SUFFIXES, holds_nothing, make_id, repeated_id, summary
from rwkv_speech.data.manifest_reader import SCHEMA, Piece, read_pieces
from rwkv_speech.errors import UserError

STAMP = b"rwkv_speech.manifest"
# After so many bad lines the rest is not read: to parse ten million one by one takes minutes.
_MANY = 1_000

Longs = NDArray[np.int64]
Bools = NDArray[np.bool_]


class _Seen:
    """Of all rows so far: the number, and hashes of audio name and id, for the strings themselves may take 1 GB."""

    def __init__(self) -> None:
        self._numbers = [np.zeros(0, np.int32)]
        self._names = [np.zeros(0, np.int64)]
        self._ids = [np.zeros(0, np.int64)]
        self._has_id = [np.zeros(0, np.bool_)]

    def add(self, piece: Piece) -> None:
        """Take in a piece."""
        ids = piece.rows.column("id")
        self._numbers.append(piece.numbers)
        self._names.append(_hashes(piece.rows.column("audio_filepath")))
        self._ids.append(_hashes(ids.drop_null()))
        self._has_id.append(ids.is_valid().to_numpy(zero_copy_only=False))

    def numbers(self) -> NDArray[np.int32]:
        """(N,) lines."""
        return np.concatenate(self._numbers)

    def has_id(self) -> Bools:
        """(N,) whether a row came with an id."""
        return np.concatenate(self._has_id)

    def ids(self) -> Longs:
        """The hashes of the ids that rows came with."""
        return np.concatenate(self._ids)

    def recurring_names(self) -> Bools:
        """(N,) whether another row has the same audio."""
        names = np.concatenate(self._names)
        first, later = _repeats(names)
        recurs = np.zeros(len(names), np.bool_)
        recurs[first] = recurs[later] = True
        return recurs


def write_table(manifest: Path, table: Path, stamp: str, *, require_text: bool) -> None:
    """Write the rows of a manifest into `table`, an Arrow file that says `stamp`.

    The column `id` is null where the audio's name is the id. Raises UserError that lists the bad lines, and OSError.
    """
    seen = _Seen()
    faults: dict[int, list[str]] = {}
    with pa.OSFile(str(table), "wb") as file, pa.ipc.new_file(file, SCHEMA.with_metadata({STAMP: stamp})) as writer:
        for piece in read_pieces(manifest, require_text=require_text):
            writer.write_batch(piece.rows)
            seen.add(piece)
            faults |= piece.faults
            if len(faults) > _MANY:
                break
    if not len(seen.numbers()):
        raise holds_nothing(manifest)
    _raise_faults(manifest, faults, seen, table)
    has_id, recurs = seen.has_id(), seen.recurring_names()
    if not has_id.all() and (has_id.any() or recurs.any()):
        _write_ids(table, recurs, set(seen.ids().tolist()))


def _raise_faults(manifest: Path, faults: dict[int, list[str]], seen: _Seen, table: Path) -> None:
    """Raise UserError if any row is bad or repeats an id."""
    first, later = _repeats(seen.ids())
    if not faults and not len(later):
        return
    word = "row" if manifest.suffix.lower() in TABLE_SUFFIXES else "line"
    of = "the first " if len(faults) > _MANY else ""
    numbers = seen.numbers()
    rows = np.flatnonzero(seen.has_id())
    total = len(set(faults) | set(numbers[rows[later]].tolist()))
    ids = pa.ipc.open_file(pa.memory_map(str(table))).read_all().column("id")
    for i in np.argsort(later)[:_MANY]:
        row, earlier = int(rows[later[i]]), int(rows[first[i]])
        reason = repeated_id(ids[row].as_py(), f"{word} {numbers[earlier]}")
        faults.setdefault(int(numbers[row]), []).append(reason)
    problems = [f"{word} {number}: {'; '.join(faults[number])}" for number in sorted(faults)]
    raise UserError(summary(f"manifest {manifest}: {total} of {of}{len(numbers)} {word}s are bad", problems, total))


def _write_ids(table: Path, recurs: Bools, used: set[int]) -> None:
    """Write a table again, with ids for the rows that have none; `used` are the hashes of the others."""
    reader = pa.ipc.open_file(pa.OSFile(str(table)))  # not mapped: all of it would count as this process's memory
    with_ids = table.with_name(f"{table.name}.ids")
    try:
        with pa.OSFile(str(with_ids), "wb") as file, pa.ipc.new_file(file, reader.schema) as writer:
            start = 0
            for number in range(reader.num_record_batches):
                rows = reader.get_batch(number)
                ids = _ids(rows, recurs[start : start + len(rows)], used)
                writer.write_batch(rows.set_column(SCHEMA.get_field_index("id"), "id", ids))
                start += len(rows)
        with_ids.replace(table)
    finally:
        with_ids.unlink(missing_ok=True)


def _ids(rows: pa.RecordBatch, recurs: Bools, used: set[int]) -> pa.Array:
    given, names, offsets = (rows.column(name).to_pylist() for name in ("id", "audio_filepath", "offset"))
    made = [
        make_id(name, offset or 0.0, often, used) if known is None else known
        for known, name, offset, often in zip(given, names, offsets, recurs.tolist(), strict=True)
    ]
    return pa.array(made, pa.string())


def _hashes(strings: pa.Array) -> Longs:
    return np.fromiter(map(hash, strings.to_pylist()), np.int64, len(strings))


def _repeats(values: Longs) -> tuple[Longs, Longs]:
    """Where a value comes again: the place of its first time, and this place."""
    order = np.argsort(values, kind="stable")
    is_new = np.ones(len(values), np.bool_)
    is_new[1:] = np.diff(values[order]) != 0
    group = np.cumsum(is_new) - 1
    return order[is_new][group[~is_new]], order[~is_new]
