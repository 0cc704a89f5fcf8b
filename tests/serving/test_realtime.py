"""What the official client hears over a realtime connection, beside a stream of the same samples without a server."""

import asyncio
import base64
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
import torch
from torch import Tensor
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.streaming import Committed, Stream
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.decoding.vad import WINDOW, Vad
from rwkv_speech.serving.realtime import FRAME_BYTES
from serving.conftest import KEY, OPTIONS, connected, noise, running
from serving.test_limits import wait_until

INTENT = {"intent": "transcription"}


@pytest.fixture(scope="module")
def limited(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "idle_seconds": 20.0, "max_streams": 6, "max_segment": 2.0}


@pytest.fixture(scope="module")
def server(model: SpeechLM, limited: dict[str, Any]) -> Iterator[Any]:
    with running(model, ServeConfig(**limited)) as server:
        yield server


@pytest.fixture
def vad_by_loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(vad: Vad, samples: Tensor) -> Tensor:
        return torch.tensor([float(x.square().mean() > 1e-6) for x in samples.split(WINDOW)])

    monkeypatch.setattr(Vad, "block", block)


def set_to(connection: Any, rate: int = 16_000, **transcription: Any) -> Any:
    found = {"model": "asr", **transcription}
    audio = {"format": {"type": "audio/pcm", "rate": rate}, "transcription": found}
    connection.session.update(session={"type": "transcription", "audio": {"input": audio}})
    return until(connection, "session.updated")[-1]


def until(connection: Any, kind: str) -> list[Any]:
    events = list[Any]()
    while not events or events[-1].type not in (kind, "error"):
        events.append(connection.recv())
    assert events[-1].type == kind, events[-1]
    return events


def append(connection: Any, samples: np.ndarray, size: int = 1_234) -> None:
    for start in range(0, len(samples), size):
        part = base64.b64encode(samples[start : start + size].tobytes()).decode()
        connection.input_audio_buffer.append(audio=part)


def said(connection: Any, samples: np.ndarray) -> list[Any]:
    append(connection, samples)
    connection.input_audio_buffer.commit()
    return until(connection, "conversation.item.input_audio_transcription.completed")


def alone(model: SpeechLM, samples: np.ndarray, **options: Any) -> list[Committed]:
    """What a stream commits."""
    stream = model.stream(**{**OPTIONS, "commit": "word", "max_segment": 2.0, "hold": 0.2, "pace": 0.125, **options})
    return [x for x in [*stream.push(samples), *stream.finish()] if isinstance(x, Committed)]


def text(found: list[Committed]) -> str:
    return "".join(x.text for x in found).strip()


def test_a_committed_buffer_is_an_item(server: Any, model: SpeechLM):
    with connected(server).realtime.connect(extra_query=INTENT) as connection:
        created = connection.recv()
        assert created.type == "session.created" and created.session.audio.input.turn_detection is None
        assert set_to(connection).session.audio.input.format.rate == 16_000
        ids = list[str]()
        for number, seconds in ((1, 1.5), (2, 3.0)):
            *deltas, committed, added, done = said(connection, noise(number, seconds))
            assert {x.type for x in deltas} == {"conversation.item.input_audio_transcription.delta"}
            expected = text(alone(model, noise(number, seconds)))
            assert "".join(x.delta for x in deltas).strip() == done.transcript == expected != ""
            assert done.usage.seconds == pytest.approx(len(noise(number, seconds)) / 16_000)
            assert {x.item_id for x in (*deltas, committed, done)} == {added.item.id}
            assert committed.previous_item_id == (ids[-1] if ids else None)
            ids.append(done.item_id)


def test_words_come_while_the_buffer_is_open(server: Any):
    with connected(server).realtime.connect(extra_query=INTENT) as connection:
        set_to(connection, delay="minimal")
        append(connection, noise(2, 3.0))
        assert until(connection, "conversation.item.input_audio_transcription.delta")[-1].delta


@pytest.mark.parametrize(
    ("sent", "option"),
    [
        ({"prompt": "the weather"}, {"initial_prompt": "the weather"}),
        ({"keywords": ["is good\t20", "ab"]}, {"keywords": ["is good\t20", "ab"]}),
        ({"language": "fr"}, {"language": "fr", "task": "asr_fr"}),
        ({"model": "asr_fr"}, {"task": "asr_fr"}),
        ({"model": "st_en"}, {"task": "st_en", "commit": "segment"}),
        ({"rate": 24_000}, {"sample_rate": 24_000}),
    ],
    ids=str,
)
def test_what_is_set_changes_the_text(sent: Any, option: Any, server: Any, model: SpeechLM):
    with connected(server).realtime.connect(model="asr", extra_query=INTENT) as connection:
        set_to(connection, **sent)
        found = said(connection, noise(4))[-1].transcript
    assert found == text(alone(model, noise(4), **option)) != text(alone(model, noise(4)))


def test_turns_are_found_by_the_vad(model: SpeechLM, limited: dict[str, Any], vad_by_loudness: None):
    silence = np.zeros(16_000, np.int16)
    samples = np.concatenate([silence, noise(1, 1.0), silence, noise(2, 1.5), silence])
    with (
        running(model, ServeConfig(**{**limited, "vad": "silero"})) as server,
        connected(server).realtime.connect(extra_query=INTENT) as connection,
    ):
        assert connection.recv().session.audio.input.turn_detection.type == "server_vad"
        set_to(connection)
        append(connection, samples)
        turns = [until(connection, "conversation.item.input_audio_transcription.completed") for _ in range(2)]
        connection.input_audio_buffer.commit()
        assert connection.recv().error.code == "input_audio_buffer_commit_empty"
    expected = [x.segment for x in alone(model, samples, vad="silero") if x.segment]
    assert len(expected) == 2 and expected[0].text != expected[1].text
    for segment, events in zip(expected, turns, strict=True):
        started, *deltas, stopped, _, _, done = events
        assert (started.type, stopped.type) == tuple(f"input_audio_buffer.speech_{x}" for x in ("started", "stopped"))
        assert done.transcript == segment.text.strip() == "".join(x.delta for x in deltas).strip()
        assert abs(started.audio_start_ms - 1000 * segment.start) < 150
        assert stopped.audio_end_ms == round(1000 * segment.end)
        assert started.item_id == stopped.item_id == done.item_id


def test_a_sound_without_words_is_an_empty_turn_and_what_is_cleared_is_gone(
    model: SpeechLM, limited: dict[str, Any], vad_by_loudness: None
):
    with (
        running(model, ServeConfig(**{**limited, "vad": "silero"})) as server,
        connected(server).realtime.connect(extra_query=INTENT) as connection,
    ):
        set_to(connection, model="st_en")
        append(connection, np.concatenate([np.zeros(8_192, np.int16), noise(1, 0.1), np.zeros(16_000, np.int16)]))
        assert until(connection, "conversation.item.input_audio_transcription.completed")[-1].transcript == ""
        append(connection, noise(1, 1.0))
        connection.input_audio_buffer.clear()
        until(connection, "input_audio_buffer.cleared")
        connection.input_audio_buffer.commit()
        assert connection.recv().error.code == "input_audio_buffer_commit_empty"


def test_connections_at_once_hear_what_each_hears_alone(server: Any, model: SpeechLM):
    def hear(number: int) -> str:
        with connected(server).realtime.connect(extra_query=INTENT) as connection:
            set_to(connection)
            return str(said(connection, noise(number, 1.0))[-1].transcript)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(hear, range(6)))
    assert found == [text(alone(model, noise(number, 1.0))) for number in range(6)] and len(set(found)) > 4


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
    "threshold": (
        update(turn_detection={"type": "server_vad", "threshold": 0.9}),
        "unknown_parameter",
        "threshold",
    ),
    "law": (update(format={"type": "audio/pcmu"}), "invalid_value", "type"),
    "rate": (update(format={"type": "audio/pcm", "rate": 10**9}), "invalid_value", "rate"),
    "noise": (update(noise_reduction={"type": "near_field"}), "invalid_value", "noise_reduction"),
}


def test_a_bad_event_is_told_and_the_connection_goes_on(server: Any, model: SpeechLM):
    with connected(server).realtime.connect(extra_query=INTENT) as connection:
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


def test_what_may_not_connect_hears_why(server: Any):
    assert refused(server, key="wrong") == (401, "invalid_api_key")
    assert refused(server, "") == (400, "unsupported_value")
    assert refused(server, "?intent=transcription&model=whisper-1") == (404, "model_not_found")
    assert refused(server, Origin="http://another.example") == (403, "forbidden")
    open_ones = [connected(server).realtime.connect(extra_query=INTENT).enter() for _ in range(6)]
    assert refused(server) == (503, "overloaded")
    for connection in open_ones:
        connection.close()
    wait_until(lambda: server.service.app.num_requests == 0)
    with connected(server).realtime.connect(extra_query=INTENT) as connection:
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


def test_a_failure_ends_its_connection_alone(server: Any, monkeypatch: pytest.MonkeyPatch):
    with connected(server).realtime.connect(extra_query=INTENT) as connection, monkeypatch.context() as patch:
        patch.setattr(Stream, "push", lambda *args: 1 // 0)
        append(connection, noise(0))
        assert closed(connection) == ("server_error", 1011)
    with connected(server).realtime.connect(extra_query=INTENT) as other:
        set_to(other)
        assert said(other, noise(1))[-1].transcript


def test_the_server_ends_with_a_connection_open(model: SpeechLM, limited: dict[str, Any]):
    with running(model, ServeConfig(**limited)) as server:
        connection = connected(server).realtime.connect(extra_query=INTENT).enter()
        connection.recv()
        server.should_exit = True
        assert closed(connection)[1] in (1001, 1012)


def test_the_asynchronous_client_is_understood_too(server: Any):
    async def first() -> str:
        client = openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key=KEY)
        async with client.realtime.connect(extra_query=INTENT) as connection:
            return str((await connection.recv()).type)

    assert asyncio.run(first()) == "session.created"
