"""Manifests too large for every process's memory, and those that are tables already: kept on disk as Arrow.

The table of `m.jsonl` is `.m.jsonl.STAMP.arrow` beside it, or lies under ~/.cache/rwkv_speech/manifests where that
folder cannot be written. It is made once, and again when the manifest has changed. pyarrow parses JSON lines a block at
a time; a block that it cannot vouch for goes through manifest.py, line by line, which accepts it or says what is wrong.
"""

import bisect
import fcntl
import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.data.manifest import (
    ANSWER,
    BYTE_ORDER_MARK,
    LENIENT,
    SECONDS,
    STRINGS,
    TABLE_SUFFIXES,
    TURNS,
    check,
    no_audio,
    of_text,
    parse_lines,
    repeated_id,
    row_faults,
    summary,
    to_utterance,
    unreadable,
)
from rwkv_speech.data.source import TaskCounts, Utterance, digest, load_turn
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_atomically

_FORMAT = 5
_ANSWERS = pa.field(ANSWER, pa.list_(pa.string()))
_SCHEMA = pa.schema([*((name, pa.string()) for name in STRINGS), *((name, pa.float64()) for name in SECONDS), _ANSWERS])
_LINE = pa.field("line", pa.int32())
_BLOCK = 16 << 20
_ROWS = 65_536
_FILES_LOOKED_FOR = 2_000
# After so many bad lines the rest is not read: to parse ten million one by one takes minutes.
_MANY = 1_000


class TableSource:
    """The utterances of a table on disk, memory-mapped; in another process it is opened again, not copied."""

    def __init__(self, table: Path, folder: Path) -> None:
        self._table, self._folder = table, folder
        try:
            reader = pa.ipc.open_file(pa.memory_map(os.fspath(table)))
        except OSError as error:
            raise UserError(f"{table}: its manifest was changed while it was in use; start again") from error
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ends = list(accumulate(len(batch) for batch in self._batches))

    def __reduce__(self) -> tuple[type["TableSource"], tuple[Path, Path]]:
        return TableSource, (self._table, self._folder)

    def __len__(self) -> int:
        return self._ends[-1]

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one utterance, without decoding."""
        (row,) = self._row(index).to_pylist()
        return to_utterance({key: value for key, value in row.items() if value is not None}, self._folder)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all rows, but for their speakers, of whom nothing is learned."""
        return digest(batch.drop_columns(["speaker"]).serialize().to_pybytes() for batch in self._batches)

    def audio(self, index: int) -> str | None:
        """Give the path of one utterance's audio, none of a conversation; nothing else of it is read from the disk."""
        name = self._row(index).column("audio_filepath")[0].as_py()
        return None if name is None else os.path.join(self._folder, name)

    @property
    def num_read(self) -> int:
        """The utterances whose text is read in place of audio, beside conversations."""
        return sum(self._lacking(batch) for batch in self._batches)

    @staticmethod
    def _lacking(batch: pa.RecordBatch) -> int:
        audio, turns = batch.column("audio_filepath"), batch.column(TURNS)
        return int(pc.sum(pc.and_(audio.is_null(), turns.is_null()), min_count=0).as_py())

    def load(self, index: int) -> Tensor:
        """Decode one utterance to float32 (S,), 16 kHz mono; raises AudioError."""
        return load_turn(self.utterance(index))

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every utterance, (N,), NaN where they are not known."""
        found = np.empty(len(self), np.float32)
        for end, batch in zip(self._ends, self._batches, strict=True):
            found[end - len(batch) : end] = batch.column("duration").to_numpy(zero_copy_only=False)
        return found

    def tasks(self) -> TaskCounts:
        """Give the number of utterances of each task and language, None where they name none."""
        return count_tasks(pa.Table.from_batches([batch.select(["task", "lang"]) for batch in self._batches]))

    def _row(self, index: int) -> pa.RecordBatch:
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        batch = self._batches[number]
        return batch.slice(index - self._ends[number] + len(batch), 1)


def count_tasks(rows: pa.Table) -> TaskCounts:
    """The number of rows of each pair of `task` and `lang`."""
    found = rows.group_by(["task", "lang"]).aggregate([([], "count_all")]).to_pylist()
    return TaskCounts({(row["task"], row["lang"]): row["count_all"] for row in found})


def open_table(path: Path) -> TableSource:
    """Open a manifest of JSON lines, or one with the same columns in a .parquet or .arrow file.

    Of the audio files a sample is looked for, all if they are few: asking for ten million would take a network drive
    hours. Raises UserError as `read_manifest` does.
    """
    manifest = path.absolute()
    source = _find(manifest) or _make(manifest)
    count = min(len(source), _FILES_LOOKED_FOR)
    problems = []
    for index in np.linspace(0, len(source) - 1, count).astype(int).tolist():
        if (audio := source.audio(index)) is not None and not os.path.isfile(audio):
            problems.append(f"utterance {index + 1}: {no_audio(audio)}")
    if note := of_text(source.num_read, len(source)):
        print(f"note: {path}: {note}")
    if problems:
        raise UserError(summary(f"manifest {path}: {len(problems)} of {count} utterances looked at are bad", problems))
    return source


def _places(manifest: Path) -> list[Path]:
    """Where the table of a manifest as it is now may be, the best place first; raises UserError if there is none."""
    try:
        status = manifest.stat()
    except OSError as error:
        raise unreadable(manifest, error) from error
    stamp = hashlib.sha256(f"{_FORMAT}/{status.st_size}/{status.st_mtime_ns}".encode()).hexdigest()[:12]
    of_path = hashlib.sha256(os.fsencode(manifest)).hexdigest()[:16]
    cache = Path.home() / ".cache" / "rwkv_speech" / "manifests" / of_path
    return [folder / f".{manifest.name}.{stamp}.arrow" for folder in (manifest.parent, cache)]


def _find(manifest: Path) -> TableSource | None:
    for place in _places(manifest):
        with suppress(UserError, pa.ArrowException):
            return TableSource(place, manifest.parent)
    return None


def _make(manifest: Path) -> TableSource:
    """Write the table, one process at a time where the file system has locks; elsewhere each puts a whole one there."""
    places = _places(manifest)
    try:
        file = manifest.open("rb")
    except OSError as error:
        raise unreadable(manifest, error) from error
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if found := _find(manifest):
            return found
        for place in places:
            try:
                write_atomically(place, lambda temporary: _write(manifest, temporary))
            except OSError as error:
                fault = error
                continue
            for old in place.parent.glob(f".{glob.escape(manifest.name)}.*.arrow"):
                if old != place:
                    old.unlink(missing_ok=True)
            source = TableSource(place, manifest.parent)
            print(
                f"note: {manifest}: {len(source):,} utterances, now also in {place}, which later runs open at once; "
                f"{_FILES_LOOKED_FOR:,} of its audio files are looked for, and what else is missing is listed when met"
            )
            return source
    raise UserError(
        f"manifest {manifest}: its table can be written neither to {places[0]} nor to {places[1]} ({fault}); expected "
        "room for about as much as the manifest itself holds: make one of them writable"
    )


def _write(manifest: Path, table: Path) -> None:
    """Write the rows of a manifest as an Arrow file; raises UserError that lists the bad ones, and OSError."""
    read, word = (_read_table, "row") if manifest.suffix.lower() in TABLE_SUFFIXES else (_read_lines, "line")
    problems: dict[int, str] = {}
    hashes: list[NDArray[np.int64]] = []  # of the ids that are given; these themselves may take 1 GB
    count, complete = 0, True
    with pa.OSFile(str(table), "wb") as file, pa.ipc.new_file(file, _SCHEMA.append(_LINE)) as writer:
        for rows in read(manifest, problems):
            writer.write_batch(rows)
            count += len(rows)
            ids = rows.column("id").drop_null()
            hashes.append(np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids)))
            if not (complete := len(problems) <= _MANY):
                break
    values, times = np.unique(np.concatenate([np.zeros(0, np.int64), *hashes]), return_counts=True)
    if (times > 1).any():
        _name_repeats(table, set(values[times > 1].tolist()), word, problems)
    check(manifest, problems, count, word, complete)


def _name_repeats(table: Path, hashes: set[int], word: str, problems: dict[int, str]) -> None:
    """Add the rows whose id was that of an earlier one; `hashes` are those of such ids."""
    first: dict[str, int] = {}
    reader = pa.ipc.open_file(pa.memory_map(str(table)))
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        for given, line in zip(batch.column("id").to_pylist(), batch.column("line").to_pylist(), strict=True):
            if given is not None and hash(given) in hashes and first.setdefault(given, line) != line:
                found = repeated_id(given, f"{word} {first[given]}")
                problems[line] = f"{problems[line]}; {found}" if line in problems else found


def _read_lines(manifest: Path, problems: dict[int, str]) -> Iterator[pa.RecordBatch]:
    number = 1
    with manifest.open("rb") as file:
        rest = file.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
        while block := file.read(_BLOCK):
            whole, newline, rest = (rest + block).rpartition(b"\n")
            yield _parse(whole + newline, number, problems)
            number += whole.count(b"\n") + len(newline)
    if rest:
        yield _parse(rest + b"\n", number, problems)


def _parse(block: bytes, first: int, problems: dict[int, str]) -> pa.RecordBatch:
    """The rows of whole lines, with their numbers; nothing else of a bad one."""
    rows = _parse_at_once(block)
    if rows is not None:
        return _numbered(rows, np.arange(first, first + len(rows)))
    parsed = {}
    for number, row, reasons in parse_lines(block, first):
        parsed[number] = {} if reasons else row
        if TURNS in parsed[number]:
            parsed[number]["duration"] = to_utterance(row, Path()).seconds
        if reasons:
            problems[number] = "; ".join(reasons)
    return _numbered(pa.RecordBatch.from_pylist(list(parsed.values()), _SCHEMA), np.array(list(parsed)))


def _parse_at_once(block: bytes) -> pa.RecordBatch | None:
    """Parse lines with pyarrow; None if any of them needs a closer look."""
    block = block.replace(b"\r\n", b"\n")
    lines = block.count(b"\n")
    # pyarrow cares little where a line ends, and crashes on a file that begins with null. So let every line be one
    # object, as far as its ends tell; then a line with more or less than one object shows in the number of rows.
    if not (block.startswith(b"{") and block.endswith(b"}\n") and block.count(b"}\n{") == lines - 1):
        return None
    try:
        block.decode()  # pyarrow looks at the encoding of what it keeps only
    except ValueError:
        return None
    for answers in (_ANSWERS, pa.field(ANSWER, pa.string())):
        schema = pa.schema([*list(_SCHEMA)[:-1], answers])
        options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        try:
            table = pyarrow.json.read_json(pa.BufferReader(block), parse_options=options)
        except (ValueError, pa.ArrowException):
            continue
        (rows,) = table.combine_chunks().to_batches()
        if answers != _ANSWERS:
            rows = pa.RecordBatch.from_arrays([*rows.columns[:-1], _as_lists(rows.column(ANSWER))], schema=_SCHEMA)
        return rows if len(rows) == lines and _is_sound(rows) else None
    return None


def _as_lists(strings: pa.StringArray) -> pa.ListArray:
    """Each string as a list of one, null where it is null."""
    return pa.ListArray.from_arrays(
        pa.array(range(len(strings) + 1), pa.int32()), strings.cast(pa.string()), mask=strings.is_null()
    )


def _is_sound(rows: pa.RecordBatch) -> bool:
    """Whether `row_faults` would find nothing in any row."""
    text, answers = rows.column("text"), rows.column(ANSWER)
    if pc.list_flatten(answers).null_count:
        return False
    audio, spoken = rows.column("audio_filepath"), (rows.column("source_text"), rows.column("transcript"))
    duration, offset = rows.column("duration"), rows.column("offset")
    fits = [pc.greater(duration, 0), pc.less(duration, 1e9), pc.greater_equal(offset, 0), pc.less(offset, 1e9)]
    fits += [
        pc.coalesce(audio, *spoken).is_valid(),
        pc.or_(text.is_valid(), answers.is_valid()),
        pc.greater(pc.list_value_length(answers), 0),
    ]
    # A value that is not there is null here, and passes.
    return all(pc.all(fit, min_count=0).as_py() for fit in fits)


def _numbered(rows: pa.RecordBatch, numbers: NDArray[np.int64]) -> pa.RecordBatch:
    return rows.append_column(_LINE, pa.array(numbers, pa.int32()))


def _read_table(manifest: Path, problems: dict[int, str]) -> Iterator[pa.RecordBatch]:
    number = 1
    try:
        for batch in _batches(manifest):
            rows = pa.RecordBatch.from_arrays([_column(batch, field, manifest) for field in _SCHEMA], schema=_SCHEMA)
            rows.validate(full=True)
            if not _is_sound(rows):
                for i, row in enumerate(rows.to_pylist(), start=number):
                    if reasons := row_faults({key: value for key, value in row.items() if value is not None}):
                        problems[i] = "; ".join(reasons)
            yield _numbered(rows, np.arange(number, number + len(rows)))
            number += len(rows)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"manifest {manifest}: cannot be read ({error}); expected a whole file of its kind") from error


def _batches(manifest: Path) -> Iterator[pa.RecordBatch]:
    if manifest.suffix.lower() == ".parquet":
        file = pyarrow.parquet.ParquetFile(manifest)
        yield from file.iter_batches(_ROWS, columns=[name for name in _SCHEMA.names if name in file.schema_arrow.names])
        return
    mapped = pa.memory_map(str(manifest))
    try:
        table = pa.ipc.open_file(mapped).read_all()
    except pa.ArrowInvalid:  # not Arrow's file format but its stream format, which `datasets` writes
        table = pa.ipc.open_stream(mapped).read_all()
    yield from table.to_batches(_ROWS)


def _column(batch: pa.RecordBatch, wanted: pa.Field, manifest: Path) -> pa.Array:
    """One column of the schema, null where the batch has none; raises UserError for one of another kind."""
    if wanted.name not in batch.schema.names:
        return pa.nulls(len(batch), wanted.type)
    found = batch.column(wanted.name)
    kind = found.type.value_type if pa.types.is_dictionary(found.type) else found.type
    are_strings = _are_strings(kind)
    are_numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if wanted.name == "speaker":  # as manifest.tidied
        is_name = are_strings or pa.types.is_integer(kind)
        return found.cast(wanted.type) if is_name else pa.nulls(len(batch), wanted.type)
    if wanted.name in LENIENT and not are_strings:
        return pa.nulls(len(batch), wanted.type)
    if wanted.name == ANSWER:
        if are_strings:
            return _as_lists(found)
        fits, expected = _are_lists(kind), "strings or lists of them"
    elif wanted.name in STRINGS:
        fits, expected = are_strings, "strings"
    else:
        fits, expected = are_numbers, "numbers of seconds"
    if not (fits or pa.types.is_null(kind)):
        raise UserError(f"manifest {manifest}: column {wanted.name!r} holds {found.type}; expected {expected}")
    return found.cast(wanted.type, safe=False)


def _are_strings(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _are_lists(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and _are_strings(kind.value_type)
