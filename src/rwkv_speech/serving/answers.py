"""A transcript in the formats of the API."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response

from rwkv_speech import tasks
from rwkv_speech.decoding.results import Segment, Transcript
from rwkv_speech.decoding.streaming import LastCharacter
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
        content: dict[str, Any] = {"text": found.text, "usage": _usage(found)}
        if form.include:
            content["logprobs"] = logprobs(found.segments, tokenizer)
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
        for segment in segments[self._num_segments :]:
            event = {"type": "transcript.text.delta", "delta": self._last.commit(segment.text)}
            yield event | self._measured([segment])
        self._num_segments = len(segments)

    def done(self, found: Transcript) -> Iterator[dict[str, Any]]:
        """What is left, and the whole."""
        yield from self.of(found.segments)
        yield {"type": "transcript.text.done", "text": found.text} | self._measured(found.segments)

    def _measured(self, segments: Sequence[Segment]) -> dict[str, Any]:
        return {"logprobs": logprobs(segments, self._tokenizer)} if self._form.include else {}


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


def _usage(found: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": found.seconds}


def logprobs(segments: Iterable[Segment], tokenizer: WorldTokenizer) -> list[dict[str, Any]]:
    """Of each token; that of the end of text is none of the text."""
    known = [x for segment in segments for x in zip(segment.tokens, segment.logprobs or (), strict=False)]
    content = [(tokenizer.decode_bytes([token]), logprob) for token, logprob in known]
    return [
        {"token": part.decode("utf-8", "replace"), "bytes": list(part), "logprob": logprob} for part, logprob in content
    ]
