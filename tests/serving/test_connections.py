"""Connections that say nothing, slowly; and what the log says of connections."""

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.transcribe import SpeechLM
from serving.conftest import connected, offline, running, wav

HEADERS = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\n"
LIMIT = 1.0


@pytest.fixture(scope="module")
def server(model: SpeechLM, settings: dict[str, Any]) -> Any:
    with running(model, ServeConfig(**{**settings, "api_keys": ""}, upload_seconds=LIMIT)) as server:
        yield server


def opened(server: Any) -> socket.socket:
    return socket.create_connection(server.servers[0].sockets[0].getsockname(), timeout=10)


@pytest.mark.parametrize("first", [b"", HEADERS, b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_headers_that_do_not_end_end_the_connection(server: Any, first: bytes):
    """At the start of a connection, and behind an answer; each byte that comes does not begin the time anew."""
    with opened(server) as connection:
        connection.sendall(first)
        begun = time.monotonic()
        while first.endswith(b"\r\n\r\n") and b'"ok"' not in connection.recv(4096):
            pass
        connection.settimeout(0.1)
        while time.monotonic() - begun < 5 * LIMIT:
            try:
                connection.sendall(b"x" if first != HEADERS else b"X: y\r\n")
                if connection.recv(4096) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert 0.8 * LIMIT < time.monotonic() - begun < 3 * LIMIT


def test_an_answer_may_take_longer_than_headers(server: Any, model: SpeechLM, gate: Any):
    client = connected(server)
    with ThreadPoolExecutor() as pool:
        found = pool.submit(client.audio.transcriptions.create, file=wav(5), model="asr")
        time.sleep(1.5 * LIMIT)
        gate.set()
        assert found.result().text == offline(model, 5).text
    assert client.audio.transcriptions.create(file=wav(5), model="asr").text == offline(model, 5).text


def test_realtime_connections_leave_no_line_in_the_log(server: Any, caplog: pytest.LogCaptureFixture):
    """What clients can fill it with stops the server where nobody reads it: a pipe holds 64 kB."""
    log, address = logging.getLogger("uvicorn"), server.address.replace("http", "ws") + "/v1/realtime"
    log.addHandler(caplog.handler)
    try:
        with connect(f"{address}?intent=transcription") as connection:
            assert "session.created" in str(connection.recv())
        with pytest.raises(InvalidStatus, match="400"), connect(address):
            pass
        assert caplog.messages == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server.service.app, "_app", None)
            with pytest.raises(InvalidStatus, match="500"), connect(f"{address}?intent=transcription"):
                pass
        assert [record.levelname for record in caplog.records] == ["ERROR"]  # what fails is told
    finally:
        log.removeHandler(caplog.handler)
