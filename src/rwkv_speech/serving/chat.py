"""Voice questions, and conversations that the recurrent state remembers: chat completions of the API."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from rwkv_speech.audio import num_audio_tokens
from rwkv_speech.config import LimitFlags
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.session import Session, Turn
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.serving.chat_form import ChatForm
from rwkv_speech.serving.events import Told, sent, while_there
from rwkv_speech.serving.faults import Fault
from rwkv_speech.serving.form import check_model, unsupported
from rwkv_speech.serving.metrics import Metrics
from rwkv_speech.serving.sessions import Lent, Sessions
from rwkv_speech.serving.worker import Said, Talk, Worker


@dataclass(frozen=True)
class _Answer:
    """An answer that is there: its turn, what was read for it, and the number of turns of its session."""

    turn: Turn
    num_audio: int
    num_text: int
    num_turns: int

    def usage(self) -> dict[str, Any]:
        """The client's counts, of tokens."""
        read, written = self.num_audio + self.num_text, len(self.turn.tokens)
        details = {"audio_tokens": self.num_audio, "text_tokens": self.num_text}
        counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {**counts, "prompt_tokens_details": details}


class Chat:
    """Answers the messages of clients, and remembers the sessions that they name."""

    def __init__(self, model: SpeechLM, limits: LimitFlags, options: Options, worker: Worker, metrics: Metrics) -> None:
        self._model, self._limits, self._options = model, limits, options
        self._worker, self._metrics = worker, metrics
        self._sessions = Sessions(limits.max_sessions, limits.session_seconds)
        metrics.watch_sessions(lambda: len(self._sessions))

    async def completions(self, request: Request, form: ChatForm) -> Response:
        """The answer to the last message, whole or in parts."""
        check_model(form.model, self._model)
        known = {"id": f"chatcmpl-{secrets.token_urlsafe(12)}", "created": int(time.time()), "model": form.model}
        parts = self._parts(request.state.client, form)
        if form.stream:
            events = _chunks(form, known, parts)
            # What is wrong until the first part is answered with its own status.
            first = await while_there(request, anext(events))
            return StreamingResponse(sent(first, events), media_type="text/event-stream")
        return JSONResponse(_whole(form, known, await while_there(request, _last(parts))))

    async def _parts(self, client: str, form: ChatForm) -> AsyncGenerator[str | _Answer]:
        """The answer's text as it is written, and at its end the whole; only then the turn is remembered."""
        with self._sessions.lent(client, form.session_id) as lent:
            said, talk = await asyncio.to_thread(self._talk, form, lent)
            told = Told(partial(self._worker.converse, talk), partial(self._worker.cancel, talk))
            async with aclosing(told.parts(self._limits.request_seconds)) as parts:
                async for part in parts:
                    yield part
            answer = self._answer(said, talk, told)
            if form.session_id:
                lent.session = talk.session
        yield answer

    def _talk(self, form: ChatForm, lent: Lent) -> tuple[list[Said], Talk]:
        """The turns to read, on a copy of what is remembered, so that a turn that fails leaves nothing of it."""
        if lent.session and lent.session.task != form.model:
            raise unsupported("model", "the session is a conversation with another one; name that, or a new session")
        session = lent.session.fork() if lent.session else Session(self._model, form.model)
        said = form.said(self._model, self._limits.max_turn_seconds, is_known=lent.session is not None)
        changes: dict[str, Any] = {}
        if limit := form.max_completion_tokens or form.max_tokens:
            changes["max_new_tokens"] = limit
        if form.temperature is not None:  # one sample, as in the API, which can be told while it is written
            changes |= {"temperature": f"{form.temperature:g}", "best_of": 1}
        return said, Talk(session, said, replace(self._options, **changes), self._model)

    def _answer(self, said: list[Said], talk: Talk, told: Told[str, Turn]) -> _Answer:
        if not told.future.done():
            limit = self._limits.request_seconds
            raise Fault(503, f"found no whole answer within {limit:g} s; send less", "timeout")
        if told.future.exception():
            raise Fault(500, "decoding failed; the server's log says why", "server_error")
        samples = [one.sample for one in said]
        self._metrics.heard(sum(sample.duration for sample in samples))
        framing, stack = self._model.encoder.framing, self._model.adapter.stack
        num_audio = sum(num_audio_tokens(framing.count(len(sample.waveform)), stack) for sample in samples)
        num_text = sum(len(sample.input_ids or ()) + len(sample.prompt_ids) for sample in samples)
        num_text += sum(len(one.answer or ()) + len(self._model.tokenizer.encode(one.before)) for one in said)
        return _Answer(told.future.result(), num_audio, num_text, talk.session.num_turns)


async def _last(parts: AsyncGenerator[str | _Answer]) -> _Answer:
    async with aclosing(parts):
        async for part in parts:
            if isinstance(part, _Answer):
                return part
    raise AssertionError("parts end with the answer")


def _whole(form: ChatForm, known: dict[str, Any], answer: _Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.turn.text}
    choice = {"index": 0, "message": message, "finish_reason": _reason(answer)}
    content = {"object": "chat.completion", "choices": [choice], "usage": answer.usage()}
    return known | content | _session(form, answer)


async def _chunks(
    form: ChatForm, known: dict[str, Any], parts: AsyncGenerator[str | _Answer]
) -> AsyncGenerator[dict[str, Any]]:
    """The client's chunks; their texts, one after another, are the whole."""
    known, role = known | {"object": "chat.completion.chunk"}, {"role": "assistant"}
    async with aclosing(parts):
        async for part in parts:
            if isinstance(part, str):
                yield known | {"choices": [{"index": 0, "delta": {**role, "content": part}, "finish_reason": None}]}
            else:
                end = {"index": 0, "delta": role, "finish_reason": _reason(part)}
                yield known | {"choices": [end]} | _session(form, part)
                if form.stream_options and form.stream_options.include_usage:
                    yield known | {"choices": [], "usage": part.usage()}
            role = {}


def _reason(answer: _Answer) -> str:
    return "length" if answer.turn.cut else "stop"


def _session(form: ChatForm, answer: _Answer) -> dict[str, Any]:
    """What tells a client that its session goes on, or is a new one."""
    return {"session": {"id": form.session_id, "turns": answer.num_turns}} if form.session_id else {}
