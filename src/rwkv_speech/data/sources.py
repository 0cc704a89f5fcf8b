"""Where utterances come from: files, folders and whatever KINDS names, all behind `open_sources`."""

from collections.abc import Callable
from pathlib import Path

from rwkv_speech.config import ACCEPTED_FORMS
from rwkv_speech.data.folder import FileSource, read_folder
from rwkv_speech.data.manifest import JSON_SUFFIXES, TABLE_SUFFIXES, read_manifest
from rwkv_speech.data.source import Columns, ConcatSource, Source, split_weight
from rwkv_speech.errors import UserError

# A manifest of this many bytes or more (some 300,000 lines) is kept on disk instead of in every process's memory.
BIG_MANIFEST = 64 << 20


def _open_tar(spec: str, columns: Columns) -> Source:
    from rwkv_speech.data.tar_shards import open_tar

    return open_tar(spec)


def _open_hub(spec: str, columns: Columns) -> Source:
    from rwkv_speech.data.huggingface import open_hub

    return open_hub(spec, columns)


def _open_recipe(spec: str, columns: Columns) -> Source:
    from rwkv_speech.data.recipes import open_recipe

    return open_recipe(spec)


def _refuse_stream(spec: str, columns: Columns) -> Source:
    raise UserError(f"data source {spec!r}: is a stream; expected it as the whole of --train_data only")


# What opens a specification, by its word before the first colon; the rest are files and folders. Each imports its own
# file, for `datasets` and pyarrow take a second.
KINDS: dict[str, Callable[[str, Columns], Source]] = {
    "tar": _open_tar,
    "hf": _open_hub,
    "librispeech": _open_hub,
    **dict.fromkeys(("commonvoice", "fleurs", "mls", "aishell", "covost"), _open_recipe),
    "hf-stream": _refuse_stream,
}


def open_source(spec: str, *, audio_column: str = "audio", text_column: str = "text") -> Source:
    """Open one source by its specification (see config.DATA_FORMS); the columns are for Hugging Face datasets.

    Raises UserError for a specification, a manifest or a dataset that does not fit.
    """
    path, columns = Path(spec), Columns(audio_column, text_column)
    kind, colon, _ = spec.partition(":")
    if colon and kind in KINDS:
        return KINDS[kind](spec, columns)
    if path.is_file() and path.suffix.lower() in JSON_SUFFIXES | TABLE_SUFFIXES:
        return _open_manifest(path)
    saved = Path(spec.rpartition(":")[0]) if colon and not path.exists() else path
    if _is_saved_dataset(saved):
        from rwkv_speech.data.huggingface import open_saved

        return open_saved(saved, None if saved == path else spec.rpartition(":")[2], columns)
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
    from rwkv_speech.data.tables import open_table

    return open_table(path)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()
