"""The web server's connections: how long one may take to say what it wants, and what the log says of it."""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

logger = logging.getLogger(__name__)
logger.setLevel(logging.WARNING)


def impatient(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, but for a connection that ends when the headers of its next request take more than `seconds`.

    What comes after the headers, a body or a websocket's messages, is the application's to bound.
    """

    class Impatient(H11Protocol):
        """Watches whether headers are awaited whenever that may have changed."""

        _end: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # asyncio's own
            super().connection_made(transport)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def _watch(self) -> None:
            is_answering = self.cycle is not None and not self.cycle.response_complete
            is_over = self.transport.is_closing() or self.transport.get_protocol() is not self
            if self._end and (is_answering or is_over):
                self._end.cancel()
                self._end = None
            elif not (self._end or is_answering or is_over):
                self._end = self.loop.call_later(seconds, self.transport.close)

    return Impatient


class Quiet(WebSocketsSansIOProtocol):
    """uvicorn's, but without its lines for each connection: clients could fill the log, or the pipe that it goes to.

    A server that writes to a full pipe waits, and with it all its clients.
    """

    def __init__(self, *given: Any, **known: Any) -> None:
        super().__init__(*given, **known)
        self.logger = self.conn.logger = logger

    async def send(self, message: Any) -> None:
        """Pass it on; a connection that has been refused with a whole answer is no failure."""
        await super().send(message)
        self.handshake_complete |= self.close_sent
