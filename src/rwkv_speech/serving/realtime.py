"""Speech that is transcribed while it is spoken: the realtime API over a websocket."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect

from rwkv_speech import tasks
from rwkv_speech.config import LimitFlags
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.streaming import Stream
from rwkv_speech.decoding.transcribe import watched_stream
from rwkv_speech.decoding.transcriber import Transcriber
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.serving.faults import Fault
from rwkv_speech.serving.hearing import Hearing
from rwkv_speech.serving.metrics import Metrics
from rwkv_speech.serving.realtime_client import Client, end
from rwkv_speech.serving.realtime_form import AudioInput
from rwkv_speech.serving.worker import Worker

logger = logging.getLogger(__name__)
FRAME_BYTES = 1_000_000  # most bytes of a message: 15 s of audio
_FAILED = 1011  # a code of closing
Found = TypeVar("Found")


class Realtime:
    """Takes the audio of many connections, each with a stream of its own, through the worker's thread."""

    def __init__(self, model: SpeechLM, limits: LimitFlags, options: Options, worker: Worker, metrics: Metrics) -> None:
        self._model, self.limits, self._options = model, limits, options
        self._worker, self._metrics = worker, metrics
        self._transcriber: Transcriber | None = None
        self.ending, self._num_open = asyncio.Event(), 0

    async def connect(self, socket: WebSocket) -> None:
        """One connection, from its first event to its last."""
        try:
            if socket.query_params.get("intent") != "transcription":
                raise Fault(400, "intent: expected transcription", "unsupported_value", "intent")
            known = self._known(socket.query_params.get("model", ""))
        except Fault as fault:
            return await socket.send_denial_response(fault.response())
        await socket.accept()
        self._num_open += 1
        try:
            await self._serve(Client(self, socket, known), socket)
        finally:
            self._num_open -= 1

    async def _serve(self, client: Client, socket: WebSocket) -> None:
        with suppress(WebSocketDisconnect):
            try:
                async with asyncio.timeout(self.limits.stream_seconds):
                    await client.serve()
            except TimeoutError:
                await end(socket, self._too_long())
            except Fault as fault:
                await end(socket, fault)
            except WebSocketDisconnect:
                raise
            except Exception:  # the client is told, the log says what, the server goes on
                logger.exception("a realtime connection failed")
                await end(socket, Fault(500, "the server failed; its log says why", "server_error"), _FAILED)

    async def end(self) -> None:
        """Return when all connections have been told what their audio says, and are closed."""
        self.ending.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.request_seconds):
                while self._num_open:
                    await asyncio.sleep(0.02)

    def _known(self, name: str) -> AudioInput:
        """What is set until the client says otherwise; raises Fault for a model that is not here."""
        states = self._model.initial_states
        turns = None if self._options.vad == "none" else {"type": "server_vad"}
        model = name or (tasks.DEFAULT if tasks.DEFAULT in states else next(iter(states)))
        wanted = {"format": {"type": "audio/pcm"}, "transcription": {"model": model}, "turn_detection": turns}
        found = AudioInput.model_validate(wanted)
        found.check(self._model, self._options)
        return found

    async def run(self, work: Callable[[], Found], due: float | None = None) -> Found:
        """What the worker's thread finds, late if `due` says when; raises Fault when it takes too long."""
        future = self._worker.run(work) if due is None else self._worker.run_late(work, due)
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise Fault(503, "the server is too busy; try again soon", "timeout") from error

    def check(self, wanted: AudioInput) -> None:
        """Raises Fault for what these weights cannot do."""
        wanted.check(self._model, self._options)

    def hearing(self, wanted: AudioInput, seconds: float, tells_logprobs: bool) -> Hearing:
        """What hears a connection from that second on; for the worker's thread."""
        begin = partial(self._stream, wanted, wanted.options(self._options))
        tokenizer = self._model.tokenizer if tells_logprobs else None
        task, finds_turns = wanted.state(self._model), wanted.turn_detection is not None
        return Hearing(begin, task, wanted.format.rate, finds_turns, seconds, tokenizer)

    def _stream(self, wanted: AudioInput, options: Options) -> Stream:
        self._transcriber = self._transcriber or Transcriber(self._model, self._options, slots=1)
        task, rate = wanted.state(self._model), wanted.format.rate
        return watched_stream(self._transcriber, self._model, options, rate, task, wanted.hold, wanted.bounds)

    def heard(self, seconds: float, total: float) -> None:
        """Count audio; raises Fault where a connection has sent more than it may."""
        self._metrics.heard(seconds)
        if total > self.limits.stream_seconds:
            raise self._too_long()

    def _too_long(self) -> Fault:
        return Fault(413, f"lasts more than {self.limits.stream_seconds:g} s; connect again", "session_expired")
