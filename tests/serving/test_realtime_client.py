"""What a realtime connection refuses, how it is bounded, and how it ends."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.streaming import Stream
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.serving.realtime import FRAME_BYTES
from serving.conftest import KEY, connected, noise, running
from serving.realtime_steps import INTENT, alone, append, said, set_to, text, until
from serving.test_limits import wait_until


def update(**given: Any) -> dict[str, Any]:
    return {"type": "session.update", "session": {"type": "transcription", "audio": {"input": given}}}


APPEND = {"type": "input_audio_buffer.append"}
BAD: dict[str, tuple[Any, str, str | None]] = {
    "no JSON": ("secret", "invalid_json", None),
    "a list": ([], "invalid_value", "event"),
    "type": ({"type": "response.create"}, "invalid_value", "event"),
    "no base64": ({**APPEND, "audio": "sec ret"}, "invalid_audio", "audio"),
    "half a sample": ({**APPEND, "audio": "AAAA"}, "invalid_audio", "audio"),
    "no audio": (APPEND, "missing_required_parameter", "audio"),
    "nothing to commit": ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty", None),
    "conversation": ({"type": "session.update", "session": {"type": "realtime"}}, "invalid_value", "type"),
    "model": (update(transcription={"model": "whisper-1"}), "model_not_found", "model"),
    "language": (update(transcription={"language": "not one"}), "invalid_value", "language"),
    "language of chat": (update(transcription={"model": "chat", "language": "en"}), "unsupported_value", "language"),
    "keywords": (update(transcription={"keywords": ["?!"]}), "invalid_value", "keywords"),
    "no transcription": (update(transcription=None), "invalid_value", "transcription"),
    "semantic": (update(turn_detection={"type": "semantic_vad"}), "invalid_value", "type"),
    "vad": (update(turn_detection={"type": "server_vad"}), "unsupported_value", "turn_detection"),
    "threshold": (update(turn_detection={"type": "server_vad", "threshold": 1.5}), "invalid_value", "threshold"),
    "silence": (
        update(turn_detection={"type": "server_vad", "silence_duration_ms": 1}),
        "invalid_value",
        "silence_duration_ms",
    ),
    "answers": (
        update(turn_detection={"type": "server_vad", "create_response": True}),
        "invalid_value",
        "create_response",
    ),
    "opus": (update(format={"type": "audio/opus"}), "invalid_value", "format"),
    "law": (update(format={"type": "audio/pcmu", "rate": 16_000}), "unknown_parameter", "rate"),
    "include": (
        {"type": "session.update", "session": {"type": "transcription", "include": ["item.all"]}},
        "invalid_value",
        "include",
    ),
    "rate": (update(format={"type": "audio/pcm", "rate": 10**9}), "invalid_value", "rate"),
    "noise": (update(noise_reduction={"type": "near_field"}), "invalid_value", "noise_reduction"),
}


def test_a_bad_event_is_told_and_the_connection_goes_on(realtime_server: Any, model: SpeechLM):
    with connected(realtime_server).realtime.connect(extra_query=INTENT) as connection:
        connection.recv()
        for name, (event, code, param) in BAD.items():
            connection.send_raw(event if isinstance(event, str) else json.dumps(event))
            found = connection.recv()
            assert (found.type, found.error.code, found.error.param) == ("error", code, param), name
            assert not any(word in found.error.message for word in ("secret", "/root", "Traceback"))
        connection.send_raw(b"bytes")
        assert connection.recv().type == "error"
        connection.send({"type": "input_audio_buffer.commit", "event_id": "mine"})
        assert connection.recv().error.event_id == "mine"
        set_to(connection)
        append(connection, noise(1))
        connection.send_raw(json.dumps(update(transcription={"language": "fr"})))
        assert connection.recv().error.code == "invalid_state"
        connection.input_audio_buffer.commit()
        done = until(connection, "conversation.item.input_audio_transcription.completed")[-1]
        assert done.transcript == text(alone(model, noise(1)))


def refused(server: Any, query: str = "?intent=transcription", key: str = KEY, **headers: str) -> tuple[int, str]:
    address = server.address.replace("http", "ws") + "/v1/realtime" + query
    with (
        pytest.raises(InvalidStatus) as caught,
        connect(address, additional_headers={"Authorization": f"Bearer {key}", **headers}),
    ):
        pass
    response = caught.value.response
    return response.status_code, json.loads(response.body or b"")["error"]["code"]


def test_what_may_not_connect_hears_why(realtime_server: Any):
    assert refused(realtime_server, key="wrong") == (401, "invalid_api_key")
    assert refused(realtime_server, "") == (400, "unsupported_value")
    assert refused(realtime_server, "?intent=transcription&model=whisper-1") == (404, "model_not_found")
    assert refused(realtime_server, Origin="http://another.example") == (403, "forbidden")
    open_ones = [connected(realtime_server).realtime.connect(extra_query=INTENT).enter() for _ in range(6)]
    assert refused(realtime_server) == (503, "overloaded")
    for connection in open_ones:
        connection.close()
    wait_until(lambda: realtime_server.service.app.num_requests == 0)
    with connected(realtime_server).realtime.connect(extra_query=INTENT) as connection:
        assert connection.recv().type == "session.created"


def closed(connection: Any) -> tuple[str | None, int]:
    """The code of the last error, and that of closing."""
    code = None
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            event = connection.recv()
            code = event.error.code if event.type == "error" else code
    assert caught.value.rcvd
    return code, caught.value.rcvd.code


def test_connections_are_bounded(model: SpeechLM, limited: dict[str, Any]):
    with (
        running(model, ServeConfig(**{**limited, "idle_seconds": 0.3})) as server,
        connected(server).realtime.connect(extra_query=INTENT) as silent,
    ):
        assert closed(silent) == ("idle_timeout", 1008)
    with running(model, ServeConfig(**{**limited, "stream_seconds": 2.0})) as server:

        def after(act: Callable[[Any], None]) -> tuple[str | None, int]:
            with connected(server).realtime.connect(extra_query=INTENT) as connection:
                act(connection)
                return closed(connection)

        def chatter(connection: Any) -> None:
            end = time.monotonic() + 2.2
            while time.monotonic() < end:
                connection.input_audio_buffer.clear()
                time.sleep(0.05)

        assert after(lambda connection: append(connection, noise(0, 5.0), 8_000)) == ("session_expired", 1008)
        assert after(lambda connection: connection.send_raw(" " * (FRAME_BYTES + 1))) == (None, 1009)
        assert after(chatter) == ("session_expired", 1008)
        wait_until(lambda: server.service.app.num_requests == 0)


def test_a_failure_ends_its_connection_alone(realtime_server: Any, monkeypatch: pytest.MonkeyPatch):
    with connected(realtime_server).realtime.connect(extra_query=INTENT) as connection, monkeypatch.context() as patch:
        patch.setattr(Stream, "push", lambda *args: 1 // 0)
        append(connection, noise(0))
        assert closed(connection) == ("server_error", 1011)
    with connected(realtime_server).realtime.connect(extra_query=INTENT) as other:
        set_to(other)
        assert said(other, noise(1))[-1].transcript


def test_the_server_ends_when_what_was_committed_is_told(model: SpeechLM, limited: dict[str, Any]):
    with running(model, ServeConfig(**limited)) as server:
        connection, other, silent = (connected(server).realtime.connect(extra_query=INTENT).enter() for _ in range(3))
        for one in (connection, other, silent):
            set_to(one)
        for number in (1, 2):
            append(connection, noise(number, 2.0))
            connection.input_audio_buffer.commit()
        append(other, noise(3, 1.0))  # what was not committed is not lost either
        server.should_exit = True
        found = [told(one) for one in (connection, other, silent)]
    expected = [text(alone(model, noise(number, seconds))) for number, seconds in ((1, 2.0), (2, 2.0), (3, 1.0))]
    assert found == [(expected[:2], 1001), (expected[2:], 1001), ([], 1001)]


def told(connection: Any) -> tuple[list[str], int]:
    """The transcripts until a connection is closed, and the code of closing."""
    found = list[str]()
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            event = connection.recv()
            found += [event.transcript] if event.type.endswith(".completed") else []
    assert caught.value.rcvd
    return found, caught.value.rcvd.code


def test_a_client_that_goes_on_speaking_does_not_keep_the_server(model: SpeechLM, limited: dict[str, Any]):
    with running(model, ServeConfig(**limited)) as server:
        connection = connected(server).realtime.connect(extra_query=INTENT).enter()
        set_to(connection)
        server.should_exit, end = True, time.monotonic() + 20
        with pytest.raises(ConnectionClosed):
            while time.monotonic() < end:
                append(connection, noise(0, 0.1))
                time.sleep(0.1)
        assert time.monotonic() < end - 10


def test_the_asynchronous_client_is_understood_too(realtime_server: Any):
    async def first() -> str:
        client = openai.AsyncOpenAI(base_url=f"{realtime_server.address}/v1", api_key=KEY)
        async with client.realtime.connect(extra_query=INTENT) as connection:
            return str((await connection.recv()).type)

    assert asyncio.run(first()) == "session.created"
