"""One connection of the realtime API: what it sends, what it is told, and when what it says is looked at."""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from fastapi import WebSocket
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from rwkv_speech.config import LimitFlags
from rwkv_speech.serving.faults import Fault, of_validation
from rwkv_speech.serving.hearing import Hearing, Sent
from rwkv_speech.serving.realtime_form import (
    CLIENT_EVENT,
    Append,
    AudioInput,
    ClientEvent,
    Commit,
    Update,
)

# The model's thread does so much for a connection before it turns to the others; so much more waits for it at most.
_PART_SECONDS, _WAITING_SECONDS = 1.0, 1.0
# Who has been told no word yet of what is being said comes so long before the others.
_AHEAD_SECONDS = 0.5
# When the server ends, what a client has sent is waited for so long, all in all; after such a silence it has sent all.
_LAST_SECONDS, _SILENT_SECONDS = 1.0, 0.25
_GOING, _POLICY = 1001, 1008  # codes of closing
Found = TypeVar("Found")


class Host(Protocol):
    """What all connections share."""

    limits: LimitFlags
    ending: asyncio.Event  # set when the server ends

    async def run(self, work: Callable[[], Found], due: float | None = None) -> Found:
        """What the model's thread finds, late if `due` says when; raises Fault when it takes too long."""

    def check(self, wanted: AudioInput) -> None:
        """Raises Fault for what cannot be done."""

    def hearing(self, wanted: AudioInput, seconds: float, tells_logprobs: bool) -> Hearing:
        """What hears a connection from that second on; for the model's thread."""

    def heard(self, seconds: float, total: float) -> None:
        """Count audio; raises Fault where a connection has sent more than it may."""


class Client:
    """One connection: its settings, and what it has said.

    What is found goes out in the order in which the model's thread found it, whoever asked for it.
    """

    def __init__(self, host: Host, socket: WebSocket, known: AudioInput) -> None:
        self._host, self._socket, self._known = host, socket, known
        self._id = f"sess_{secrets.token_hex(10)}"
        self._hearing: Hearing
        self._tells_logprobs, self._seconds_left = False, _LAST_SECONDS
        self._loop, self._outgoing, self._due = asyncio.get_running_loop(), asyncio.Queue[Sent](), asyncio.Event()
        # Audio is taken while what came before it is heard: the model's thread is asked seldom, for much at once.
        self._waiting, self._has_more, self._feeding = list[np.ndarray](), asyncio.Event(), asyncio.Lock()
        self._timer = asyncio.timeout(None)

    async def serve(self) -> None:
        """Answer until the client goes, or the server has no more to tell it; raises Fault for one that is idle."""
        await self._hear(0.0)
        self._tell([self._described("session.created")])
        await _first_ended(self._receive(), self._feed(), self._look(), self._deliver())

    async def _hear(self, seconds: float) -> None:
        self._hearing = await self._host.run(partial(self._host.hearing, self._known, seconds, self._tells_logprobs))

    async def _receive(self) -> None:
        ending = asyncio.ensure_future(self._hurry())
        try:
            while message := await self._next():
                if message["type"] == "websocket.disconnect":
                    return
                await self._take(message.get("text"))
                await self._outgoing.join()  # who does not listen is not heard either
        finally:
            ending.cancel()
        await self._flush()
        if self._hearing.is_open:
            await self._do(self._hearing.commit)
        await self._outgoing.join()
        await self._socket.close(_GOING, "the server ends")

    async def _hurry(self) -> None:
        """When the server ends, wait for the next message no longer than for one that is on its way."""
        await self._host.ending.wait()
        with suppress(RuntimeError):  # it is not waiting for one
            self._timer.reschedule(self._loop.time() + _SILENT_SECONDS)

    async def _next(self) -> Any:
        """The next message, None where the server ends and has all of them; raises Fault for a silent client."""
        limit, begun, is_ending = self._host.limits.idle_seconds, self._loop.time(), self._host.ending.is_set()
        try:
            async with asyncio.timeout(min(self._seconds_left, _SILENT_SECONDS) if is_ending else limit) as self._timer:
                return await self._socket.receive()
        except TimeoutError as error:
            if self._host.ending.is_set():
                return None
            raise Fault(408, f"found no event for {limit:g} s; connect again to go on", "idle_timeout") from error
        finally:
            self._seconds_left -= is_ending * (self._loop.time() - begun)

    async def _feed(self) -> None:
        """Have the audio that comes heard."""
        while True:
            await self._has_more.wait()
            self._has_more.clear()
            await self._flush()

    async def _flush(self) -> None:
        """Return when all audio that has come is heard."""
        async with self._feeding:
            while self._waiting:
                samples = np.concatenate(self._waiting)
                self._waiting.clear()
                for part in _parts(samples, round(_PART_SECONDS * self._known.format.rate)):
                    await self._do(partial(self._hearing.push, part))
                self._look_again()

    async def _look(self) -> None:
        """Have what is being said looked at, again and again, as often as the model's thread finds the time."""
        while True:
            await self._due.wait()
            self._due.clear()
            hearing = self._hearing
            await self._do(hearing.look, self._loop.time() + _AHEAD_SECONDS * hearing.has_words)
            self._look_again()

    def _look_again(self) -> None:
        if self._hearing.is_due:
            self._due.set()

    async def _deliver(self) -> None:
        while True:
            await _send(self._socket, await self._outgoing.get())
            self._outgoing.task_done()

    def _tell(self, events: Iterable[Sent]) -> None:
        for event in events:
            self._outgoing.put_nowait(event)

    async def _do(self, work: Callable[[], list[Sent]], due: float | None = None) -> None:
        """Have the model's thread do something, late if `due` says when, and tell what it finds."""

        def told() -> None:
            self._loop.call_soon_threadsafe(self._tell, work())

        await self._host.run(told, due)

    async def _take(self, message: str | None) -> None:
        """Answer an event; what is wrong with it is told, and the connection goes on."""
        event: ClientEvent | None = None
        try:
            event = CLIENT_EVENT.validate_json(message or "")
            await self._answer(event)
        except ValidationError as error:
            self._tell([_error(_of(error), event.event_id if event else None)])
        except Fault as fault:
            if fault.status_code in (413, 503):
                raise
            self._tell([_error(fault, event.event_id if event else None)])

    async def _answer(self, event: ClientEvent) -> None:
        if isinstance(event, Append):
            samples, rate = self._known.format.samples(event.content()), self._known.format.rate
            self._waiting.append(samples)
            self._has_more.set()
            waiting = sum(map(len, self._waiting)) / rate
            self._host.heard(len(samples) / rate, self._hearing.seconds + waiting - len(samples) / rate)
            if waiting > _WAITING_SECONDS:
                await self._flush()
            return
        await self._flush()
        hearing = self._hearing
        if isinstance(event, Update):
            if hearing.is_open:
                raise Fault(400, "session: found audio in the buffer; commit or clear it before", "invalid_state")
            known = event.session.changed(self._known)
            await asyncio.to_thread(self._host.check, known)
            self._known = known
            if event.session.include is not None:
                self._tells_logprobs = bool(event.session.include)
            await self._hear(hearing.seconds)
            self._tell([self._described("session.updated")])
        else:
            await self._do(hearing.commit if isinstance(event, Commit) else hearing.clear)

    def _described(self, kind: str) -> Sent:
        session: Sent = {"id": self._id, "object": "realtime.transcription_session", "type": "transcription"}
        include = {"include": ["item.input_audio_transcription.logprobs"]} if self._tells_logprobs else {}
        return {"type": kind, "session": session | {"audio": {"input": self._known.model_dump()}} | include}


async def _first_ended(*work: Coroutine[Any, Any, None]) -> None:
    """Do several things until one has ended, and end the others; raises what it raised."""
    doing = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(doing, return_when=asyncio.FIRST_COMPLETED)
        for one in done:
            one.result()
    finally:
        for one in doing:
            one.cancel()
        await asyncio.gather(*doing, return_exceptions=True)


async def _send(socket: WebSocket, event: Sent) -> None:
    await socket.send_json({"event_id": f"event_{secrets.token_hex(10)}"} | event)


async def end(socket: WebSocket, fault: Fault, code: int = _POLICY) -> None:
    """Tell why a connection ends, and end it."""
    await _send(socket, _error(fault))
    await socket.close(code, fault.code)


def _error(fault: Fault, event_id: str | None = None) -> Sent:
    return {"type": "error", "error": fault.content() | {"event_id": event_id}}


def _of(error: ValidationError) -> Fault:
    """The same as of a request; where it is wrong is behind the event's own type."""
    first: dict[str, Any] = dict(error.errors()[0])
    place = [part for part in first["loc"] if isinstance(part, str)]
    first["loc"] = ("body", *(place[-1:] or ["event"]))
    return of_validation(RequestValidationError([first]))


def _parts(samples: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (samples[start : start + size] for start in range(0, len(samples), size))
