"""Uploads that come in odd ways, byte by byte from a socket."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.serving import guard
from serving.conftest import connected, running, wav


@pytest.fixture(scope="module")
def server(model: SpeechLM, settings: dict[str, Any]) -> Iterator[Any]:
    with running(model, ServeConfig(**{**settings, "api_keys": "", "upload_seconds": 2})) as server:
        yield server


def asked(server: Any, *headers: str) -> socket.socket:
    host, port = server.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    kind = "Content-Type: multipart/form-data; boundary=x"
    lines = ["POST /v1/audio/transcriptions HTTP/1.1", "Host: a", "Connection: close", kind, *headers, "", ""]
    connection.sendall("\r\n".join(lines).encode())
    return connection


def answered(connection: socket.socket) -> tuple[int, str]:
    with connection, connection.makefile("rb") as file:
        head, _, body = file.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_an_upload_that_does_not_come_is_given_up(server: Any):
    begun = time.monotonic()
    connection = asked(server, "Content-Length: 1000")
    connection.sendall(b"--x\r\n")
    assert answered(connection) == (408, "request_timeout")
    assert 2 <= time.monotonic() - begun < 15 and server.service.app.num_requests == 0


def test_an_upload_without_a_length_is_counted(server: Any):
    connection = asked(server, "Transfer-Encoding: chunked")
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + bytes(50_000)
    for _ in range(30):  # more than a connection holds that nobody reads
        connection.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
    connection.sendall(b"0\r\n\r\n")
    assert answered(connection) == (413, "too_large")


def test_a_length_that_is_too_large_is_refused_unseen(server: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "_DRAIN_SECONDS", 0.1)
    assert answered(asked(server, "Content-Length: 200001")) == (413, "too_large")
    assert answered(asked(server, "Content-Length: 0")) == (422, "missing_required_parameter")


def test_a_client_that_goes_while_it_sends_leaves_its_place(server: Any):
    connection = asked(server, "Content-Length: 1000")
    end = time.monotonic() + 10
    while not server.service.app.num_requests:
        assert time.monotonic() < end
    connection.close()
    while server.service.app.num_requests:
        assert time.monotonic() < end
    assert connected(server).audio.transcriptions.create(file=wav(0), model="asr").text


def test_a_client_that_sends_far_too_much_hears_why(server: Any):
    with pytest.raises(openai.APIStatusError) as caught:
        connected(server).audio.transcriptions.create(file=("a", bytes(5_000_000)), model="asr")
    assert (caught.value.status_code, caught.value.code) == (413, "too_large")
