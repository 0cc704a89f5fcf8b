"""The middle of the road from audio to text: pieces are decoded, judged, decoded again, and become segments.

recording -> pieces (long_audio) -> engine -> again at a higher temperature? (guards) in two? (coverage) -> segments
"""

# S samples

import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_speech import tasks
from rwkv_speech.audio import SAMPLE_RATE, AudioError
from rwkv_speech.batch import BadSample, Sample
from rwkv_speech.decoding.engine import Done, Engine, Request
from rwkv_speech.decoding.keywords import Keywords
from rwkv_speech.decoding.long_audio import Piece, Segmenter, SpeechBounds
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.piece_text import PieceText
from rwkv_speech.decoding.results import Segment, Transcript, whole_text
from rwkv_speech.errors import UserError
from rwkv_speech.models import speech_lm
from rwkv_speech.text import join_texts

# Seconds of the pieces for weights that do not say what they were trained on.
_LONGEST_IF_UNKNOWN = 30.0
_LENGTHS_BEYOND = 1.2  # times the longest of training are decoded as well as these
# Seconds of a question, which is one piece.
_LONGEST_ANSWERED = 60.0
# So many pieces are read ahead for each slot, so that audio of like length is decoded together.
_AHEAD = 4
# A text is no context for the next piece above this temperature, and its last tokens are enough, as in whisper.
_CONTEXT_TEMPERATURE, _CONTEXT_TOKENS = 0.5, 223


@dataclass(frozen=True)
class Recording:
    """What is to be transcribed: `blocks()` gives its samples at 16 kHz, or AudioError; `key` is the caller's.

    `prompt_ids` are read before the audio. `options` stand in place of the transcriber's, but for how audio is cut and
    how tokens are chosen, which all have in common; `keywords` are those to expect, `bounds` what is taken for speech.
    """

    key: Any
    name: str
    blocks: Callable[[], Iterable[Tensor]]
    task: str
    language: str | None = None
    normalised: bool = False
    prompt_ids: tuple[int, ...] = ()
    options: Options | None = None
    keywords: Keywords | None = None
    bounds: SpeechBounds | None = None


@dataclass(eq=False)
class _Work:
    """A recording on its way."""

    recording: Recording
    options: Options
    waiting: deque[Piece] = field(default_factory=deque)  # for the text of the one before, their context
    in_flight: list[int] = field(default_factory=list)  # where each piece that is being decoded starts
    segments: list[Segment] = field(default_factory=list)
    heard: dict[int, str] = field(default_factory=dict)  # what the CTC head alone hears, by where a piece starts
    written: dict[int, str] = field(default_factory=dict)  # the same of what a task that transcribes first wrote down
    samples: int = 0
    removed: int = 0
    is_read: bool = False
    error: str = ""
    context: str = ""
    language: str | None = None

    @property
    def has_ended(self) -> bool:
        return bool(self.error) or (self.is_read and not self.waiting and not self.in_flight)


def _blocks(recording: Recording) -> Iterator[Tensor]:
    """Whose errors come when it is read."""
    yield from recording.blocks()


class _Reading(NamedTuple):
    """A recording that is being read and cut into pieces."""

    work: _Work
    blocks: Iterator[Tensor]
    segmenter: Segmenter


@dataclass(frozen=True)
class _Place:
    """Where a request belongs: its recording, its piece, and which of the temperatures it is decoded with."""

    work: _Work
    piece: Piece
    attempt: int
    halved: "_Halved | None" = None
    finds_language: bool = False


@dataclass(frozen=True)
class _Halved:
    """A piece whose text seems to lack words, so that it is decoded in two, too."""

    whole: Done
    part_of: "_Halved | None"
    parts: list[list[Done]] = field(default_factory=list)  # what is to be kept of each


class Transcriber:
    """Takes recordings to transcripts through an engine of so many slots, which several of them share.

    The `engine` takes other requests, too, whose keys are the caller's; what is found of these is in `answered`.
    One that `is_fair` sorts nothing by length and reads little ahead: long recordings do not keep short ones waiting.
    """

    def __init__(self, model: speech_lm.SpeechLM, options: Options, slots: int, is_fair: bool = False) -> None:
        self._model, self._options = model, options
        self.engine, self._pieces = Engine(model, options, slots, int(is_fair)), PieceText(model)
        self._ahead = slots if is_fair else _AHEAD * slots
        known = model.trained_on
        longest = _LENGTHS_BEYOND * known.longest_seconds if known else 0.0  # 0 of weights that have read only
        self._max_seconds = options.max_segment or longest or _LONGEST_IF_UNKNOWN
        self.answered = deque[Done]()
        self._open = list[_Work]()
        self._reading = deque[_Reading]()
        if options.word_timestamps and model.ctc is None:
            raise UserError(
                "--word_timestamps 1: the weights have no CTC head, which finds the words; train one with --ctc 1"
            )
        if options.finds_language and tasks.LANGUAGE not in model.initial_states:
            raise UserError(
                f"--language: found auto, but the weights have no state {tasks.LANGUAGE!r}, which finds languages; "
                "expected the code of one, as fr, or train that task, too"
            )

    @torch.no_grad()
    def run(self, recordings: Iterable[Recording]) -> Iterator[tuple[Recording, Transcript | BadSample]]:
        """Each recording with its transcript, or what is wrong with it, as they are done; read as they are needed."""
        source, is_exhausted = iter(recordings), False
        while self._open or not is_exhausted:
            # Not one read ahead beyond what keeps the slots full: hours of audio do not fit into memory.
            while self._has_room and (self._reading or not is_exhausted):
                if self._reading:
                    self._read_on()
                elif (recording := next(source, None)) is not None:
                    self.submit(recording)
                else:
                    is_exhausted = True
            yield from self.poll()

    def submit(self, recording: Recording) -> None:
        """Have a recording transcribed by the next calls of `poll`."""
        work = self._begun(recording)
        self._open.append(work)
        segmenter = self.segmenter(recording.task, recording.bounds)
        self._reading.append(_Reading(work, _blocks(recording), segmenter))

    @torch.no_grad()
    def poll(self, seconds: float = math.inf) -> list[tuple[Recording, Transcript | BadSample]]:
        """One round: a block of each recording is read, texts go on by a token; what has ended.

        Once the round has taken so many seconds, one block and one piece are read at most.
        """
        end = time.monotonic() + seconds
        for number in range(len(self._reading)):
            if self._has_room and (number == 0 or time.monotonic() < end):
                self._read_on()
        for done in self.engine.poll(max(0.0, end - time.monotonic())):
            if isinstance(done.request.key, _Place):
                self._take(done)
            else:
                self.answered.append(done)
        ended = [work for work in self._open if work.has_ended]
        for work in ended:
            self._open.remove(work)
        return [(work.recording, self._result(work)) for work in ended]

    def settled(self, key: Any) -> list[Segment]:
        """The segments of a recording on its way that nothing can change any more, in order: all of its beginning."""
        found = list[Segment]()
        for work in (work for work in self._open if work.recording.key == key):
            first = min([*work.in_flight, *(piece.start for piece in work.waiting)], default=math.inf)
            found += (x for x in work.segments if round(x.start * SAMPLE_RATE) < first)
        return sorted(found, key=lambda segment: segment.start)

    def cancel(self, key: Any) -> None:
        """Give up the recording, or other request, of this key, if it is on its way; nothing comes of it."""
        dropped = [work for work in self._open if work.recording.key == key]
        self._open = [work for work in self._open if work not in dropped]
        self._reading = deque(reading for reading in self._reading if reading.work not in dropped)
        works = {id(work) for work in dropped}
        self.engine.cancel(lambda request: request.key is key or id(getattr(request.key, "work", None)) in works)

    def segmenter(self, task: str = "", bounds: SpeechBounds | None = None) -> Segmenter:
        """What cuts a recording into pieces, in pauses; with these `bounds`, or by what the task needs.

        What is answered is one piece, however long its pauses are, as it was in training, up to a turn's most seconds.
        """
        is_answered = bool(task) and bounds is None and tasks.task_named(task).is_answer
        longest = self._max_seconds
        if is_answered and not self._options.max_segment:
            longest = max(longest, _LONGEST_ANSWERED)
        bounds = bounds or (SpeechBounds(pause=sys.maxsize) if is_answered else SpeechBounds())
        return Segmenter(longest, self._options.vad, self._pieces.word_gaps, bounds)

    def _begun(self, recording: Recording) -> _Work:
        """A recording whose language is known, or is to be found in its first piece."""
        options = recording.options or self._options
        given = recording.language or options.given_language
        return _Work(recording, options, language=None if options.finds_language else given)

    def live(
        self, task: str, options: Options | None = None, keywords: Keywords | None = None
    ) -> Callable[[Piece], list[Segment]]:
        """A function that takes the pieces of a recording, one after another, to their segments; as a Recording's."""
        work = self._begun(Recording(None, "stream", list, task, options=options, keywords=keywords))

        @torch.no_grad()
        def segments_of(piece: Piece) -> list[Segment]:
            self._add(work, [piece])
            while work.waiting or work.in_flight:
                for done in self.engine.poll():
                    self._take(done)
            segments, work.segments, work.heard, work.written = work.segments, [], {}, {}
            return sorted(segments, key=lambda segment: segment.start)

        return segments_of

    @property
    def _has_room(self) -> bool:
        return self.engine.num_unfinished < self._ahead

    def _read_on(self) -> None:
        """Submit the pieces in the next block of the recording that has waited longest."""
        reading = self._reading.popleft()
        work, segmenter = reading.work, reading.segmenter
        try:
            block = next(reading.blocks, None)
        except AudioError as error:
            work.error = str(error)
            return
        if block is None:
            self._add(work, segmenter.finish())
            work.removed, work.is_read = segmenter.removed_samples, True
        else:
            work.samples += len(block)
            self._add(work, segmenter.push(block))
            self._reading.append(reading)

    def _add(self, work: _Work, pieces: Iterable[Piece]) -> None:
        work.waiting.extend(pieces)
        finds_language = work.options.finds_language and work.language is None
        if finds_language and work.waiting and not work.in_flight:
            self._request(_Place(work, work.waiting[0], 0, finds_language=True), tasks.LANGUAGE)
        one_by_one = finds_language or work.options.condition_on_previous_text
        while work.waiting and not (one_by_one and work.in_flight):
            self._submit(work, work.waiting.popleft())

    def _submit(self, work: _Work, piece: Piece, attempt: int = 0, halved: _Halved | None = None) -> None:
        task = work.recording.task
        if work.language and tasks.base_of(task) == tasks.DEFAULT and work.options.language:
            spoken = tasks.state_name(tasks.DEFAULT, work.language, by_lang=True)
            task = spoken if spoken in self._model.initial_states else task
        self._request(_Place(work, piece, attempt, halved), task)

    def _request(self, place: _Place, task: str) -> None:
        work, piece, attempt = place.work, place.piece, place.attempt
        recording, o, seconds = work.recording, work.options, len(piece.waveform) / SAMPLE_RATE
        sample = Sample(
            recording.name, piece.waveform, "", [], seconds, piece.start, task, work.language, recording.normalised,
            prompt_ids=recording.prompt_ids,
        )  # fmt: skip
        request = Request(
            key=place,
            sample=sample,
            limit=o.token_limit(seconds),
            temperature=o.temperatures[attempt],
            before=join_texts([o.initial_prompt, work.context]) if work.context else o.initial_prompt,
            keywords=recording.keywords,
        )
        work.in_flight.append(piece.start)
        self.engine.submit(request)

    def _take(self, done: Done) -> None:
        """A decoded piece is kept, unless it is to be decoded again: at a higher temperature, or in two."""
        place: _Place = done.request.key
        place.work.in_flight.remove(place.piece.start)
        if place.finds_language:
            place.work.language = self._model.tokenizer.decode(done.hypotheses[0].ids).strip()
            return self._add(place.work, ())
        o, can_try = place.work.options, place.attempt + 1 < len(place.work.options.temperatures)
        if can_try and self._pieces.needs_fallback(done, o):
            return self._submit(place.work, place.piece, place.attempt + 1, place.halved)
        if halves := self._pieces.halves(done, place.piece, o):
            halved = _Halved(done, place.halved)
            for half in halves:
                self._submit(place.work, half, 0, halved)
        else:
            for kept in self._chosen([done], place):
                self._keep(kept)
        self._add(place.work, ())

    def _keep(self, done: Done) -> None:
        """The text of a piece becomes a segment, unless the piece holds no speech."""
        work, piece = done.request.key.work, done.request.key.piece
        if done.ctc is not None and self._model.ctc is not None:
            work.heard[piece.start] = self._model.ctc.spec.text(done.ctc)
        text = self._pieces.text(done, work.options)
        if (written := done.hypotheses[0].heard) is not None:
            work.written[piece.start] = self._model.tokenizer.decode(written)
        if text.strip():
            work.segments.append(self._pieces.segment(done, text, piece, work.options))
        if work.options.condition_on_previous_text:
            hot = done.request.temperature > _CONTEXT_TEMPERATURE
            work.context = "" if hot else self._recent(join_texts([work.context, text]))

    def _chosen(self, found: list[Done], place: _Place) -> list[Done]:
        """What is kept once both parts are known: they or the whole, whichever texts are nearer to what is heard."""
        halved, options = place.halved, place.work.options
        while halved is not None:
            halved.parts.append(found)
            if len(halved.parts) < 2:
                return []
            parts = sorted(itertools.chain(*halved.parts), key=lambda part: part.request.key.piece.start)
            whole = [halved.whole]
            is_better = self._pieces.num_errors(parts, options) < self._pieces.num_errors(whole, options)
            found, halved = parts if is_better else whole, halved.part_of
        return found

    def _recent(self, text: str) -> str:
        """The end of a text that is long, so that the context of a piece costs no more in the hundredth hour."""
        tokenizer = self._model.tokenizer
        return tokenizer.decode(tokenizer.encode(text)[-_CONTEXT_TOKENS:]).lstrip("\ufffd")

    def _result(self, work: _Work) -> Transcript | BadSample:
        if work.error:
            return BadSample(-1, work.recording.name, work.error)
        ordered = sorted(work.segments, key=lambda segment: segment.start)
        segments = [replace(segment, id=number) for number, segment in enumerate(ordered)]
        return Transcript(
            text=whole_text(work.recording.task, segments),
            segments=segments,
            seconds=work.samples / SAMPLE_RATE,
            task=work.recording.task,
            language=work.language or None,
            removed_seconds=work.removed / SAMPLE_RATE,
            ctc=join_texts(work.heard[start] for start in sorted(work.heard)) if self._model.ctc else None,
            heard=join_texts(work.written[start] for start in sorted(work.written)) if work.written else None,
        )
