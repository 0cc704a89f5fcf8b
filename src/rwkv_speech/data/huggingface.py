"""Hugging Face datasets as sources, from the hub or from disk; `datasets` itself never decodes audio."""

import os
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub.utils import logging as hub_logging
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.audio import AudioError, load_audio
from rwkv_speech.config import ACCEPTED_FORMS
from rwkv_speech.data.manifest import TEXTS, row_faults, texts_of, tidied
from rwkv_speech.data.source import Columns, TaskCounts, Utterance, digest
from rwkv_speech.errors import UserError
from rwkv_speech.text import normalise_label

hub_logging.set_verbosity_error()  # of a hub that does not answer, one error says enough

LIBRISPEECH = ("openslr/librispeech_asr", "all")
LIBRISPEECH_SPLITS = {
    "train-960": "train.clean.100+train.clean.360+train.other.500",
    "train-100": "train.clean.100",
    "train-clean-360": "train.clean.360",
    "train-other-500": "train.other.500",
    "dev-clean": "validation.clean",
    "dev-other": "validation.other",
    "test-clean": "test.clean",
    "test-other": "test.other",
}


class HuggingFaceSource:
    """Rows of a dataset; `label_mode` is applied to the text at once, for sets that are all in capitals.

    Further columns are taken where they are there: `id`, `duration` (s), `lang`, `task`, `speaker_id` or `speaker`, and
    what a manifest may say of the texts: `source_lang`, `source_text`, `transcript`, `answer`, `prompt`.
    Raises UserError that lists the columns when one of `columns` is missing or of another type.
    """

    def __init__(
        self, dataset: datasets.Dataset, columns: Columns, *, label: str = "dataset", label_mode: str = "none"
    ) -> None:
        self._columns, self._label, self._label_mode = columns, label, label_mode
        features = dataset.features
        _check_columns(features, columns, label)
        if isinstance(features[columns.audio], datasets.Audio):
            dataset = dataset.cast_column(columns.audio, datasets.Audio(decode=False))
        if dataset.data.column(columns.text).null_count:
            raise UserError(
                f"{label}: column {columns.text!r} holds rows without a text; expected a string in every "
                "row: filter them out and save the rest with save_to_disk"
            )
        if len(dataset) == 0:
            raise UserError(f"{label}: holds no row; expected at least one")
        self._audio = dataset.select_columns([columns.audio])
        first = self._audio[0][columns.audio]
        self._holds_bytes = isinstance(first, dict) and first["bytes"] is not None
        known = [columns.text, *(name for name in ("id", "duration", "lang", "task", *TEXTS) if name in features)]
        self._rows = dataset.select_columns([name for name in dict.fromkeys(known) if name != columns.audio])
        named = next((name for name in ("speaker_id", "speaker") if name in features), None)
        self._speakers = dataset[named] if named else None

    def __len__(self) -> int:
        return len(self._audio)

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one row; its audio is not read."""
        row: dict[str, Any] = self._rows[index]
        duration, texts = row.get("duration"), self._texts(row)
        is_known = isinstance(duration, (int, float)) and duration > 0
        return Utterance(
            id=str(row["id"]) if row.get("id") is not None else f"{self._label}#{index}",
            audio=None if self._holds_bytes else self._path(index),
            duration=float(duration) if is_known and duration is not None else None,
            lang=_string_or_none(row.get("lang")),
            task=_string_or_none(row.get("task")),
            speaker=self._speaker(index),
            identity=f"{self._audio._fingerprint}#{index}" if self._holds_bytes else None,
            **{**texts, "text": normalise_label(texts["text"], self._label_mode)},
        )

    def _texts(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the row says of its texts; a value that a manifest could not hold is left out."""
        found = tidied({name: row[name] for name in TEXTS if name in row} | {"text": row[self._columns.text]})
        return texts_of({name: value for name, value in found.items() if not row_faults({name: value}, required=())})

    def _speaker(self, index: int) -> str | None:
        found = self._speakers[index] if self._speakers is not None else None
        return None if found is None else str(found)

    def _path(self, index: int) -> str | None:
        cell = self._audio[index][self._columns.audio]
        path = cell["path"] if isinstance(cell, dict) else cell
        return os.path.abspath(path) if path else None

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every row, (N,), NaN where they are not known."""
        unknown = np.full(len(self), np.nan, np.float32)
        if "duration" not in self._rows.column_names:
            return unknown
        column = self._rows.select_columns(["duration"]).with_format("arrow")[:].column("duration")
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            return unknown
        found = column.to_numpy().astype(np.float32)
        return np.where(found > 0, found, unknown)

    def tasks(self) -> TaskCounts:
        """Give the number of utterances of each task and language, None where they name none."""
        known = [name for name in ("task", "lang") if name in self._rows.column_names]
        columns = {name: self._rows.select_columns([name])[:][name] for name in known}
        nothing = [None] * len(self)
        pairs = zip(columns.get("task", nothing), columns.get("lang", nothing), strict=True)
        return TaskCounts((_string_or_none(task), _string_or_none(lang)) for task, lang in pairs)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the texts, durations, languages, tasks, ids and sizes of all rows."""
        columns = self._rows.with_format("arrow")[:].columns if self._rows.column_names else []
        sizes = []
        if self._holds_bytes:
            audio = self._audio.data.column(self._columns.audio)
            sizes = pc.binary_length(pc.struct_field(audio, "bytes")).to_pylist()
        return digest((len(self), *sizes, *(digest(column.to_pylist()) for column in columns)))

    def load(self, index: int) -> Tensor:
        """Decode one row to float32 (S,), 16 kHz mono; raises AudioError."""
        cell = self._audio[index][self._columns.audio]
        name = f"{self._label} row {index}"
        if isinstance(cell, str):
            cell = {"bytes": None, "path": cell}
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise AudioError(f"{name}: has neither bytes nor a path; expected audio: filter the row out")
        if cell["bytes"] is not None:
            return load_audio(cell["bytes"], name=name)
        return load_audio(cell["path"], name=f"{name} ({cell['path']})")


def open_hub(spec: str, columns: Columns) -> HuggingFaceSource:
    """Open `hf:NAME:SPLIT`, `hf:NAME:CONFIG:SPLIT` or `librispeech:SPLIT`; raises UserError."""
    kind, *parts = re.split(r":(?![^\[]*\])", spec)  # the colon of a slice such as train[:1%] stays
    if kind == "librispeech":
        if len(parts) != 1 or parts[0] not in LIBRISPEECH_SPLITS:
            raise UserError(
                f"data source {spec!r}: no such split; expected librispeech: and one of "
                + ", ".join(LIBRISPEECH_SPLITS)
            )
        rows = load_hub(*LIBRISPEECH, LIBRISPEECH_SPLITS[parts[0]], spec)
        # Its transcripts are in capitals, which no language model is used to.
        return HuggingFaceSource(rows, columns, label=spec, label_mode="lower")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"data source {spec!r}: {len(parts)} parts after 'hf:'; expected one of:\n{ACCEPTED_FORMS}")
    config = parts[1] if len(parts) == 3 else None
    return HuggingFaceSource(load_hub(parts[0], config, parts[-1], spec), columns, label=spec)


def open_saved(path: str | Path, split: str | None, columns: Columns) -> HuggingFaceSource:
    """Open a folder that `save_to_disk` wrote; `split` chooses from a DatasetDict and may be `a+b`."""
    label = f"{path}:{split}" if split else str(path)
    try:
        found = datasets.load_from_disk(os.fspath(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"data source {label!r}: cannot be loaded ({error}); expected what save_to_disk wrote"
        ) from error
    if isinstance(found, datasets.Dataset):
        if split:
            raise UserError(
                f"data source {label!r}: holds one dataset without splits; expected {path}: drop ':{split}'"
            )
        return HuggingFaceSource(found, columns, label=label)
    names = split.split("+") if split else list(found)
    if not set(names) <= set(found) or (split is None and len(names) != 1):
        raise UserError(
            f"data source {label!r}: its splits are {', '.join(found)}; expected {path}:SPLIT, SPLIT one of them or a+b"
        )
    return HuggingFaceSource(datasets.concatenate_datasets([found[name] for name in names]), columns, label=label)


def load_hub(name: str, config: str | None, split: str, spec: str, revision: str | None = None) -> datasets.Dataset:
    """Load a split expression, fetching only the files of the splits it names where that can be.

    A `revision` holds Parquet files as CONFIG/SPLIT/*.parquet, and nothing that says so. Raises UserError.
    """
    try:
        if revision:
            files = {split: f"{config}/{split}/*.parquet"}
            return datasets.load_dataset(name, data_files=files, split=split, revision=revision)
        builder = datasets.load_dataset_builder(name, config)
        files = builder.config.data_files
        wanted = [re.sub(r"\[.*\]$", "", part.strip()) for part in split.split("+")]
        if isinstance(builder, Parquet) and files and all(part in files for part in wanted):
            # load_dataset(name, split=...) downloads every split of the configuration: 60 GB for test-clean.
            chosen = {part: list(files[part]) for part in wanted}
            return datasets.load_dataset("parquet", data_files=chosen, split=split, features=builder.info.features)
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"data source {spec!r}: cannot be loaded ({type(error).__name__}: {error}); expected a dataset "
            "of Parquet or other plain files with that configuration and split, and a connection to the "
            "hub: without one, load it elsewhere, save_to_disk, and give the folder"
        ) from error


def _check_columns(features: datasets.Features, columns: Columns, label: str) -> None:
    wanted = [("audio", columns.audio), ("text", columns.text)]
    found = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    for role, name in wanted:
        if name not in features:
            raise UserError(f"{label}: has no {role} column {name!r}; found: {found}: name the right one of these")
    if _kind(features[columns.audio]) not in ("audio", "string", "large_string", "bytes and path"):
        raise UserError(f"{label}: column {columns.audio!r} holds no audio, nor paths to it; found: {found}")
    if _kind(features[columns.text]) not in ("string", "large_string"):
        raise UserError(f"{label}: column {columns.text!r} holds no strings; found: {found}")


def _kind(feature: Any) -> str:
    if isinstance(feature, datasets.Audio):
        return "audio"
    if isinstance(feature, dict) and {"bytes", "path"} <= set(feature):
        return "bytes and path"
    return str(getattr(feature, "dtype", type(feature).__name__))


def _string_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
