"""Folders of .txt files: real text to pretrain a small language model on."""

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rwkv_speech.data.source import split_weight
from rwkv_speech.errors import UserError

_HELD_OUT = 50  # every so many lines one is held out, by its content


@dataclass(frozen=True)
class Lines:
    """A text in one language or, line by line the same, in several; a line may be empty where it is not translated.

    `langs` are the names of the folders, as "en"; text beside such folders has the language "". Each line is drawn
    `weight` times as often as one of weight 1.
    """

    name: str
    langs: tuple[str, ...]
    rows: list[tuple[str, ...]]
    weight: float

    def held_out(self) -> "Lines":
        """The rows that are not trained on."""
        return self._some(True)

    def kept(self) -> "Lines":
        """The rows that are trained on."""
        return self._some(False)

    def _some(self, held: bool) -> "Lines":
        return Lines(self.name, self.langs, [row for row in self.rows if is_held_out(row) is held], self.weight)


def is_held_out(row: tuple[str, ...]) -> bool:
    """Whether a row is for scoring: by the content of its first text, one of fifty."""
    text = next((text for text in row if text), "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % _HELD_OUT == 0


def read_texts(spec: str) -> list[Lines]:
    """The texts of folders, separated by commas, each with @WEIGHT if its lines are to come more often.

    A folder holds .txt files at any depth; those below a folder that is named by two or three letters, as `en/a.txt`,
    are in that language, and files of the same name and number of lines below several are translations of each other,
    line by line. Raises UserError for a folder without text.
    """
    found = list[Lines]()
    for part in filter(None, spec.split(",")):
        folder, weight = split_weight(part)
        found += _read_folder(Path(folder), float(weight))
    if not found:
        raise UserError("--texts: found nothing, expected folders of .txt files, separated by commas")
    return found


def _read_folder(folder: Path, weight: float) -> list[Lines]:
    by_name: dict[str, dict[str, list[str]]] = {}
    for path in sorted(folder.rglob("*.txt")):
        parts = path.relative_to(folder).parts
        lang = parts[0] if len(parts) > 1 and 2 <= len(parts[0]) <= 3 and parts[0].isalpha() else ""
        name = "/".join(parts[1:] if lang else parts)
        by_name.setdefault(name, {})[lang] = list(_lines(path))
    if not any(any(lines) for files in by_name.values() for lines in files.values()):
        raise UserError(f"--texts: {folder} holds no .txt file with text in it; expected one at least")
    found = list[Lines]()
    for name, files in by_name.items():
        for size in sorted({len(lines) for lines in files.values()}):
            langs = tuple(lang for lang, lines in files.items() if len(lines) == size)
            rows = [row for row in zip(*(files[lang] for lang in langs), strict=True) if any(row)]
            found.append(Lines(f"{folder.name}/{name}", langs, rows, weight))
    return [lines for lines in found if lines.rows]


def _lines(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts: {path} cannot be read as UTF-8 ({error}); convert or remove it") from error
    for line in unicodedata.normalize("NFC", text).removesuffix("\n").split("\n"):
        yield " ".join(line.split())
