"""What decoding finds: a transcript of each utterance, and the one kind of row of all result files."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from rwkv_speech import tasks
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_text_atomically
from rwkv_speech.text import join_texts


@dataclass(frozen=True)
class Word:
    """A word with the blank before it, if there is one, its seconds in the recording and how sure it is, 0 to 1."""

    word: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class Segment:
    """A piece of a recording that was decoded at once: `start` and `end` in its seconds, the text and its `tokens`.

    The names are those of whisper's JSON. `avg_logprob` is the mean log-probability of the tokens and the end of text,
    `cut` says whether the text was cut off at its limit; `words` is None where no times were asked for, and `logprobs`,
    those of the tokens and the end, where they are not known.
    """

    id: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    cut: bool = False
    words: list[Word] | None = None
    logprobs: tuple[float, ...] | None = None


TimedT = TypeVar("TimedT", Word, Segment)


class Vote:
    """Of a task of classes, the text that is found in most seconds of a recording."""

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        self._seconds = defaultdict[str, float](float)
        for segment in segments:
            self.add(segment)

    def add(self, segment: Segment) -> None:
        """Count a piece of it."""
        self._seconds[segment.text.strip()] += segment.end - segment.start

    @property
    def text(self) -> str:
        """The text that leads; "" of nothing."""
        return max(self._seconds, key=self._seconds.__getitem__, default="")


def whole_text(task: str, segments: Sequence[Segment]) -> str:
    """What the pieces of a recording say together; of a task of classes they vote."""
    if tasks.task_named(task).is_class:
        return Vote(segments).text
    return join_texts(segment.text for segment in segments)


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording of so many `seconds`, of which `removed_seconds` held no speech.

    `ctc` is what the CTC head alone hears, None where the model has none; `heard` what the model wrote down as heard
    before the text, None of a task that does not transcribe first.
    """

    text: str
    segments: list[Segment]
    seconds: float
    task: str
    language: str | None = None
    removed_seconds: float = 0.0
    ctc: str | None = None
    heard: str | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens of all segments."""
        return [token for segment in self.segments for token in segment.tokens]

    @property
    def words(self) -> list[Word] | None:
        """The words of all segments, None where none were asked for."""
        known = [segment.words for segment in self.segments]
        return None if None in known else [word for words in known for word in words or []]

    @property
    def cut(self) -> bool:
        """Whether a segment's text was cut off at its limit."""
        return any(segment.cut for segment in self.segments)


def shifted(transcript: Transcript, seconds: float) -> Transcript:
    """The same, of a part that begins so many seconds into its recording."""

    def later(found: TimedT) -> TimedT:
        return replace(found, start=found.start + seconds, end=found.end + seconds)

    segments = [
        replace(later(x), words=None if x.words is None else list(map(later, x.words))) for x in transcript.segments
    ]
    return replace(transcript, segments=segments) if seconds else transcript


@dataclass(frozen=True)
class Row:
    """An utterance of a data set, its reference and its hypothesis; `index` is its place in the set.

    `ref` is the first of the `answers`, if there are any, which are all right; `source_text` is what is spoken, in
    `source_lang`, where that is not `ref`; `prompt` was read before the audio, and `turn` is its number in its
    conversation, from 1. What is not known is None: who speaks, the file with the audio, in which it starts at `offset`
    seconds, what the CTC head alone makes of it, the words of the hypothesis, each with its probability, `found_lang`,
    the language that was heard, and what a task that transcribes first `heard`.
    """

    id: str
    index: int
    ref: str
    hyp: str
    lang: str | None
    task: str
    seconds: float
    cut: bool
    speaker: str | None = None
    audio: str | None = None
    offset: float = 0.0
    ctc: str | None = None
    words: list[tuple[str, float]] | None = None
    turn: int | None = None
    found_lang: str | None = None
    source_lang: str | None = None
    source_text: str | None = None
    answers: tuple[str, ...] = ()
    prompt: str = ""
    heard: str | None = None

    @property
    def place(self) -> tuple[int, int]:
        """What tells it from all others of the set, and orders them."""
        return self.index, self.turn or 0


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines, atomically, in the order of the set."""
    ordered = sorted(rows, key=lambda row: row.place)
    # Readable letters; half a surrogate pair, which a file's name may hold, stays JSON's escape.
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in ordered)
    write_text_atomically(path, lines.encode("utf-8", "backslashreplace").decode("utf-8"))


def read_rows(path: Path) -> list[Row]:
    """The rows that `write_rows` wrote; none without the file.

    Raises UserError naming file and line for anything but such a row.
    """
    names, rows = [field.name for field in fields(Row)], list[Row]()
    required = [field.name for field in fields(Row) if field.default is MISSING]
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), start=1):
        try:
            found = json.loads(line)
            row = Row(**{name: found[name] for name in names if name in found})
            row = replace(row, answers=tuple(row.answers))
            if not all(isinstance(text, str) for text in (row.id, row.ref, row.hyp)):
                raise TypeError("a text is none")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number}: found {line[:80].decode(errors='replace')!r}, expected a JSON object with "
                f"{', '.join(required)}; delete the line or the file"
            ) from error
        rows.append(row)
    return rows
