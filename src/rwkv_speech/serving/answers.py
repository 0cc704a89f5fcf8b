"""A transcript in the formats of the API."""

from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response

from rwkv_speech import tasks
from rwkv_speech.decoding.results import Segment, Transcript
from rwkv_speech.decoding.writers import render
from rwkv_speech.serving.form import Form
from rwkv_speech.tokenizer import WorldTokenizer

_KINDS = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
_TASKS = {"asr": "transcribe", "st": "translate"}
_FIELDS = ("id", "start", "end", "text", "tokens", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob")


def answer(form: Form, found: Transcript, tokenizer: WorldTokenizer) -> Response:
    """The response that a form asks for."""
    if form.response_format == "verbose_json":
        return JSONResponse(_verbose(form, found))
    if form.response_format == "json":
        content: dict[str, Any] = {"text": found.text, "usage": _usage(found)}
        if form.include:
            content["logprobs"] = [x for segment in found.segments for x in _logprobs(segment, tokenizer)]
        return JSONResponse(content)
    is_text = form.response_format == "text"
    plain = f"{found.text}\n" if is_text else render(found, form.response_format)
    return PlainTextResponse(plain, media_type=_KINDS[form.response_format])


def _verbose(form: Form, found: Transcript) -> dict[str, Any]:
    base = tasks.base_of(found.task)
    content: dict[str, Any] = {
        "task": _TASKS.get(base, base),
        "language": found.language or "",
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


def _logprobs(segment: Segment, tokenizer: WorldTokenizer) -> list[dict[str, Any]]:
    """Of each token; that of the end of text is none of the text."""
    content = [tokenizer.decode_bytes([token]) for token in segment.tokens]
    return [
        {"token": part.decode("utf-8", "replace"), "bytes": list(part), "logprob": logprob}
        for part, logprob in zip(content, segment.logprobs or (), strict=False)
    ]
