"""The middle of the road from audio to text: pieces are decoded, judged, decoded again, and become segments.

recording -> pieces (long_audio) -> engine -> again at a higher temperature? (guards) in two? (coverage) -> segments
"""

# S samples

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rwkv_speech import tasks
from rwkv_speech.audio import SAMPLE_RATE, AudioError
from rwkv_speech.batch import BadSample, Sample
from rwkv_speech.decoding import coverage, guards
from rwkv_speech.decoding.confidence import judge
from rwkv_speech.decoding.engine import Done, Engine, Request
from rwkv_speech.decoding.long_audio import Piece, Segmenter
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.reader import Reader
from rwkv_speech.decoding.results import Segment, Transcript
from rwkv_speech.decoding.timestamps import WordTimes
from rwkv_speech.errors import UserError
from rwkv_speech.models import speech_lm
from rwkv_speech.text import join_texts

# Seconds of the pieces for weights that do not say what they were trained on.
_LONGEST_IF_UNKNOWN = 30.0
_LENGTHS_BEYOND = 1.2  # times the longest of training are decoded as well as these
# So many pieces are read ahead for each slot, so that audio of like length is decoded together.
_AHEAD = 4
# A text is no context for the next piece above this temperature, and its last tokens are enough, as in whisper.
_CONTEXT_TEMPERATURE, _CONTEXT_TOKENS = 0.5, 223


@dataclass(frozen=True)
class Recording:
    """What is to be transcribed: `blocks()` gives its samples at 16 kHz, or AudioError; `key` is the caller's.

    `prompt_ids` are read before the audio.
    """

    key: Any
    name: str
    blocks: Callable[[], Iterable[Tensor]]
    task: str
    language: str | None = None
    normalised: bool = False
    prompt_ids: tuple[int, ...] = ()


@dataclass
class _Work:
    """A recording on its way."""

    recording: Recording
    waiting: deque[Piece] = field(default_factory=deque)  # for the text of the one before, their context
    in_flight: int = 0
    segments: list[Segment] = field(default_factory=list)
    heard: dict[int, str] = field(default_factory=dict)  # what the CTC head alone hears, by where a piece starts
    samples: int = 0
    removed: int = 0
    is_read: bool = False
    error: str = ""
    context: str = ""
    language: str | None = None

    @property
    def has_ended(self) -> bool:
        return bool(self.error) or (self.is_read and not self.waiting and not self.in_flight)


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
    """Takes recordings to transcripts through an engine of so many slots, which several of them share."""

    def __init__(self, model: speech_lm.SpeechLM, options: Options, slots: int) -> None:
        self._model, self._options = model, options
        self._engine, self._reader = Engine(model, options, slots), Reader(model)
        self._ahead = _AHEAD * slots
        known = model.trained_on
        longest = _LENGTHS_BEYOND * known.longest_seconds if known else 0.0  # 0 of weights that have read only
        self._max_seconds = options.max_segment or longest or _LONGEST_IF_UNKNOWN
        self._times = _word_times(model) if options.word_timestamps else None
        if options.finds_language and tasks.LANGUAGE not in model.initial_states:
            raise UserError(
                f"--language: found auto, but the weights have no state {tasks.LANGUAGE!r}, which finds languages; "
                "expected the code of one, as fr, or train that task, too"
            )

    @torch.no_grad()
    def run(self, recordings: Iterable[Recording]) -> Iterator[tuple[Recording, Transcript | BadSample]]:
        """Each recording with its transcript, or what is wrong with it, as they are done; read as they are needed."""
        open_works: list[_Work] = []
        reading = self._read(recordings, open_works)
        while True:
            # Not one read ahead beyond what keeps the slots full: hours of audio do not fit into memory.
            while self._engine.num_unfinished < self._ahead and next(reading, None) is not None:
                pass
            for done in self._engine.poll():
                self._take(done)
            for work in [work for work in open_works if work.has_ended]:
                open_works.remove(work)
                yield work.recording, self._result(work)
            if not open_works and next(reading, None) is None:
                return

    def segmenter(self) -> Segmenter:
        """What cuts a recording into pieces."""
        return Segmenter(self._max_seconds, self._options.vad, self._word_gaps)

    def _begun(self, recording: Recording) -> _Work:
        """A recording whose language is known, or is to be found in its first piece."""
        given = self._options.given_language
        return _Work(recording, language=None if self._options.finds_language else recording.language or given)

    def live(self, task: str) -> Callable[[Piece], list[Segment]]:
        """A function that takes the pieces of a recording, one after another, to their segments."""
        work = self._begun(Recording(None, "stream", list, task))

        @torch.no_grad()
        def segments_of(piece: Piece) -> list[Segment]:
            self._add(work, [piece])
            while work.waiting or work.in_flight:
                for done in self._engine.poll():
                    self._take(done)
            segments, work.segments, work.heard = work.segments, [], {}
            return sorted(segments, key=lambda segment: segment.start)

        return segments_of

    def _read(self, recordings: Iterable[Recording], open_works: list[_Work]) -> Iterator[bool]:
        """Submits pieces; stops after each block of audio."""
        for recording in recordings:
            work = self._begun(recording)
            open_works.append(work)
            segmenter = self.segmenter()
            try:
                for block in recording.blocks():
                    work.samples += len(block)
                    self._add(work, segmenter.push(block))
                    yield True
            except AudioError as error:
                work.error = str(error)
                continue
            self._add(work, segmenter.finish())
            work.removed, work.is_read = segmenter.removed_samples, True
            yield True

    def _add(self, work: _Work, pieces: Iterable[Piece]) -> None:
        work.waiting.extend(pieces)
        finds_language = self._options.finds_language and work.language is None
        if finds_language and work.waiting and not work.in_flight:
            self._request(_Place(work, work.waiting[0], 0, finds_language=True), tasks.LANGUAGE)
        one_by_one = finds_language or self._options.condition_on_previous_text
        while work.waiting and not (one_by_one and work.in_flight):
            self._submit(work, work.waiting.popleft())

    def _submit(self, work: _Work, piece: Piece, attempt: int = 0, halved: _Halved | None = None) -> None:
        task = work.recording.task
        if work.language and tasks.base_of(task) == tasks.DEFAULT and self._options.language:
            spoken = tasks.state_name(tasks.DEFAULT, work.language, by_lang=True)
            task = spoken if spoken in self._model.initial_states else task
        self._request(_Place(work, piece, attempt, halved), task)

    def _request(self, place: _Place, task: str) -> None:
        work, piece, attempt = place.work, place.piece, place.attempt
        recording, seconds = work.recording, len(piece.waveform) / SAMPLE_RATE
        sample = Sample(
            recording.name, piece.waveform, "", [], seconds, piece.start, task, work.language, recording.normalised,
            prompt_ids=recording.prompt_ids,
        )  # fmt: skip
        request = Request(
            key=place,
            sample=sample,
            limit=self._options.token_limit(seconds),
            temperature=self._options.temperatures[attempt],
            before=join_texts([self._options.initial_prompt, work.context]) if work.context else None,
        )
        work.in_flight += 1
        self._engine.submit(request)

    def _take(self, done: Done) -> None:
        """A decoded piece is kept, unless it is to be decoded again: at a higher temperature, or in two."""
        place: _Place = done.request.key
        place.work.in_flight -= 1
        if place.finds_language:
            place.work.language = self._model.tokenizer.decode(done.hypotheses[0].ids).strip()
            return self._add(place.work, ())
        silence, o = self._silence(done), self._options
        again = place.attempt + 1 < len(o.temperatures) and not guards.is_silence(silence, o)
        if again and guards.needs_fallback(done.hypotheses[0], self._text(done), silence, o):
            return self._submit(place.work, place.piece, place.attempt + 1, place.halved)
        if halves := self._halves(done):
            halved = _Halved(done, place.halved)
            for half in halves:
                self._submit(place.work, half, 0, halved)
        else:
            for kept in self._chosen([done], place.halved):
                self._keep(kept)
        self._add(place.work, ())

    def _keep(self, done: Done) -> None:
        """The text of a piece becomes a segment, unless the piece holds no speech."""
        work, piece, o = done.request.key.work, done.request.key.piece, self._options
        text, silence = self._text(done), self._silence(done)
        if done.ctc is not None and self._model.ctc is not None:
            work.heard[piece.start] = self._model.ctc.spec.text(done.ctc)
        if text.strip():
            work.segments.append(self._segment(done, text, silence))
        if o.condition_on_previous_text:
            hot = done.request.temperature > _CONTEXT_TEMPERATURE
            work.context = "" if hot else self._recent(join_texts([work.context, text]))

    def _says_what_is_heard(self, done: Done) -> bool:
        """Whether a piece's text is to be what the CTC head hears, not a translation, an answer or a sound's name."""
        return done.ctc is not None and tasks.base_of(done.request.sample.task) == tasks.DEFAULT

    def _silence(self, done: Done) -> float:
        is_known = self._says_what_is_heard(done)
        return guards.no_speech_prob(done.ctc, self._model.encoder.framing.frame_rate) if is_known else 0.0

    def _text(self, done: Done) -> str:
        """The text of a piece, none of silence, and none that is made up."""
        text, head, o = self._model.tokenizer.decode(done.hypotheses[0].ids), self._model.ctc, self._options
        if head is None or done.ctc is None or not self._says_what_is_heard(done):
            return text
        is_silence = guards.is_silence(self._silence(done), o)
        return "" if is_silence or guards.is_unheard(text, done.ctc, head.spec, o) else text

    def _halves(self, done: Done) -> tuple[Piece, Piece] | None:
        """A piece in two if its text is far from what the CTC head hears; but what is to be taken as it is, is."""
        head = self._model.ctc
        if head is None or done.ctc is None or not self._says_what_is_heard(done) or self._options.vad == "none":
            return None
        step = self._model.encoder.framing.samples_per_frame
        return coverage.halves(done.request.key.piece, done.ctc, head.spec.labels, self._text(done), step)

    def _chosen(self, found: list[Done], halved: _Halved | None) -> list[Done]:
        """What is kept once both parts are known: they or the whole, whichever texts are nearer to what is heard."""
        head = self._model.ctc
        while halved is not None and head is not None:
            halved.parts.append(found)
            if len(halved.parts) < 2:
                return []
            parts = sorted(itertools.chain(*halved.parts), key=lambda part: part.request.key.piece.start)
            whole, errors = [halved.whole], list[int]()
            for texts in (parts, whole):
                heard = [(x.ctc, head.spec.labels, self._text(x)) for x in texts if x.ctc is not None]
                errors.append(sum(itertools.starmap(coverage.num_errors, heard)))
            found, halved = parts if errors[0] < errors[1] else whole, halved.part_of
        return found

    def _word_gaps(self, waveform: Tensor) -> list[int]:
        """Samples between two words of (S,), as far as the CTC head hears them."""
        head, sample = self._model.ctc, Sample("", waveform, "", [], len(waveform) / SAMPLE_RATE, 0, "")
        if head is None:
            return []
        [encoded] = self._reader.encode([sample])
        step = self._model.encoder.framing.samples_per_frame
        return [] if encoded.ctc is None else coverage.word_gaps(encoded.ctc, head.spec.labels, step)

    def _recent(self, text: str) -> str:
        """The end of a text that is long, so that the context of a piece costs no more in the hundredth hour."""
        tokenizer = self._model.tokenizer
        return tokenizer.decode(tokenizer.encode(text)[-_CONTEXT_TOKENS:]).lstrip("\ufffd")

    def _segment(self, done: Done, text: str, silence: float) -> Segment:
        best, piece = done.hypotheses[0], done.request.key.piece
        start, end = piece.start / SAMPLE_RATE, piece.end / SAMPLE_RATE
        words = None
        if self._times and done.ctc is not None:
            words = self._times.words(text, done.ctc, start, end, judge(self._model, best, done.ctc))
        return Segment(
            id=0,
            start=start,
            end=end,
            text=text,
            tokens=list(best.ids),
            temperature=done.request.temperature,
            avg_logprob=best.avg_logprob,
            compression_ratio=guards.compression_ratio(text),
            no_speech_prob=silence,
            cut=best.cut,
            words=words,
        )

    def _result(self, work: _Work) -> Transcript | BadSample:
        if work.error:
            return BadSample(-1, work.recording.name, work.error)
        ordered = sorted(work.segments, key=lambda segment: segment.start)
        segments = [replace(segment, id=number) for number, segment in enumerate(ordered)]
        return Transcript(
            text=join_texts(segment.text for segment in segments),
            segments=segments,
            seconds=work.samples / SAMPLE_RATE,
            task=work.recording.task,
            language=work.language or None,
            removed_seconds=work.removed / SAMPLE_RATE,
            ctc=join_texts(work.heard[start] for start in sorted(work.heard)) if self._model.ctc else None,
        )


def _word_times(model: speech_lm.SpeechLM) -> WordTimes:
    if model.ctc is None:
        raise UserError(
            "--word_timestamps 1: the weights have no CTC head, which finds the words; train one with --ctc 1"
        )
    return WordTimes(model.ctc, model.encoder)
