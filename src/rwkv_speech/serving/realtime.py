"""Speech that is transcribed while it is spoken: the realtime API over a websocket."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import WebSocket
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.websockets import WebSocketDisconnect

from rwkv_speech import tasks
from rwkv_speech.config import LimitFlags
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.streaming import Stream
from rwkv_speech.decoding.transcribe import stream_through
from rwkv_speech.decoding.transcriber import Transcriber
from rwkv_speech.decoding.word_stream import can_commit_words
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.serving.faults import Fault, of_validation
from rwkv_speech.serving.hearing import Hearing, Sent
from rwkv_speech.serving.metrics import Metrics
from rwkv_speech.serving.realtime_form import (
    CLIENT_EVENT,
    Append,
    AudioInput,
    ClientEvent,
    Commit,
    Update,
)
from rwkv_speech.serving.worker import Worker

logger = logging.getLogger(__name__)
FRAME_BYTES = 1_000_000  # most bytes of a message: 15 s of audio
# The model's thread does so much for a connection before it turns to the others.
_PART_SECONDS = 0.25
# What is being said is read so often: words wait for the next reading.
_PACE_SECONDS = 0.125
_POLICY, _FAILED = 1008, 1011  # codes of closing
Found = TypeVar("Found")


class Realtime:
    """Takes the audio of many connections, each with a stream of its own, through the worker's thread."""

    def __init__(self, model: SpeechLM, limits: LimitFlags, options: Options, worker: Worker, metrics: Metrics) -> None:
        self._model, self._limits, self._options = model, limits, options
        self._worker, self._metrics = worker, metrics
        self._transcriber: Transcriber | None = None

    async def connect(self, socket: WebSocket) -> None:
        """One connection, from its first event to its last."""
        try:
            if socket.query_params.get("intent") != "transcription":
                raise Fault(400, "intent: expected transcription", "unsupported_value", "intent")
            known = self._known(socket.query_params.get("model", ""))
        except Fault as fault:
            return await socket.send_denial_response(fault.response())
        await socket.accept()
        with suppress(WebSocketDisconnect):
            try:
                async with asyncio.timeout(self._limits.stream_seconds):
                    await self._converse(socket, known)
            except TimeoutError:
                await _end(socket, self._too_long())
            except Fault as fault:
                await _end(socket, fault)
            except WebSocketDisconnect:
                raise
            except Exception:  # the client is told, the log says what, the server goes on
                logger.exception("a realtime connection failed")
                await _end(socket, Fault(500, "the server failed; its log says why", "server_error"), _FAILED)

    def _known(self, name: str) -> AudioInput:
        """What is set until the client says otherwise; raises Fault for a model that is not here."""
        states = self._model.initial_states
        turns = None if self._options.vad == "none" else {"type": "server_vad"}
        model = name or (tasks.DEFAULT if tasks.DEFAULT in states else next(iter(states)))
        wanted = {"format": {"type": "audio/pcm"}, "transcription": {"model": model}, "turn_detection": turns}
        found = AudioInput.model_validate(wanted)
        found.check(self._model, self._options)
        return found

    async def _converse(self, socket: WebSocket, known: AudioInput) -> None:
        client = _Client(self, socket, known)
        await client.begin()
        while True:
            try:
                message = await asyncio.wait_for(socket.receive(), self._limits.idle_seconds)
            except TimeoutError as error:
                limit = self._limits.idle_seconds
                raise Fault(408, f"found no event for {limit:g} s; connect again to go on", "idle_timeout") from error
            if message["type"] == "websocket.disconnect":
                return
            await client.take(message.get("text"))

    async def run(self, work: Callable[[], Found]) -> Found:
        """What the worker's thread finds; raises Fault when it takes too long."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._worker.run(work)), self._limits.request_seconds)
        except TimeoutError as error:
            raise Fault(503, "the server is too busy; try again soon", "timeout") from error

    def check(self, wanted: AudioInput) -> None:
        """Raises Fault for what these weights cannot do."""
        wanted.check(self._model, self._options)

    def hearing(self, wanted: AudioInput, seconds: float) -> Hearing:
        """What hears a connection from that second on; for the worker's thread."""
        begin = partial(self._stream, wanted, wanted.options(self._options))
        return Hearing(begin, wanted.format.rate, wanted.turn_detection is not None, seconds)

    def _stream(self, wanted: AudioInput, options: Options) -> Stream:
        self._transcriber = self._transcriber or Transcriber(self._model, self._options, slots=1)
        task, rate = wanted.state(self._model), wanted.format.rate
        commit = "word" if can_commit_words(self._model, task, options) else "segment"
        pace = _PACE_SECONDS if commit == "word" else None
        return stream_through(self._transcriber, self._model, options, commit, pace, rate, task, wanted.hold)

    def heard(self, seconds: float, total: float) -> None:
        """Count audio; raises Fault where a connection has sent more than it may."""
        self._metrics.heard(seconds)
        if total > self._limits.stream_seconds:
            raise self._too_long()

    def _too_long(self) -> Fault:
        return Fault(413, f"lasts more than {self._limits.stream_seconds:g} s; connect again", "session_expired")


class _Client:
    """One connection: its settings, and what it has said."""

    def __init__(self, realtime: Realtime, socket: WebSocket, known: AudioInput) -> None:
        self._realtime, self._socket, self._known = realtime, socket, known
        self._id = f"sess_{secrets.token_hex(10)}"
        self._hearing: Hearing | None = None

    async def begin(self) -> None:
        """Tell what is set."""
        await self._hear(0.0)
        await self._send([self._described("session.created")])

    async def _hear(self, seconds: float) -> None:
        self._hearing = await self._realtime.run(partial(self._realtime.hearing, self._known, seconds))

    async def take(self, message: str | None) -> None:
        """Answer an event; what is wrong with it is told, and the connection goes on."""
        event: ClientEvent | None = None
        try:
            event = CLIENT_EVENT.validate_json(message or "")
            await self._answer(event)
        except ValidationError as error:
            name = event.event_id if event else None
            await self._send([_error(_of(error), name)])
        except Fault as fault:
            if fault.status_code in (413, 503):
                raise
            await self._send([_error(fault, event.event_id if event else None)])

    async def _answer(self, event: ClientEvent) -> None:
        hearing = self._hearing
        assert hearing is not None
        if isinstance(event, Append):
            samples = event.samples()
            self._realtime.heard(len(samples) / self._known.format.rate, hearing.seconds)
            for part in _parts(samples, round(_PART_SECONDS * self._known.format.rate)):
                await self._send(await self._realtime.run(partial(hearing.push, part)))
        elif isinstance(event, Update):
            if hearing.is_open:
                raise Fault(400, "session: found audio in the buffer; commit or clear it before", "invalid_state")
            known = event.session.changed(self._known)
            await asyncio.to_thread(self._realtime.check, known)
            self._known = known
            await self._hear(hearing.seconds)
            await self._send([self._described("session.updated")])
        else:
            work = hearing.commit if isinstance(event, Commit) else hearing.clear
            await self._send(await self._realtime.run(work))

    def _described(self, kind: str) -> Sent:
        session = {"id": self._id, "object": "realtime.transcription_session", "type": "transcription"}
        return {"type": kind, "session": session | {"audio": {"input": self._known.model_dump()}}}

    async def _send(self, events: Iterable[Sent]) -> None:
        for event in events:
            await _send(self._socket, event)


async def _send(socket: WebSocket, event: Sent) -> None:
    await socket.send_json({"event_id": f"event_{secrets.token_hex(10)}"} | event)


async def _end(socket: WebSocket, fault: Fault, code: int = _POLICY) -> None:
    """Tell why a connection ends, and end it."""
    await _send(socket, _error(fault))
    await socket.close(code, fault.code)


def _error(fault: Fault, event_id: str | None = None) -> Sent:
    return {"type": "error", "error": fault.content() | {"event_id": event_id}}


def _of(error: ValidationError) -> Fault:
    """The same as of a request; where it is wrong is behind the event's own type."""
    first: dict[str, Any] = dict(error.errors()[0])
    place = [str(part) for part in first["loc"]]
    first["loc"] = ("body", *(place[-1:] or ["event"]))
    return of_validation(RequestValidationError([first]))


def _parts(samples: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (samples[start : start + size] for start in range(0, len(samples), size))
