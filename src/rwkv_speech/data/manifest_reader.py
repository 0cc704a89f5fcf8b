"""Reads a manifest of any size as Arrow batches, and finds the same faults as `read_manifest`.

Most of a manifest of JSON lines is parsed by pyarrow, a block at a time. Whatever that cannot vouch for goes through
the parser of `read_manifest`, line by line, which accepts it or says what is wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet
from numpy.typing import NDArray

from rwkv_speech.data.manifest import BYTE_ORDER_MARK, SECONDS, STRINGS, TABLE_SUFFIXES, parse_line, row_faults
from rwkv_speech.errors import UserError

SCHEMA = pa.schema([*((name, pa.string()) for name in STRINGS), *((name, pa.float64()) for name in SECONDS)])
_BLOCK = 16 << 20
_ROWS = 65_536


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows, in SCHEMA; the line (or row, from 1) of each; by line, what is wrong with the bad ones."""

    rows: pa.RecordBatch
    numbers: NDArray[np.int32]
    faults: dict[int, list[str]] = field(default_factory=dict)


def read_pieces(manifest: Path, *, require_text: bool) -> Iterator[Piece]:
    """Read a manifest of JSON lines, .parquet or .arrow; raises UserError for a file of another kind."""
    if manifest.suffix.lower() in TABLE_SUFFIXES:
        return _read_table(manifest, require_text)
    return _read_lines(manifest, require_text)


def _read_lines(manifest: Path, require_text: bool) -> Iterator[Piece]:
    number = 1
    with manifest.open("rb") as file:
        for block in _blocks(file):
            yield _parse_at_once(block, number, require_text) or _parse_line_by_line(block, number, require_text)
            number += block.count(b"\n")


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Whole lines, about 16 MB at a time."""
    rest = file.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
    while block := file.read(_BLOCK):
        block = rest + block
        end = block.rfind(b"\n") + 1
        rest = block[end:]
        if end:
            yield block[:end]
    if rest:
        yield rest + b"\n"


def _parse_at_once(block: bytes, first: int, require_text: bool) -> Piece | None:
    """Parse lines with pyarrow; None if any of them needs a closer look."""
    block = block.replace(b"\r\n", b"\n")
    lines = block.count(b"\n")
    # pyarrow cares little where a line ends, and crashes on a file that begins with null. So let every line be one
    # object, as far as its ends tell; then a line with more or less than one object shows in the number of rows.
    if not (block.startswith(b"{") and block.endswith(b"}\n") and block.count(b"}\n{") == lines - 1):
        return None
    try:
        block.decode()  # pyarrow looks at the encoding of what it keeps only
        table = pyarrow.json.read_json(
            pa.BufferReader(block),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="ignore"),
        )
    except (ValueError, pa.ArrowException):
        return None
    (rows,) = table.combine_chunks().to_batches()
    if len(rows) != lines or not _is_sound(rows, require_text):
        return None
    return Piece(rows, np.arange(first, first + lines, dtype=np.int32))


def _is_sound(rows: pa.RecordBatch, require_text: bool) -> bool:
    """Whether `row_faults` would find nothing in any row."""
    if rows.column("audio_filepath").null_count or (require_text and rows.column("text").null_count):
        return False
    duration, offset = rows.column("duration"), rows.column("offset")
    fits = [pc.greater(duration, 0), pc.less(duration, 1e9), pc.greater_equal(offset, 0), pc.less(offset, 1e9)]
    # A value that is not there is null here, and passes.
    return all(pc.all(fit, min_count=0).as_py() for fit in fits)


def _parse_line_by_line(block: bytes, first: int, require_text: bool) -> Piece:
    """Parse lines one by one, exactly; a bad one leaves nothing but its id."""
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    faults: dict[int, list[str]] = {}
    for number, line in enumerate(block.split(b"\n"), start=first):
        if not line.strip():
            continue
        row, reasons = parse_line(line, require_text)
        if reasons:
            faults[number] = reasons
            given = {key: value for key, value in row.items() if key == "id"}
            row = {} if row_faults({"audio_filepath": "", **given}, require_text=False) else given
        rows.append(row)
        numbers.append(number)
    return Piece(pa.RecordBatch.from_pylist(rows, SCHEMA), np.array(numbers, np.int32), faults)


def _read_table(manifest: Path, require_text: bool) -> Iterator[Piece]:
    number = 1
    try:
        for batch in _batches(manifest):
            rows = pa.RecordBatch.from_arrays([_column(batch, field, manifest) for field in SCHEMA], schema=SCHEMA)
            rows.validate(full=True)
            faults: dict[int, list[str]] = {}
            if not _is_sound(rows, require_text):
                for i, row in enumerate(rows.to_pylist(), start=number):
                    given = {key: value for key, value in row.items() if value is not None}
                    if reasons := row_faults(given, require_text):
                        faults[i] = reasons
            yield Piece(rows, np.arange(number, number + len(rows), dtype=np.int32), faults)
            number += len(rows)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"manifest {manifest}: cannot be read ({error}); expected a whole file of its kind") from error


def _batches(manifest: Path) -> Iterator[pa.RecordBatch]:
    if manifest.suffix.lower() == ".parquet":
        file = pyarrow.parquet.ParquetFile(manifest)
        yield from file.iter_batches(_ROWS, columns=[name for name in SCHEMA.names if name in file.schema_arrow.names])
        return
    mapped = pa.memory_map(str(manifest))
    try:
        reader = pa.ipc.open_file(mapped)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    except pa.ArrowInvalid:  # not Arrow's file format but its stream format, which `datasets` writes
        batches = iter(pa.ipc.open_stream(mapped))
    for batch in batches:
        for start in range(0, len(batch), _ROWS):
            yield batch.slice(start, _ROWS)


def _column(batch: pa.RecordBatch, wanted: pa.Field, manifest: Path) -> pa.Array:
    """One column of the schema, null where the batch has none; raises UserError for one of another kind."""
    if wanted.name not in batch.schema.names:
        return pa.nulls(len(batch), wanted.type)
    found = batch.column(wanted.name)
    kind = found.type.value_type if pa.types.is_dictionary(found.type) else found.type
    are_strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    are_numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if not (pa.types.is_null(kind) or (are_strings if wanted.name in STRINGS else are_numbers)):
        raise UserError(
            f"manifest {manifest}: column {wanted.name!r} holds {found.type}; expected "
            f"{'strings' if wanted.name in STRINGS else 'numbers of seconds'}"
        )
    return found.cast(wanted.type, safe=False)
