"""Transcripts as files: the contents that whisper's writers make, which no text can break."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from rwkv_speech.decoding.results import Segment, Transcript, Word
from rwkv_speech.files import write_text_atomically

# whisper's: a new subtitle begins after such a pause between two words, where lines are counted.
_LONG_PAUSE = 3.0
_NO_LIMIT = 1000
# What ends a line for some reader, or is no text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_ARROW = re.compile("-{2,}>")


@dataclass(frozen=True)
class Layout:
    """How subtitles are laid out by words: characters of a line, lines of a subtitle, words of a subtitle."""

    max_line_width: int | None = None
    max_line_count: int | None = None
    max_words_per_line: int | None = None


def write_transcript(
    transcript: Transcript, path: Path, formats: Sequence[str], layout: Layout = Layout()
) -> list[Path]:
    """Write `path` with each format's ending, each file whole or not at all, in place of what was there."""
    files = _files(path, formats)
    for form, file in zip(formats, files, strict=True):
        write_text_atomically(file, render(transcript, form, layout))
    return files


def exist(path: Path, formats: Sequence[str]) -> bool:
    """Whether all files that `write_transcript` would write are there."""
    return all(file.is_file() for file in _files(path, formats))


def _files(path: Path, formats: Sequence[str]) -> list[Path]:
    return [path.with_name(f"{path.name}.{form}") for form in formats]


def render(transcript: Transcript, form: str, layout: Layout = Layout()) -> str:
    """The content of a file of one of config.OUTPUT_FORMATS."""
    return _RENDERERS[form](transcript, layout)


def clock(seconds: float, mark: str = ".", always_hours: bool = False) -> str:
    """Seconds as 00:01.500, from an hour on 01:00:01.500."""
    whole, milliseconds = divmod(_milliseconds(seconds), 1000)
    hours, minutes = divmod(whole // 60, 60)
    front = f"{hours:02d}:" if hours or always_hours else ""
    return f"{front}{minutes:02d}:{whole % 60:02d}{mark}{milliseconds:03d}"


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _txt(transcript: Transcript, layout: Layout) -> str:
    return "".join(f"{one_line(segment.text)}\n" for segment in transcript.segments)


def _tsv(transcript: Transcript, layout: Layout) -> str:
    rows = [
        f"{_milliseconds(segment.start)}\t{_milliseconds(segment.end)}\t{one_line(segment.text)}\n"
        for segment in transcript.segments
    ]
    return "start\tend\ttext\n" + "".join(rows)


def _srt(transcript: Transcript, layout: Layout) -> str:
    cues = enumerate(_cues(transcript, layout), start=1)
    return "".join(
        f"{number}\n{clock(start, ',', True)} --> {clock(end, ',', True)}\n{text}\n\n"
        for number, (start, end, text) in cues
    )


def _vtt(transcript: Transcript, layout: Layout) -> str:
    # A "<" would begin a tag, an "&" a character by its name.
    cues = (
        f"{clock(start)} --> {clock(end)}\n{escape(text, quote=False)}\n\n"
        for start, end, text in _cues(transcript, layout)
    )
    return "WEBVTT\n\n" + "".join(cues)


def _json(transcript: Transcript, layout: Layout) -> str:
    """whisper's fields; `seek` is where the segment begins in its frames of 10 ms, `words` there if times were made."""
    content = asdict(transcript)
    for segment in content["segments"]:
        segment["seek"] = int(100 * segment["start"])
        del segment["logprobs"]
        if segment["words"] is None:
            del segment["words"]
    content["duration"] = content.pop("seconds")
    return json.dumps(content, ensure_ascii=False) + "\n"


_RENDERERS: dict[str, Callable[[Transcript, Layout], str]] = {
    "txt": _txt, "srt": _srt, "vtt": _vtt, "tsv": _tsv, "json": _json,
}  # fmt: skip


def one_line(text: str) -> str:
    """A text without line breaks and what is no text."""
    return _CONTROL.sub(" ", text).strip()


def _cues(transcript: Transcript, layout: Layout) -> Iterator[tuple[float, float, str]]:
    """Start and end in seconds, and lines, of each subtitle: none is empty or of no length."""
    for words in _subtitles(transcript.segments, layout):
        start, end = _milliseconds(words[0].start), _milliseconds(words[-1].end)
        yield start / 1000, max(end, start + 1) / 1000, _ARROW.sub("->", "".join(word.word for word in words))


def _subtitles(segments: Iterable[Segment], layout: Layout) -> Iterator[list[Word]]:
    """The words of each subtitle; a new line is in the first word that stands on it.

    A segment begins a subtitle, and so does each of its words after `max_words_per_line`, unless lines are both
    measured and counted: then only full lines, and long pauses, end one.
    """
    by_lines = layout.max_line_width is not None and layout.max_line_count is not None
    most_words, width = layout.max_words_per_line or _NO_LIMIT, layout.max_line_width or _NO_LIMIT
    words, length, lines, last = list[Word](), 0, 1, 0.0
    for segment in segments:
        for number, word in enumerate(_words(segment)):
            pause = by_lines and word.start - last > _LONG_PAUSE
            begins = not by_lines and number % most_words == 0
            last = word.start
            if words and not begins and not pause and length + len(word.word) <= width:
                length += len(word.word)
                words.append(word)
                continue
            text = word.word.strip()
            if words and (begins or (by_lines and (pause or lines >= (layout.max_line_count or 0)))):
                yield words
                words, lines = [], 1
            elif words:
                lines, text = lines + 1, f"\n{text}"
            length = len(word.word.strip())
            words.append(Word(text, word.start, word.end, word.probability))
    if words:
        yield words


def _words(segment: Segment) -> list[Word]:
    """A segment's words that hold text; all of it as one where its words are not known."""
    words = segment.words or [Word(segment.text, segment.start, segment.end, 1.0)]
    clean = (Word(_CONTROL.sub(" ", x.word), x.start, x.end, x.probability) for x in words)
    return [word for word in clean if word.word.strip()]
