"""Manifests of JSON lines: what a line may hold, and reading a whole file that fits into memory."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rwkv_speech.data.source import Utterance
from rwkv_speech.errors import UserError

JSON_SUFFIXES = frozenset({".jsonl", ".json"})
TABLE_SUFFIXES = frozenset({".parquet", ".arrow"})
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ANSWER = "answer"
# Other corpora have keys of these names that hold other things: what is no string there is left out.
LENIENT = ("prompt", "transcript")
TURNS, _INPUT = "turns", "input"
STRINGS = ("audio_filepath", "text", "lang", "task", "id", "speaker", "source_lang", "source_text", TURNS, *LENIENT)
SECONDS = ("duration", "offset")
TEXTS = ("text", "source_lang", "source_text", ANSWER, *LENIENT)
# One of each of these; the first is the usual one.
REQUIRED = (("audio_filepath", "source_text", "transcript"), ("text", ANSWER))
_MAX_ERRORS_SHOWN = 20


def read_manifest(path: str | Path) -> list[Utterance]:
    """Read a manifest of JSON lines.

    Keys: `audio_filepath` (relative to the manifest), `text`, and optionally `duration`, `offset` (s), `lang`, `task`,
    `id`, `speaker`, which may be a number, `source_lang`, and `source_text` or `transcript`; others are ignored. In
    place of `text` there may be an `answer`, a string or several in a list, and beside it a `prompt`. What has a
    `source_text` needs no audio: then that is read. An id that is not given is the path, with `@offset` for a segment;
    rows of the same recording share it. A conversation has in place of audio and text its `turns`, a list of objects
    with audio as above or an `input` of text, and text or answer.

    Raises UserError that lists every bad line with its number.
    """
    manifest = Path(path)
    folder = manifest.parent.absolute()
    content = _content(manifest)
    problems: dict[int, str] = {}
    rows: list[dict[str, Any]] = []
    line_of_id: dict[str, int] = {}
    for number, row, reasons in parse_lines(content, 1):
        given = row.get("id")
        recordings = [x.get("audio_filepath") for x in (row, *([] if reasons else turns_of(row)))]
        for audio in (os.path.join(folder, name) for name in recordings if isinstance(name, str)):
            if not os.path.isfile(audio):
                reasons.append(no_audio(audio))
        if isinstance(given, str) and line_of_id.setdefault(given, number) != number:
            reasons.append(repeated_id(given, f"line {line_of_id[given]}"))
        if reasons:
            problems[number] = "; ".join(reasons)
        rows.append(row)
    check(manifest, problems, len(rows))
    if note := of_text(sum(not {"audio_filepath", TURNS} & set(row) for row in rows), len(rows)):
        print(f"note: {manifest}: {note}")
    return [to_utterance(row, folder) for row in rows]


def read_lines(path: str | Path, required: Sequence[Sequence[str]] = REQUIRED) -> list[dict[str, Any]]:
    """The rows of a manifest as they are written, for a copy of it; raises UserError that lists every bad line."""
    content = _content(manifest := Path(path))
    faults = {number: "; ".join(reasons) for number, _, reasons in parse_lines(content, 1, required) if reasons}
    rows = [line for line in content.split(b"\n") if line.strip()]
    check(manifest, faults, len(rows))
    return [json.loads(row) for row in rows]


def _content(manifest: Path) -> bytes:
    try:
        return manifest.read_bytes().removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        raise unreadable(manifest, error) from error


def parse_lines(
    content: bytes, first: int, required: Sequence[Sequence[str]] = REQUIRED
) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
    """Give the number, from `first`, of each line that is not empty, its row without null values, and its faults."""
    for number, line in enumerate(content.split(b"\n"), start=first):
        if line.strip():
            yield number, *_parse_line(line, required)


def check(manifest: Path, problems: dict[int, str], count: int, word: str = "line", complete: bool = True) -> None:
    """Raise UserError if there are problems, by line, or no rows; not `complete`: reading stopped after `count`."""
    listed = [f"{word} {number}: {problems[number]}" for number in sorted(problems)]
    if listed:
        of = "" if complete else "the first "
        raise UserError(summary(f"manifest {manifest}: {len(listed)} of {of}{count} {word}s are bad", listed))
    if not count:
        raise UserError(f"manifest {manifest}: holds no utterance; expected one JSON object per line")


def to_utterance(row: dict[str, Any], folder: Path) -> Utterance:
    """Make an utterance of a sound row; `folder` is that of the manifest."""
    if TURNS in row:
        return _conversation(row, folder)
    name, offset, texts = row.get("audio_filepath"), float(row.get("offset", 0.0)), texts_of(row)
    return Utterance(
        id=row.get("id", f"{name}@{offset:g}" if offset else name or f"{texts['source_text']}"),
        audio=None if name is None else os.path.join(folder, name),
        duration=float(row["duration"]) if "duration" in row else None,
        offset=offset,
        lang=row.get("lang"),
        task=row.get("task"),
        speaker=row.get("speaker"),
        input_text=texts["source_text"] if name is None else None,
        **texts,
    )


def _conversation(row: dict[str, Any], folder: Path) -> Utterance:
    """The first turn, with the others; what the line says of all of them, each has."""
    shared: dict[str, Any] = {key: row[key] for key in ("lang", "task", "speaker", "source_lang") if key in row}
    turns = ({**shared, **turn} for turn in turns_of(row))
    first, *others = (_typed(turn) if _INPUT in turn else to_utterance(turn, folder) for turn in turns)
    return replace(first, id=row.get("id", first.id), then=tuple(others))


def _typed(turn: dict[str, Any]) -> Utterance:
    """A turn that is read, not heard."""
    known: dict[str, Any] = {key: turn.get(key) for key in ("lang", "task", "speaker")}
    return Utterance(turn[_INPUT], None, input_text=turn[_INPUT], **known, **texts_of(turn))


def turns_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a sound row; none if it is no conversation."""
    return [tidied(turn) for turn in json.loads(row.get(TURNS, "[]"))]


def texts_of(row: dict[str, Any]) -> dict[str, Any]:
    """An utterance's fields that hold its texts: with answers, `text` is what is spoken unless another key says it."""
    spoken, answers = row.get("source_text", row.get("transcript")), tuple(row.get(ANSWER, ()))
    found = {"source_lang": row.get("source_lang"), "source_text": spoken}
    if not answers:
        return {**found, "text": row["text"]}
    if spoken is None:
        found["source_text"] = row.get("text")
    return {**found, "text": answers[0], "answers": answers, "prompt": row.get("prompt", "")}


def tidied(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose speaker is text, whose answers are a list, and whose turns are JSON.

    What else speakers and lenient keys hold is left out.
    """
    row = {key: value for key, value in row.items() if value is not None}
    for key in LENIENT:
        if not isinstance(row.get(key, ""), str):
            del row[key]
    speaker = row.get("speaker", "")
    if isinstance(speaker, int) and not isinstance(speaker, bool):
        row["speaker"] = str(speaker)
    elif not isinstance(speaker, str):
        del row["speaker"]
    if isinstance(row.get(ANSWER), str):
        row[ANSWER] = [row[ANSWER]]
    if not isinstance(row.get(TURNS, ""), str):  # in a table they are text
        row[TURNS] = json.dumps(row[TURNS], ensure_ascii=False)
    return row


def row_faults(row: dict[str, Any], required: Sequence[Sequence[str]] = REQUIRED) -> list[str]:
    """Say what is wrong with the values of a row; whether its audio exists is not looked at."""
    if TURNS in row:
        alone = f"has {TURNS!r}, but a conversation is no recording; expected lines of one recording each"
        return _conversation_faults(row) if required == REQUIRED else [alone]
    reasons = [f"lacks {keys[0]!r}" for keys in required if not set(keys) & set(row)]
    reasons += [_string_fault(key, row[key]) for key in STRINGS if key in row]
    reasons += [_seconds_fault(key, row[key]) for key in SECONDS if key in row]
    reasons += [_answer_fault(row[ANSWER])] if ANSWER in row else []
    return [reason for reason in reasons if reason]


def _conversation_faults(row: dict[str, Any]) -> list[str]:
    """Say what is wrong with a line that has turns."""
    reasons = list(filter(None, (_string_fault(key, row[key]) for key in STRINGS if key in row)))
    try:
        turns = json.loads(row[TURNS]) if not reasons else [{}]
    except (ValueError, RecursionError):
        turns = None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return [*reasons, f"{TURNS!r} is {row[TURNS]:.80}, expected a list of objects, not empty"]
    for number, turn in enumerate(map(tidied, turns) if not reasons else (), start=1):
        faults = row_faults(turn, REQUIRED[1:] if _INPUT in turn else REQUIRED)
        if _INPUT in turn:
            faults.append(_string_fault(_INPUT, turn[_INPUT]) or ("" if turn[_INPUT] else f"{_INPUT!r} is empty"))
            faults.append(f"has both {_INPUT!r} and 'audio_filepath'" if "audio_filepath" in turn else "")
        faults.append(f"has {TURNS!r} itself" if TURNS in turn else "")
        reasons += [f"turn {number}: {fault}" for fault in faults if fault]
    return reasons


def of_text(count: int, total: int) -> str:
    """Say that so many rows have no audio, "" for none."""
    return (
        f"{count:,} of {total:,} have no audio_filepath: their source_text is read in place of audio" if count else ""
    )


def no_audio(path: str) -> str:
    """Say that a row's audio is not there."""
    return f"no such audio file {path}"


def repeated_id(given: str, place: str) -> str:
    """Say that a row's id is that of an earlier one."""
    return f"id {given!r} is already that of {place}"


def summary(head: str, problems: list[str]) -> str:
    """A heading and the first of the problems."""
    shown = "".join(f"\n  {problem}" for problem in problems[:_MAX_ERRORS_SHOWN])
    rest = len(problems) - _MAX_ERRORS_SHOWN
    return f"{head}: mend or remove them:{shown}" + (f"\n  ... and {rest} more" if rest > 0 else "")


def unreadable(manifest: Path, error: OSError) -> UserError:
    """What to raise for a manifest that cannot be opened."""
    return UserError(f"manifest {manifest}: cannot be read ({error.strerror}); expected a file of JSON lines")


def _parse_line(line: bytes, required: Sequence[Sequence[str]]) -> tuple[dict[str, Any], list[str]]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}, ["is not UTF-8"]
    except (ValueError, RecursionError) as error:
        return {}, [f"is not JSON ({error})"]
    if not isinstance(row, dict):
        return {}, [f"is not a JSON object but {type(row).__name__}"]
    row = tidied(row)
    return row, row_faults(row, required)


def _string_fault(key: str, value: object) -> str:
    if not isinstance(value, str):
        return f"{key!r} is {value!r}, expected a string"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f"{key!r} holds a lone surrogate, expected valid Unicode"
    return ""


def _answer_fault(value: object) -> str:
    if not isinstance(value, list) or not value or any(_string_fault(ANSWER, answer) for answer in value):
        return f"{ANSWER!r} is {value!r}, expected a string of valid Unicode or a list of such strings, not empty"
    return ""


def _seconds_fault(key: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{key!r} is {value!r}, expected a number of seconds"
    # Comparisons, so that NaN and integers too large for a float fail as well.
    lowest_fits = value > 0 if key == "duration" else value >= 0
    if not (lowest_fits and value < 1e9):
        return f"{key!r} is {value!r}, expected {'above 0' if key == 'duration' else '0 or more'} and finite"
    return ""
