"""What decoding finds: a transcript of each utterance, and the one kind of row of all result files."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rwkv_speech.errors import UserError
from rwkv_speech.files import write_text_atomically


@dataclass(frozen=True)
class Transcript:
    """What is said: `text`, its token `ids`, the audio's `seconds`, and whether the text was `cut` at the limit."""

    text: str
    ids: list[int]
    seconds: float
    cut: bool


@dataclass(frozen=True)
class Row:
    """An utterance of a data set, its reference and its hypothesis; `index` is its place in the set."""

    id: str
    index: int
    ref: str
    hyp: str
    lang: str | None
    task: str
    seconds: float
    cut: bool


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines, atomically, in the order of the set."""
    ordered = sorted(rows, key=lambda row: row.index)
    # Readable letters; half a surrogate pair, which a file's name may hold, stays JSON's escape.
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in ordered)
    write_text_atomically(path, lines.encode("utf-8", "backslashreplace").decode("utf-8"))


def read_rows(path: Path) -> list[Row]:
    """The rows that `write_rows` wrote; none without the file.

    Raises UserError naming file and line for anything but such a row.
    """
    names, rows = [field.name for field in fields(Row)], list[Row]()
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), start=1):
        try:
            found = json.loads(line)
            row = Row(**{name: found[name] for name in names})
            if not all(isinstance(text, str) for text in (row.id, row.ref, row.hyp)):
                raise TypeError("a text is none")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number}: found {line[:80].decode(errors='replace')!r}, expected a JSON object with "
                f"{', '.join(names)}; delete the line or the file"
            ) from error
        rows.append(row)
    return rows
