"""Public corpora as sources, in the folders that they are downloaded as or from the hub; case and script stay.

Every utterance has its language (ISO 639-1, where there is such a code), and its speaker where the corpus knows it.
"""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rwkv_speech.config import DATA_FORMS
from rwkv_speech.data.folder import FileSource
from rwkv_speech.data.manifest import no_audio, summary
from rwkv_speech.data.source import Columns, Source, Utterance
from rwkv_speech.errors import UserError

FLEURS, MLS, COVOST = "google/fleurs", "facebook/multilingual_librispeech", "fixie-ai/covost2"
FLEURS_COLUMNS = ("id", "file_name", "raw_transcription", "transcription", "characters", "num_samples", "gender")
MLS_LANGS = {
    "dutch": "nl", "english": "en", "french": "fr", "german": "de", "italian": "it", "polish": "pl",
    "portuguese": "pt", "spanish": "es",
}  # fmt: skip
_AISHELL_TEXTS = "transcript/aishell_transcript_v0.8.txt"


def open_recipe(spec: str) -> Source:
    """Open `commonvoice:`, `fleurs:`, `mls:`, `aishell:` or `covost:` and what config.DATA_FORMS says of it.

    Raises UserError for another form, and naming each file and column that is missing.
    """
    kind, *parts = spec.split(":")
    most = 3 if kind == "covost" else 2
    if len(parts) > most:  # the colons of a folder's name
        parts = [":".join(parts[: 1 - most]), *parts[1 - most :]]
    if len(parts) < 2 or not all(parts):
        form = next(form for form in DATA_FORMS if form.startswith(f"{kind}:"))
        raise UserError(f"data source {spec!r}: {len(parts)} parts after '{kind}:'; expected {form}")
    return _OPEN[kind](spec, *parts)


def _common_voice(spec: str, name: str, split: str) -> Source:
    folder = _folder(spec, name)
    seconds = _clip_seconds(folder)
    utterances = [
        Utterance(
            id=row["path"],
            audio=str(folder / "clips" / row["path"]),
            text=row["sentence"],
            duration=seconds.get(row["path"]),
            lang=iso(row.get("locale") or folder.name),
            speaker=row.get("client_id"),
        )
        for row in _table(spec, folder / f"{split}.tsv", ("path", "sentence"))
    ]
    return _source(spec, utterances)


def _clip_seconds(folder: Path) -> dict[str, float]:
    """The durations of a Common Voice language's clips, as newer versions list them."""
    path = folder / "clip_durations.tsv"
    if not path.is_file():
        return {}
    clips = _table("", path, ("clip", "duration[ms]"))
    return {row["clip"]: int(row["duration[ms]"]) / 1000 for row in clips if int(row["duration[ms]"])}


def _covost(spec: str, *parts: str) -> Source:
    *named, pair, split = parts
    source, _, target = pair.partition("_")
    if not source or not target:
        raise UserError(f"data source {spec!r}: found {pair!r}, expected two languages, as en_de")
    lang, source_lang = iso(target), iso(source)
    if not named:
        columns = {"translation": "text", "sentence": "source_text", "client_id": "speaker_id"}
        told = {"task": "st", "lang": lang, "source_lang": source_lang}
        return _hub(spec, COVOST, pair, {"dev": "validation"}.get(split, split), columns, told)
    folder = _folder(spec, named[0])
    seconds, rows = _clip_seconds(folder), _translations(spec, folder, pair, split)
    utterances = [
        Utterance(
            id=row["path"],
            audio=str(folder / "clips" / row["path"]),
            text=row["translation"],
            duration=seconds.get(row["path"]),
            lang=lang,
            task="st",
            speaker=row.get("client_id"),
            source_lang=source_lang,
            source_text=row["sentence"],
        )
        for row in rows
    ]
    return _source(spec, utterances)


def _translations(spec: str, folder: Path, pair: str, split: str) -> Iterator[dict[str, str]]:
    """The rows of one split: of its own file, or of the one for all splits joined with Common Voice's sentences."""
    own, shared = folder / f"covost_v2.{pair}.{split}.tsv", folder / f"covost_v2.{pair}.tsv"
    if own.is_file() or not shared.is_file():
        yield from _table(spec, own, ("path", "sentence", "translation"))
        return
    spoken = {row["path"]: row for row in _table(spec, folder / "validated.tsv", ("path", "sentence"))}
    for row in _table(spec, shared, ("path", "translation", "split")):
        if row["split"].removesuffix("_covost") == split and row["path"] in spoken:
            yield {**spoken[row["path"]], **row}


def _fleurs(spec: str, name: str, split: str) -> Source:
    """FLEURS; the validation split is called dev in its folder."""
    code = Path(name).name
    if not os.path.isdir(name):
        columns = {"raw_transcription": "text"}
        hub_split = {"dev": "validation"}.get(split, split)
        return _hub(spec, FLEURS, name, hub_split, columns, {"lang": iso(code)}, revision="refs/convert/parquet")
    split = {"validation": "dev"}.get(split, split)
    folder, rows = Path(name).absolute(), _table(spec, Path(name) / f"{split}.tsv", FLEURS_COLUMNS, FLEURS_COLUMNS)
    audio = folder / "audio" / split if (folder / "audio" / split).is_dir() else folder / split
    utterances = [
        Utterance(
            id=row["file_name"],
            audio=str(audio / row["file_name"]),
            text=row["raw_transcription"],
            duration=int(row["num_samples"]) / 16_000,
            lang=iso(code),
        )
        for row in rows
    ]
    return _source(spec, utterances)


def _mls(spec: str, name: str, split: str) -> Source:
    language = Path(name).name.removeprefix("mls_").removesuffix("_opus")
    if language not in MLS_LANGS:
        raise UserError(
            f"data source {spec!r}: found the language {language!r}, expected one of {', '.join(MLS_LANGS)}, or a "
            "folder named like mls_german"
        )
    lang = MLS_LANGS[language]
    if not os.path.isdir(name):
        columns = {"transcript": "text", "audio_duration": "duration"}
        return _hub(spec, MLS, language, split, columns, {"lang": lang})
    folder = _folder(spec, os.path.join(name, split))
    utterances = []
    for row in _table(spec, folder / "transcripts.txt", ("id", "text"), ("id", "text")):
        speaker, book, _ = row["id"].split("_")
        file = folder / "audio" / speaker / book / f"{row['id']}.flac"
        audio = file if file.is_file() else file.with_suffix(".opus")
        utterances.append(Utterance(row["id"], str(audio), row["text"], lang=lang, speaker=speaker))
    return _source(spec, utterances)


def _aishell(spec: str, name: str, split: str) -> Source:
    folder = _folder(spec, name)
    texts = folder / _AISHELL_TEXTS
    if not texts.is_file():
        raise _missing(spec, texts)
    lines = (line.split() for line in texts.read_text(encoding="utf-8").splitlines())
    found = {line[0]: "".join(line[1:]) for line in lines if line}  # the blanks are not of the script
    audio = sorted(_folder(spec, str(folder / "wav" / split)).glob("*/*.wav"))
    utterances = [
        Utterance(file.stem, str(file), found[file.stem], lang="zh", speaker=file.parent.name)
        for file in audio
        if file.stem in found
    ]
    if left_out := len(audio) - len(utterances):
        print(f"note: {spec}: {left_out} of {len(audio)} recordings have no line in {texts.name} and are left out")
    return _source(spec, utterances)


_OPEN: dict[str, Callable[..., Source]] = {
    "commonvoice": _common_voice,
    "fleurs": _fleurs,
    "mls": _mls,
    "aishell": _aishell,
    "covost": _covost,
}


def iso(code: str) -> str:
    """The language of a code with a script or a region: de_de -> de, zh-CN and cmn_hans_cn -> zh."""
    language = code.replace("-", "_").partition("_")[0].lower()
    return "zh" if language == "cmn" else language


def _hub(
    spec: str,
    name: str,
    config: str,
    split: str,
    columns: dict[str, str],
    told: dict[str, str],
    revision: str | None = None,
) -> Source:
    """A set of the hub, with `columns` under the names that a manifest has, and what is `told` of all rows."""
    from rwkv_speech.data.huggingface import HuggingFaceSource, load_hub

    rows = load_hub(name, config, split, spec, revision)
    lacking = [column for column in columns if column not in rows.column_names]
    if lacking:
        raise UserError(f"data source {spec!r}: {name} has no column {lacking[0]!r}; found {rows.column_names}")
    others = {"id", "lang", "task", "text", "transcript", *columns.values(), *told} - set(columns)
    rows = rows.remove_columns([column for column in rows.column_names if column in others])
    rows = rows.rename_columns(columns)
    for column, value in told.items():
        rows = rows.add_column(column, [value] * len(rows))
    return HuggingFaceSource(rows, Columns(), label=spec)


def _folder(spec: str, name: str) -> Path:
    folder = Path(name).absolute()
    if not folder.is_dir():
        raise _missing(spec, folder)
    return folder


def _missing(spec: str, path: Path) -> UserError:
    kind = spec.partition(":")[0]
    form, what = next((form, what) for form, what in DATA_FORMS.items() if form.startswith(f"{kind}:"))
    return UserError(f"data source {spec!r}: found no {path}; expected {form}, {what}: unpack the whole of it there")


def _source(spec: str, utterances: Sequence[Utterance]) -> FileSource:
    """The utterances; raises UserError that lists the recordings that are not there."""
    if not utterances:
        raise UserError(f"data source {spec!r}: holds no utterance; expected some: is it the right split?")
    problems = [no_audio(x.audio or "") for x in utterances if not os.path.isfile(x.audio or "")]
    if problems:
        head = f"data source {spec}: {len(problems)} of {len(utterances)} recordings are missing"
        raise UserError(summary(head, problems))
    return FileSource(utterances)


def _table(
    spec: str, path: Path, wanted: Sequence[str], header: Sequence[str] | None = None
) -> Iterator[dict[str, str]]:
    """The rows of a table with tabs, which quotes nothing; the `header` of one that has none."""
    if not path.is_file():
        raise _missing(spec, path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, header, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")
        if lacking := [name for name in wanted if name not in (rows.fieldnames or ())]:
            raise UserError(f"{path}: has no column {lacking[0]!r}; found {', '.join(rows.fieldnames or ())}")
        yield from rows
