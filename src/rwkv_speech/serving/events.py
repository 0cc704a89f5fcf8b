"""Answers in parts: what a worker tells on its way, as server-sent events, to clients that may go."""

import asyncio
import json
from asyncio import FIRST_COMPLETED, Future, Queue, Task
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent import futures
from contextlib import aclosing, suppress
from typing import Any, Generic, TypeVar

from fastapi import Request

from rwkv_speech.serving.faults import Fault

Found = TypeVar("Found")
Part = TypeVar("Part")


class Told(Generic[Part, Found]):
    """What a worker is asked, and what it tells; `give_up` is called where nobody waits any more."""

    def __init__(
        self, submit: Callable[[Callable[[Part], None]], "futures.Future[Found]"], give_up: Callable[[], None]
    ) -> None:
        self._loop, self._parts, self._give_up = asyncio.get_running_loop(), Queue[Part | None](), give_up

        def tell(part: Part) -> None:
            self._loop.call_soon_threadsafe(self._parts.put_nowait, part)

        self.future: Future[Found] = asyncio.wrap_future(submit(tell))
        self.future.add_done_callback(lambda _: self._parts.put_nowait(None))

    async def parts(self, seconds: float) -> AsyncGenerator[Part]:
        """The parts as they come, until all is found or the time is over; whoever leaves it early gives up."""
        end = self._loop.time() + seconds
        try:
            with suppress(TimeoutError):
                while (part := await self._next(end)) is not None:
                    yield part
        finally:
            if not self.future.done():
                self.future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks for it
                self._give_up()

    async def _next(self, end: float) -> Part | None:
        # Not asyncio.wait_for: in Python 3.11 that forgets a cancellation that comes together with a part.
        async with asyncio.timeout_at(end):
            return await self._parts.get()

    async def ended(self, seconds: float) -> None:
        """Return when all is found, or the time is over."""
        async with aclosing(self.parts(seconds)) as parts:
            async for _ in parts:
                pass


async def sent(first: dict[str, Any], events: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events, with what goes wrong on the way as one of them."""
    async with aclosing(events):
        yield _event(first)
        try:
            async for event in events:
                yield _event(event)
        except Fault as fault:
            yield _event({"error": fault.content()})
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def while_there(request: Request, wanted: Awaitable[Found]) -> Found:
    """What is wanted; raises Fault when the client goes before it is there."""
    task: Task[Found] | Future[Found] = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=FIRST_COMPLETED)
        if not task.done():
            raise Fault(499, "the client has gone", "client_closed_request")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
