"""What stands before the application: keys, and how much and how long a request may send, before any of it is kept."""

import hmac
import time
from asyncio import timeout
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rwkv_speech.config import LimitFlags
from rwkv_speech.serving.faults import Fault
from rwkv_speech.serving.metrics import Metrics

_MEGABYTE = 1_000_000
# A refused upload is read so long, and so far, before the answer: a client that is still sending would not hear it.
_DRAIN_SECONDS, _DRAIN_TIMES = 5.0, 8
_UPLOADS = "/v1/audio/"
_FORM, _JSON = "multipart/form-data", "application/json"


class Guard:
    """Lets through what is allowed, and counts the requests that are being answered; an ASGI middleware."""

    def __init__(self, app: ASGIApp, limits: LimitFlags, keys: Sequence[str], metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        metrics.watch(lambda: self.num_requests)
        self._keys = [key.encode() for key in keys]
        self._most_bytes = round(limits.max_upload_mb * _MEGABYTE)
        self._clients, self._num_streams = Counter[str](), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, and count it."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        status, begun = 499, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            status = 101 if message["type"] == "websocket.accept" else message.get("status", status)
            await send(message)

        try:
            await self._answer(scope, receive, watched)
        finally:
            # The route is known by its pattern: whatever paths are tried, there are no more counts than routes.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(path, status, time.monotonic() - begun)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            client = self._client(scope, headers)
            scope.setdefault("state", {})["client"] = client
            if scope["type"] == "websocket":
                self._check_origin(headers)
                with self._place(client), self._stream():
                    return await self._app(scope, receive, send)
            if scope["method"] != "POST":
                return await self._app(scope, receive, send)
            self._check(headers, scope["path"])
            with self._place(client):
                await self._app(scope, self._bounded(receive, scope["path"]), send)
        except Fault as fault:
            if scope["type"] == "http":
                await self._drain(receive)
            await fault.response()(scope, receive, send)

    @property
    def num_requests(self) -> int:
        """Requests that are being answered."""
        return self._clients.total()

    @property
    def has_room(self) -> bool:
        """Whether another request would be taken."""
        return self.num_requests < self._limits.max_requests

    def _client(self, scope: Scope, headers: Headers) -> str:
        """Who asks: by the key, or where none is needed by the address; 401 for a wrong key."""
        if not self._keys:
            return str((scope.get("client") or ("",))[0])
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # All are compared, in constant time, so that no time tells how much of a key is right.
        same = [hmac.compare_digest(given.strip().encode("utf-8", "replace"), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(same):
            raise Fault(401, "the key is missing or wrong; give one as Authorization: Bearer KEY", "invalid_api_key")
        return f"key {same.index(True)}"

    def _check(self, headers: Headers, path: str) -> None:
        """What the headers tell: the kind of the content and its length."""
        expected = _FORM if path.startswith(_UPLOADS) else _JSON
        if headers.get("content-type", "").partition(";")[0].strip().lower() != expected:
            raise Fault(415, f"Content-Type: expected {expected}", "unsupported_media_type")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most_bytes:
            raise self._too_large(path)

    def _too_large(self, path: str) -> Fault:
        most, param = self._limits.max_upload_mb, "file" if path.startswith(_UPLOADS) else None
        return Fault(413, f"the request is larger than {most:g} MB; send less, or compressed", "too_large", param)

    def _check_origin(self, headers: Headers) -> None:
        """A browser lets any page connect, and names the page; only one of this server may."""
        origin = headers.get("origin")
        if origin and origin.partition("://")[2] != headers.get("host"):
            raise Fault(403, "found another site's page; expected one of this server, or no browser", "forbidden")

    @contextmanager
    def _stream(self) -> Iterator[None]:
        if self._num_streams >= self._limits.max_streams:
            raise Fault(503, "the server has too many connections; try again soon", "overloaded", retry=True)
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1

    @contextmanager
    def _place(self, client: str) -> Iterator[None]:
        """A place among the requests that are answered, for as long as it is used."""
        if not self.has_room:
            raise Fault(503, "the server is full; try again soon", "overloaded", retry=True)
        if self._clients[client] >= self._limits.max_client_requests:
            raise Fault(
                429, "too many requests at once; wait for the answer to one of yours", "rate_limit_exceeded", retry=True
            )
        self._clients[client] += 1
        try:
            yield
        finally:
            self._clients[client] -= 1
            self._clients += Counter()  # forgets clients that have gone

    def _bounded(self, receive: Receive, path: str) -> Receive:
        """Messages as they come, while they are neither too many nor too late."""
        total, is_whole, end = 0, False, time.monotonic() + self._limits.upload_seconds

        async def bounded() -> Message:
            nonlocal total, is_whole
            if is_whole:
                return await receive()
            try:
                async with timeout(end - time.monotonic()):
                    message = await receive()
            except TimeoutError as error:
                limit = self._limits.upload_seconds
                raise Fault(408, f"the request did not arrive within {limit:g} s", "request_timeout") from error
            total += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if total > self._most_bytes:
                if not is_whole:
                    await self._drain(receive)
                raise self._too_large(path)
            return message

        return bounded

    async def _drain(self, receive: Receive) -> None:
        """Read what is still being sent, and forget it."""
        total, has_more = 0, True
        with suppress(TimeoutError):
            async with timeout(_DRAIN_SECONDS):
                while has_more and total < _DRAIN_TIMES * self._most_bytes:
                    message = await receive()
                    total += len(message.get("body", b""))
                    has_more = bool(message.get("more_body", False))
