"""Where utterances come from: manifests, folders and (huggingface.py) datasets, all behind `open_source`."""

import bisect
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rwkv_speech.audio import AudioError, load_audio
from rwkv_speech.errors import UserError

# What libsndfile decodes and people record in; headerless RAW is not among them, for its rate is unknown.
AUDIO_SUFFIXES = frozenset(
    [
        ".wav",
        ".flac",
        ".ogg",
        ".oga",
        ".opus",
        ".mp3",
        ".aiff",
        ".aif",
        ".aifc",
        ".au",
        ".snd",
        ".caf",
        ".w64",
        ".rf64",
        ".sph",
    ]
)
MANIFEST_SUFFIXES = frozenset({".jsonl", ".json"})
_MAX_ERRORS_SHOWN = 20

ACCEPTED_FORMS = """\
  FILE.jsonl or FILE.json      a manifest: JSON lines with audio_filepath and text
  FOLDER                       audio files, each with a .txt of the same name beside it
  FOLDER or FOLDER:SPLIT       what datasets' save_to_disk wrote
  hf:NAME:SPLIT                a Hugging Face dataset; SPLIT may be a+b
  hf:NAME:CONFIG:SPLIT         one configuration of it
  librispeech:SPLIT            LibriSpeech, for example librispeech:train-960 or librispeech:test-clean"""


@dataclass(frozen=True)
class Utterance:
    """What is known of one recording without decoding it.

    `offset` and `duration` (s) choose a segment of the file. `audio` is an absolute path, or None where the
    source keeps the bytes itself.
    """

    id: str
    audio: str | None
    text: str
    duration: float | None = None
    offset: float = 0.0
    lang: str | None = None
    task: str | None = None


class Source(Protocol):
    """An indexed set of utterances."""

    def __len__(self) -> int: ...

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one utterance, without decoding."""
        ...

    def load(self, index: int) -> Tensor:
        """Decode one utterance to float32 (S,), 16 kHz mono; raises AudioError."""
        ...


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
        found = self._utterances[index]
        if found.audio is None:
            raise AudioError(f"{found.id}: has no audio file; expected a path: mend its source")
        return load_audio(found.audio, found.offset, found.duration)


class ConcatSource:
    """Several sources one after another; ids stay as the sources gave them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)
        self._ends = list(accumulate(len(source) for source in self._sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one utterance, without decoding."""
        source, local = self._locate(index)
        return source.utterance(local)

    def load(self, index: int) -> Tensor:
        """Decode one utterance to float32 (S,), 16 kHz mono; raises AudioError."""
        source, local = self._locate(index)
        return source.load(local)

    def _locate(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} of {len(self)}")
        part = bisect.bisect_right(self._ends, index)
        return self._sources[part], index - (self._ends[part - 1] if part else 0)


def open_source(
    spec: str, *, audio_column: str = "audio", text_column: str = "text", require_text: bool = True
) -> Source:
    """Open one source by its specification (see ACCEPTED_FORMS); the columns are for Hugging Face datasets.

    With `require_text=False` utterances may lack a text, which is then "". Raises UserError for a
    specification, a manifest or a dataset that does not fit.
    """
    path = Path(spec)
    prefix, colon, _ = spec.partition(":")
    is_hub = bool(colon) and prefix in ("hf", "librispeech")
    if not is_hub and path.is_file() and path.suffix.lower() in MANIFEST_SUFFIXES:
        return FileSource(read_manifest(path, require_text=require_text))
    saved = Path(spec.rpartition(":")[0]) if colon and not path.exists() else path
    if is_hub or _is_saved_dataset(saved):
        # Imported here: `datasets` takes a second, and manifests never need it.
        from rwkv_speech.data import huggingface

        columns = huggingface.Columns(audio_column, text_column, require_text)
        if is_hub:
            return huggingface.open_hub(spec, columns)
        return huggingface.open_saved(saved, None if saved == path else spec.rpartition(":")[2], columns)
    if path.is_dir():
        return FileSource(read_folder(path, require_text=require_text))
    found = "this is neither a manifest nor a folder" if path.exists() else "no such file or folder"
    raise UserError(f"data source {spec!r}: {found}; expected one of:\n{ACCEPTED_FORMS}")


def open_sources(
    specs: str, *, audio_column: str = "audio", text_column: str = "text", require_text: bool = True
) -> Source:
    """Open comma-separated specifications as a single source; raises UserError as `open_source` does."""
    parts = [part.strip() for part in specs.split(",") if part.strip()]
    if not parts:
        raise UserError(f"data source {specs!r}: names nothing; expected one of:\n{ACCEPTED_FORMS}")
    opened = [
        open_source(part, audio_column=audio_column, text_column=text_column, require_text=require_text)
        for part in parts
    ]
    return opened[0] if len(opened) == 1 else ConcatSource(opened)


def read_manifest(path: str | Path, *, require_text: bool = True) -> list[Utterance]:
    """Read a manifest of JSON lines.

    Keys: `audio_filepath` (relative to the manifest), `text`, and optionally `duration`, `offset` (s),
    `lang`, `task`, `id`; others are ignored. An id that is not given is made of the path, unique.

    Raises UserError that lists every bad line with its number.
    """
    manifest = Path(path)
    try:
        content = manifest.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"manifest {path}: cannot be read ({error.strerror}); expected a file of JSON lines") from error
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        row, reasons = _parse_row(line, manifest.parent.absolute(), require_text)
        given = row.get("id")
        if isinstance(given, str) and line_of_id.setdefault(given, number) != number:
            reasons.append(f"id {given!r} is already that of line {line_of_id[given]}")
        if reasons:
            problems.append(f"line {number}: {'; '.join(reasons)}")
        rows.append(row)
    if problems:
        raise UserError(_summary(f"manifest {path}: {len(problems)} of {len(rows)} lines are bad", problems))
    if not rows:
        raise UserError(f"manifest {path}: holds no utterance; expected one JSON object per line")
    return _with_ids(rows, line_of_id)


def read_folder(path: str | Path, *, require_text: bool = True) -> list[Utterance]:
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
        elif require_text:
            problems.append(f"{name}: no {transcript.name} beside it")
        utterances.append(Utterance(id=name.as_posix(), audio=str(file), text=text))
    if problems:
        raise UserError(
            _summary(f"folder {path}: {len(problems)} of {len(utterances)} audio files lack a text", problems)
        )
    if not utterances:
        raise UserError(f"folder {path}: holds no audio file; expected any of: {' '.join(sorted(AUDIO_SUFFIXES))}")
    return utterances


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _summary(head: str, problems: list[str]) -> str:
    shown = "".join(f"\n  {problem}" for problem in problems[:_MAX_ERRORS_SHOWN])
    rest = len(problems) - _MAX_ERRORS_SHOWN
    return f"{head}: mend or remove them:{shown}" + (f"\n  ... and {rest} more" if rest > 0 else "")


def _parse_row(line: bytes, folder: Path, require_text: bool) -> tuple[dict[str, Any], list[str]]:
    """Parse one manifest line to its row, with `audio_filepath` made absolute, and what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}, ["is not UTF-8"]
    except (ValueError, RecursionError) as error:
        return {}, [f"is not JSON ({error})"]
    if not isinstance(row, dict):
        return {}, [f"is not a JSON object but {type(row).__name__}"]
    row = {key: value for key, value in row.items() if value is not None}
    required = ["audio_filepath", "text"] if require_text else ["audio_filepath"]
    reasons = [f"lacks {key!r}" for key in required if key not in row]
    reasons += [_string_fault(key, row[key]) for key in ("audio_filepath", "text", "lang", "task", "id") if key in row]
    reasons += [_seconds_fault(key, row[key]) for key in ("duration", "offset") if key in row]
    reasons = [reason for reason in reasons if reason]
    named = row.get("audio_filepath")
    if isinstance(named, str):
        row["name"] = named
        row["audio_filepath"] = os.path.join(folder, named)
        if not os.path.isfile(row["audio_filepath"]):
            reasons.append(f"no such audio file {row['audio_filepath']}")
    return row, reasons


def _string_fault(key: str, value: object) -> str:
    if not isinstance(value, str):
        return f"{key!r} is {value!r}, expected a string"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f"{key!r} holds a lone surrogate, expected valid Unicode"
    return ""


def _seconds_fault(key: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{key!r} is {value!r}, expected a number of seconds"
    # Comparisons, so that NaN and integers too large for a float fail as well.
    lowest_fits = value > 0 if key == "duration" else value >= 0
    if not (lowest_fits and value < 1e9):
        return f"{key!r} is {value!r}, expected {'above 0' if key == 'duration' else '0 or more'} and finite"
    return ""


def _with_ids(rows: list[dict[str, Any]], taken: dict[str, int]) -> list[Utterance]:
    """Build the utterances; a row without an id gets its path, with offset or count where that recurs."""
    uses = Counter(row["audio_filepath"] for row in rows)
    used = set(taken)
    utterances = []
    for row in rows:
        offset = float(row.get("offset", 0.0))
        if "id" in row:
            name = row["id"]
        else:
            stem = row["name"] if uses[row["audio_filepath"]] == 1 else f"{row['name']}@{offset:g}"
            name, count = stem, 2
            while name in used:
                name, count = f"{stem}#{count}", count + 1
            used.add(name)
        duration = float(row["duration"]) if "duration" in row else None
        utterances.append(
            Utterance(
                name,
                row["audio_filepath"],
                row.get("text", ""),
                duration,
                offset,
                row.get("lang"),
                row.get("task"),
            )
        )
    return utterances
