"""A transcript in the formats of the API."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response

from rwkv_speech import tasks
from rwkv_speech.decoding.results import Segment, Transcript
from rwkv_speech.decoding.streaming import LastCharacter, scored
from rwkv_speech.decoding.writers import render
from rwkv_speech.serving.form import Form
from rwkv_speech.tokenizer import WorldTokenizer

_KINDS = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
_TASKS = {"asr": "transcribe", "st": "translate"}
_FIELDS = ("id", "start", "end", "text", "tokens", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob")


def answer(form: Form, found: Transcript, tokenizer: WorldTokenizer, language: str = "") -> Response:
    """The response that a form asks for; `language` stands in place of the one that is spoken."""
    if form.response_format == "verbose_json":
        return JSONResponse(_verbose(form, found, language or found.language or ""))
    if form.response_format == "json":
        content: dict[str, Any] = {"text": found.text, "usage": _usage(found)} | _languages(form, found)
        if form.include:
            content["logprobs"] = _logprobs(_told(found), tokenizer)
        return JSONResponse(content)
    is_text = form.response_format == "text"
    plain = f"{found.text}\n" if is_text else render(found, form.response_format)
    return PlainTextResponse(plain, media_type=_KINDS[form.response_format])


class Deltas:
    """The events of a transcript that is streamed: their texts, one after another, are the whole."""

    def __init__(self, form: Form, tokenizer: WorldTokenizer) -> None:
        self._form, self._tokenizer = form, tokenizer
        self._last, self._num_segments = LastCharacter(), 0

    def of(self, segments: Sequence[Segment]) -> Iterator[dict[str, Any]]:
        """What has been added to the segments."""
        if tasks.task_named(self._form.model).is_class:
            return  # they vote
        for segment in segments[self._num_segments :]:
            yield self._delta(self._last.commit(segment.text), [segment])
        self._num_segments = len(segments)

    def done(self, found: Transcript) -> Iterator[dict[str, Any]]:
        """What is left, and the whole."""
        yield from self.of(found.segments)
        segments = _told(found)
        if found.text and not self._num_segments:
            yield self._delta(found.text, segments)
        done = {"type": "transcript.text.done", "text": found.text} | _languages(self._form, found)
        yield done | self._measured(segments)

    def _delta(self, text: str, segments: Sequence[Segment]) -> dict[str, Any]:
        return {"type": "transcript.text.delta", "delta": text} | self._measured(segments)

    def _measured(self, segments: Sequence[Segment]) -> dict[str, Any]:
        return {"logprobs": _logprobs(segments, self._tokenizer)} if self._form.include else {}


def _told(found: Transcript) -> Sequence[Segment]:
    """The segments whose texts are the transcript; of a task of classes the first that has what is told."""
    if not tasks.task_named(found.task).is_class:
        return found.segments
    return [segment for segment in found.segments if segment.text.strip() == found.text][:1]


def _logprobs(segments: Sequence[Segment], tokenizer: WorldTokenizer) -> list[dict[str, Any]]:
    return logprobs((x for segment in segments for x in scored(segment)), tokenizer)


def _verbose(form: Form, found: Transcript, language: str) -> dict[str, Any]:
    base = tasks.base_of(found.task)
    content: dict[str, Any] = {
        "task": _TASKS.get(base, base),
        "language": language,
        "duration": found.seconds,
        "text": found.text,
        "usage": _usage(found),
    }
    if form.has_segments:
        content["segments"] = [
            {name: getattr(x, name) for name in _FIELDS} | {"seek": int(100 * x.start)} for x in found.segments
        ]
    if form.has_words:
        content["words"] = [{"word": x.word.strip(), "start": x.start, "end": x.end} for x in found.words or []]
    return content


def _languages(form: Form, found: Transcript) -> dict[str, Any]:
    """The language that was found, where the client did not say it."""
    return {"languages": [{"code": found.language}]} if found.language and not form.spoken else {}


def _usage(found: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": found.seconds}


def logprobs(known: Iterable[tuple[int, float]], tokenizer: WorldTokenizer) -> list[dict[str, Any]]:
    """Of each token."""
    content = [(tokenizer.decode_bytes([token]), logprob) for token, logprob in known]
    return [
        {"token": part.decode("utf-8", "replace"), "bytes": list(part), "logprob": logprob} for part, logprob in content
    ]
