"""Where utterances come from: manifests, folders and (huggingface.py) datasets, all behind `open_source`."""

import bisect
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.audio import AudioError, load_audio
from rwkv_speech.data.manifest import JSON_SUFFIXES, TABLE_SUFFIXES, read_manifest, summary
from rwkv_speech.data.mixture import Part, split_weight
from rwkv_speech.data.utterance import Utterance as Utterance
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
# A manifest of this many bytes or more (some 300,000 lines) is kept on disk instead of in every process's memory.
BIG_MANIFEST = 64 << 20

ACCEPTED_FORMS = """\
  FILE.jsonl or FILE.json      a manifest: JSON lines with audio_filepath and text
  FILE.parquet or FILE.arrow   a manifest with such columns
  FOLDER                       audio files, each with a .txt of the same name beside it
  FOLDER or FOLDER:SPLIT       what datasets' save_to_disk wrote
  hf:NAME:SPLIT                a Hugging Face dataset; SPLIT may be a+b
  hf:NAME:CONFIG:SPLIT         one configuration of it
  librispeech:SPLIT            LibriSpeech, for example librispeech:train-960 or librispeech:test-clean
  tar:FOLDER or tar:PATTERN    WebDataset shards, for example tar:/data/train-{000..099}.tar
  hf-stream:NAME:SPLIT         a Hugging Face dataset that no disk holds: --train_data alone, with --epoch_steps"""


class Source(Protocol):
    """An indexed set of utterances."""

    def __len__(self) -> int: ...

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one utterance, without decoding."""
        ...

    def load(self, index: int) -> Tensor:
        """Decode one utterance to float32 (S,), 16 kHz mono; raises AudioError."""
        ...

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every utterance, (N,), NaN where they are not known."""
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

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every utterance, (N,), NaN where they are not known."""
        return np.array([found.duration for found in self._utterances], np.float32)


class ConcatSource:
    """Several sources one after another, each with its weight, 1 by default; ids stay as the sources gave them."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[Fraction] | None = None) -> None:
        self._sources = list(sources)
        self._weights = [Fraction(1)] * len(self._sources) if weights is None else list(weights)
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

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every utterance, (N,), NaN where they are not known."""
        return np.concatenate([np.zeros(0, np.float32), *(source.durations() for source in self._sources)])

    def parts(self) -> list[Part]:
        """Give the size and weight of every source."""
        return [Part(len(source), weight) for source, weight in zip(self._sources, self._weights, strict=True)]

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
    if spec.startswith("tar:"):
        from rwkv_speech.data.tar_shards import open_tar

        return open_tar(spec, require_text)
    if spec.startswith("hf-stream:"):
        raise UserError(f"data source {spec!r}: is a stream; expected it as the whole of --train_data only")
    is_hub = bool(colon) and prefix in ("hf", "librispeech")
    if not is_hub and path.is_file() and path.suffix.lower() in JSON_SUFFIXES | TABLE_SUFFIXES:
        return _open_manifest(path, require_text)
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
    """Open comma-separated specifications, each with an optional `@WEIGHT`, as a single source.

    Raises UserError as `open_source` and `split_weight` do.
    """
    parts = [split_weight(part.strip()) for part in specs.split(",") if part.strip()]
    if not parts:
        raise UserError(f"data source {specs!r}: names nothing; expected one of:\n{ACCEPTED_FORMS}")
    opened = [
        open_source(spec, audio_column=audio_column, text_column=text_column, require_text=require_text)
        for spec, _ in parts
    ]
    return opened[0] if len(opened) == 1 and parts[0][1] == 1 else ConcatSource(opened, [weight for _, weight in parts])


def parts_of(source: Source) -> list[Part]:
    """The runs of utterances that have weights of their own."""
    return source.parts() if isinstance(source, ConcatSource) else [Part(len(source))]


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
            summary(f"folder {path}: {len(problems)} of {len(utterances)} audio files lack a text", problems)
        )
    if not utterances:
        raise UserError(f"folder {path}: holds no audio file; expected any of: {' '.join(sorted(AUDIO_SUFFIXES))}")
    return utterances


def _open_manifest(path: Path, require_text: bool) -> Source:
    if path.suffix.lower() in JSON_SUFFIXES and path.stat().st_size < BIG_MANIFEST:
        return FileSource(read_manifest(path, require_text=require_text))
    # Imported here: pyarrow takes a moment, and decoding does without it.
    from rwkv_speech.data import manifest_table

    return manifest_table.open_manifest(path, require_text=require_text)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()
