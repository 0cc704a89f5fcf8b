"""Where utterances come from: manifests, folders and (huggingface.py) datasets, all behind `open_source`."""

from pathlib import Path

from rwkv_speech.config import ACCEPTED_FORMS
from rwkv_speech.data.folder import FileSource, read_folder
from rwkv_speech.data.manifest import JSON_SUFFIXES, TABLE_SUFFIXES, read_manifest
from rwkv_speech.data.source import ConcatSource, Source, split_weight
from rwkv_speech.data.source import Utterance as Utterance
from rwkv_speech.errors import UserError

# A manifest of this many bytes or more (some 300,000 lines) is kept on disk instead of in every process's memory.
BIG_MANIFEST = 64 << 20


def open_source(spec: str, *, audio_column: str = "audio", text_column: str = "text") -> Source:
    """Open one source by its specification (see config.DATA_FORMS); the columns are for Hugging Face datasets.

    Raises UserError for a specification, a manifest or a dataset that does not fit.
    """
    path = Path(spec)
    prefix, colon, _ = spec.partition(":")
    if spec.startswith("tar:"):
        from rwkv_speech.data.tar_shards import open_tar

        return open_tar(spec)
    if spec.startswith("hf-stream:"):
        raise UserError(f"data source {spec!r}: is a stream; expected it as the whole of --train_data only")
    is_hub = bool(colon) and prefix in ("hf", "librispeech")
    if not is_hub and path.is_file() and path.suffix.lower() in JSON_SUFFIXES | TABLE_SUFFIXES:
        return _open_manifest(path)
    saved = Path(spec.rpartition(":")[0]) if colon and not path.exists() else path
    if is_hub or _is_saved_dataset(saved):
        # Imported here: `datasets` takes a second, and manifests never need it.
        from rwkv_speech.data import huggingface

        columns = huggingface.Columns(audio_column, text_column)
        if is_hub:
            return huggingface.open_hub(spec, columns)
        return huggingface.open_saved(saved, None if saved == path else spec.rpartition(":")[2], columns)
    if path.is_dir():
        return FileSource(read_folder(path))
    found = "this is neither a manifest nor a folder" if path.exists() else "no such file or folder"
    raise UserError(f"data source {spec!r}: {found}; expected one of:\n{ACCEPTED_FORMS}")


def open_sources(specs: str, *, audio_column: str = "audio", text_column: str = "text") -> Source:
    """Open comma-separated specifications, each with an optional `@WEIGHT`, as a single source.

    Raises UserError as `open_source` and `split_weight` do.
    """
    parts = [split_weight(part.strip()) for part in specs.split(",") if part.strip()]
    if not parts:
        raise UserError(f"data source {specs!r}: names nothing; expected one of:\n{ACCEPTED_FORMS}")
    opened = [open_source(spec, audio_column=audio_column, text_column=text_column) for spec, _ in parts]
    return opened[0] if len(opened) == 1 and parts[0][1] == 1 else ConcatSource(opened, [weight for _, weight in parts])


def _open_manifest(path: Path) -> Source:
    if path.suffix.lower() in JSON_SUFFIXES and path.stat().st_size < BIG_MANIFEST:
        return FileSource(read_manifest(path))
    # Imported here: pyarrow takes a moment, and decoding does without it.
    from rwkv_speech.data.tables import open_table

    return open_table(path)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()
