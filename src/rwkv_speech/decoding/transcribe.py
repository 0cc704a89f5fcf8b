"""The one road from audio to text: prediction, evaluation, validation and Python all take it."""

# S samples

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE, AudioError, as_waveform, read_blocks
from rwkv_speech.batch import BadSample, Batch, Sample
from rwkv_speech.decoding.forks import Forks
from rwkv_speech.decoding.keywords import Keywords
from rwkv_speech.decoding.long_audio import SpeechBounds
from rwkv_speech.decoding.options import GREEDY, Options
from rwkv_speech.decoding.results import Row, Transcript
from rwkv_speech.decoding.session import Session, converse
from rwkv_speech.decoding.streaming import ClassListener, Listener, SegmentListener, Stream
from rwkv_speech.decoding.transcriber import Recording, Transcriber
from rwkv_speech.decoding.word_stream import HOLD_SECONDS, PACE_SECONDS, WordListener, can_commit_words
from rwkv_speech.errors import UserError, printable
from rwkv_speech.models import speech_lm
from rwkv_speech.tasks import Naming, task_named

Audio = str | Path | bytes | Tensor | np.ndarray


class SpeechLM(speech_lm.SpeechLM):
    """The model with its road from audio to text: what `from rwkv_speech import SpeechLM` gives."""

    def transcribe(
        self, audio: Audio | Iterable[Audio], batch_size: int = 8, task: str = "", **options: Any
    ) -> list[Transcript]:
        """A file, its bytes or a waveform (S,) at 16 kHz, or a list of these -> a Transcript of each, in order.

        A waveform holds floating-point numbers between -1 and 1, or int16. `task` names a learned state where there
        are several; `options` are those of predict.py, as config.DecodeFlags explains them: `beam=4`,
        `word_timestamps=True`, `temperature=0.0`. Raises AudioError for what cannot be decoded, and UserError for an
        option that is unknown or out of range.
        """
        one = isinstance(audio, Audio | Mapping | io.IOBase) or not isinstance(audio, Iterable)
        items: Any = [audio] if one else audio
        found = []
        for _, result in transcribe(self, items, batch_size, task, Options.given(**options)):
            if isinstance(result, BadSample):
                raise AudioError(result.reason)
            found.append(result)
        return found

    def stream(
        self,
        commit: str = "segment",
        pace: float | None = None,
        sample_rate: int = SAMPLE_RATE,
        batch_size: int = 8,
        task: str = "",
        hold: float = HOLD_SECONDS,
        **options: Any,
    ) -> Stream:
        """A recording that is still being made: its samples are pushed as they come, and events come back.

        `commit="segment"`: a segment is committed when its piece ends in a pause. The segments are those of
        `transcribe` with the same `batch_size`, `task` and `options`, to the bit, whatever the parts are in which the
        samples come (at another `sample_rate`, but for the rounding of resampling).

        `commit="word"`: words are committed while their piece is spoken, `hold` seconds after they ended at the
        earliest, and never taken back. It needs the CTC head, and decodes greedily, once: fallback temperatures are for
        whole pieces.

        Each `pace` seconds the open piece is read as far as it goes, and its text comes as a Partial; words are
        committed then. By default each 0.25 where words are committed, else never. Raises UserError as `transcribe`.
        """
        return stream(self, Options.given(**options), commit, pace, sample_rate, batch_size, task, hold)

    def session(self, task: str = "", path: str | Path = "") -> Session:
        """A new conversation, or the one that the file `path` holds, if it is there already.

        `task` names its learned state, by default `chat` if there is one.
        """
        return Session.begun(self, task, path)


def transcribe(
    model: speech_lm.SpeechLM,
    audio: Iterable[Audio],
    batch_size: int = 8,
    task: str = "",
    options: Options = Options(),  # noqa: B008 (it is frozen)
) -> Iterator[tuple[int, Transcript | BadSample]]:
    """Each recording's number and transcript, in order, as they are made; a broken one gives a BadSample."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size: found {batch_size!r}, expected a whole number at least 1; leave it out for 8")
    task = Naming.among(list(model.initial_states), task).state(None, options.given_language)
    recordings = (recording_of(item, number, task) for number, item in enumerate(audio))
    results: dict[int, Transcript | BadSample] = {}
    wanted = 0
    for recording, result in Transcriber(model, options, batch_size).run(recordings):
        results[recording.key] = replace(result, index=recording.key) if isinstance(result, BadSample) else result
        while wanted in results:
            yield wanted, results.pop(wanted)
            wanted += 1


def stream(
    model: speech_lm.SpeechLM,
    options: Options,
    commit: str,
    pace: float | None,
    sample_rate: int,
    batch_size: int,
    task: str,
    hold: float = HOLD_SECONDS,
) -> Stream:
    """What SpeechLM.stream gives."""
    task = Naming.among(list(model.initial_states), task).state(None, options.given_language)
    transcriber = Transcriber(model, options, batch_size)
    return stream_through(transcriber, model, options, commit, pace, sample_rate, task, hold)


def stream_through(
    transcriber: Transcriber,
    model: speech_lm.SpeechLM,
    options: Options,
    commit: str,
    pace: float | None,
    sample_rate: int,
    task: str,
    hold: float = HOLD_SECONDS,
) -> Stream:
    """A stream whose pieces that transcriber cuts and decodes, one stream's after the other's; its options may differ.

    How tokens are chosen, and how audio is cut, is the transcriber's.
    """
    if commit not in ("segment", "word"):
        raise UserError(f"commit: found {commit!r}, expected segment or word")
    if commit == "segment":
        listener = _whole_listener(transcriber, model, options, task)
    else:
        listener, pace = WordListener(model, options, task, hold), PACE_SECONDS if pace is None else pace
    return Stream(transcriber.segmenter(task), listener, pace, sample_rate)


def watched_stream(
    transcriber: Transcriber,
    model: speech_lm.SpeechLM,
    options: Options,
    sample_rate: int,
    task: str,
    hold: float,
    bounds: SpeechBounds | None,
) -> Stream:
    """A stream through a transcriber whose segments are those of `transcribe`, however often it is looked at.

    A look commits words, where these weights and options can; the segment then says what the whole piece does. With
    `bounds` each segment is a turn that stands alone, else the stream is one recording.
    """
    listener: Listener
    if can_commit_words(model, task, options):
        keywords = Keywords.of(options, model.tokenizer, model.lm.sizes.vocab, model.lm.emb.weight.device)
        listener = WordListener(model, options, task, hold, transcriber.live(task, options, keywords))
    else:
        listener = _whole_listener(transcriber, model, options, task, bool(bounds))
    return Stream(transcriber.segmenter(task, bounds), listener, None, sample_rate)


def _whole_listener(
    transcriber: Transcriber, model: speech_lm.SpeechLM, options: Options, task: str, has_turns: bool = False
) -> Listener:
    """What takes whole pieces to text; pieces of a recording vote where it is one of several kinds."""
    forks = Forks(model, task, options)
    decode = transcriber.live(task, options, forks.keywords)
    votes = task_named(task).is_class and not has_turns
    return ClassListener(decode, forks) if votes else SegmentListener(decode, forks)


def transcribe_batches(
    model: speech_lm.SpeechLM,
    batches: Iterable[Batch],
    options: Options = GREEDY,
    slots: int = 0,
    given_history: bool = False,
) -> Iterator[Row]:
    """The rows of a data set's batches, with its references, as they are done; by default of the first one's size.

    Conversations and texts that are read go on with the model's own answers, or with the `given` ones.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    slots = slots or max(1, len(first))
    transcriber = Transcriber(model, options, slots)
    parts = (part for batch in itertools.chain([first], batches) for part in _parts(batch))
    for is_heard, group in itertools.groupby(parts, lambda part: part[0]):
        found = itertools.chain.from_iterable(samples for _, samples in group)
        if is_heard:
            yield from _heard(model, transcriber, itertools.chain.from_iterable(found), options)
        else:
            for sample, turn in converse(model, found, options, slots, given_history):
                yield replace(_row(model, sample), hyp=turn.text, cut=turn.cut, heard=turn.heard)


def transcribe_batch(model: speech_lm.SpeechLM, batch: Batch, options: Options = GREEDY) -> list[Row]:
    """The rows of one batch, in its order."""
    return sorted(
        transcribe_batches(model, [batch], options), key=lambda row: (batch.indices.index(row.index), row.place)
    )


def _parts(batch: Batch) -> Iterator[tuple[bool, list[list[Sample]]]]:
    """The utterances of a batch that are heard, each alone, and then its conversations and what is read."""
    found = batch.conversations()
    for is_heard in (True, False):
        if part := [x for x in found if (len(x) == 1 and x[0].input_ids is None) == is_heard]:
            yield is_heard, part


def _row(model: speech_lm.SpeechLM, sample: Sample) -> Row:
    """What is known of an utterance before it is decoded."""
    known = sample.id, sample.index, sample.text, "", sample.lang, sample.task, sample.duration, False
    return Row(
        *known,
        turn=sample.turn or None,
        source_lang=sample.source_lang,
        source_text=sample.source_text,
        answers=sample.answers,
        prompt=model.tokenizer.decode(sample.prompt_ids),
    )


def _heard(
    model: speech_lm.SpeechLM, transcriber: Transcriber, samples: Iterable[Sample], options: Options
) -> Iterator[Row]:
    """The rows of utterances that stand alone."""
    rows: dict[int, Row] = {}

    def recordings() -> Iterator[Recording]:
        for sample in samples:
            rows[sample.index] = _row(model, sample)
            blocks = partial(iter, [sample.waveform])
            known = sample.task, sample.lang, sample.normalised, sample.prompt_ids
            yield Recording(sample.index, sample.id, blocks, *known)

    for recording, found in transcriber.run(recordings()):
        assert isinstance(found, Transcript)
        words = [(word.word, word.probability) for word in found.words or []] if options.word_timestamps else None
        language = found.language if options.finds_language else None
        row = replace(rows.pop(recording.key), hyp=found.text, cut=found.cut, ctc=found.ctc, words=words)
        yield replace(row, found_lang=language, heard=found.heard)


def recording_of(audio: Any, number: int, task: str) -> Recording:
    """What Python was given as a recording; what cannot be one raises AudioError when it is read."""
    name = printable(audio) if isinstance(audio, (str, Path)) else f"audio {number + 1}"

    def blocks() -> Iterable[Tensor]:
        if isinstance(audio, (Tensor, np.ndarray)):
            return [as_waveform(audio, name)]
        if isinstance(audio, (str, Path, bytes)):
            return read_blocks(audio, name=name)
        raise AudioError(f"{name}: found {type(audio).__name__}, expected a path, the bytes of a file or a waveform")

    return Recording(number, name, blocks, task)
