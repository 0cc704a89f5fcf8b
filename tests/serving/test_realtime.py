"""What the official client hears over a realtime connection, beside a stream of the same samples without a server."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import openai
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.streaming import Committed, Stream
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.decoding.vad import Vad
from rwkv_speech.serving.realtime import FRAME_BYTES
from rwkv_speech.serving.worker import Worker
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
    """What a stream commits, in segments: those of the whole recording."""
    stream = model.stream(**{**OPTIONS, "max_segment": 2.0, **options})
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
            assert done.transcript == expected != "" and all(x.delta for x in deltas)
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
        ({"model": "st_en"}, {"task": "st_en"}),
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
        started, *_, stopped, _, _, done = events
        assert (started.type, stopped.type) == tuple(f"input_audio_buffer.speech_{x}" for x in ("started", "stopped"))
        assert done.transcript == segment.text.strip()
        assert abs(started.audio_start_ms - 1000 * segment.start) < 150
        assert stopped.audio_end_ms == round(1000 * segment.end)
        assert started.item_id == stopped.item_id == done.item_id


def turns_of(connection: Any, samples: np.ndarray, **detection: Any) -> list[tuple[int, int]]:
    """Where turns begin and end, in milliseconds."""
    audio = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": {"type": "server_vad", **detection}}
    connection.session.update(session={"type": "transcription", "audio": {"input": audio}})
    described = until(connection, "session.updated")[-1].session.audio.input.turn_detection
    assert {name: getattr(described, name) for name in detection} == detection
    append(connection, samples, 8_000)
    connection.input_audio_buffer.clear()
    events = until(connection, "input_audio_buffer.cleared")
    starts = [x.audio_start_ms for x in events if x.type == "input_audio_buffer.speech_started"]
    ends = [x.audio_end_ms for x in events if x.type == "input_audio_buffer.speech_stopped"]
    return list(zip(starts, ends, strict=True))


def test_turn_detection_is_tuned(
    model: SpeechLM, limited: dict[str, Any], vad_by_loudness: None, monkeypatch: pytest.MonkeyPatch
):
    by_loudness = Vad.block
    monkeypatch.setattr(Vad, "block", lambda *given: 0.7 * by_loudness(*given))
    silence, gap = np.zeros(16_000, np.int16), np.zeros(8_000, np.int16)
    samples = np.concatenate([silence, noise(1, 0.5), gap, noise(2, 0.5), silence, gap])  # of 520, 500 and 540 ms
    with (
        running(model, ServeConfig(**{**limited, "vad": "silero", "max_segment": 5.0})) as server,
        connected(server).realtime.connect(extra_query=INTENT) as connection,
    ):
        connection.recv()
        usual, joined, padded, none = (
            turns_of(connection, samples, **detection)
            for detection in (
                {},
                {"silence_duration_ms": 800},
                {"prefix_padding_ms": 400, "threshold": 0.6},
                {"threshold": 0.8},
            )
        )
    assert none == []
    assert len(usual) == len(padded) == 2 and len(joined) == 1
    assert abs(usual[0][0] - 900) < 40 and abs(usual[1][0] - 1_920) < 40
    offset = len(samples) // 16  # the second and third time
    assert abs(joined[0][0] - offset - usual[0][0]) < 40 and abs(joined[0][1] - offset - usual[1][1]) < 40
    assert abs(padded[0][0] - 2 * offset - 600) < 40
    # It does not reach into the turn before.
    assert padded[1][0] >= padded[0][1] and abs(padded[1][0] - 2 * offset - 1_620) < 40


def test_telephone_samples_are_heard_as_libsndfile_reads_them(server: Any, model: SpeechLM):
    for law, subtype in (("pcmu", "ULAW"), ("pcma", "ALAW")):
        content = np.random.default_rng(3).integers(0, 256, 8_000, np.uint8)
        with connected(server).realtime.connect(extra_query=INTENT) as connection:
            audio = {"format": {"type": f"audio/{law}"}, "transcription": {"model": "asr"}, "turn_detection": None}
            connection.session.update(session={"type": "transcription", "audio": {"input": audio}})
            assert until(connection, "session.updated")[-1].session.audio.input.format.type == f"audio/{law}"
            done = said(connection, content)[-1]
        samples = decoded(content, subtype)
        assert done.transcript == text(alone(model, samples, sample_rate=8_000)) != ""
        assert done.usage.seconds == 1.0


def decoded(content: np.ndarray, law: str) -> np.ndarray:
    """G.711 by the standard's own words: sign, three bits of exponent, four of mantissa."""
    x = content.astype(int) ^ (0xFF if law == "ULAW" else 0x55)
    exponent, mantissa, is_set = x >> 4 & 7, x & 15, x >> 7 == 1
    if law == "ULAW":
        size, is_negative = ((2 * mantissa + 33) << exponent + 2) - 132, is_set
    else:
        size = np.where(exponent == 0, 16 * mantissa + 8, (16 * mantissa + 264) << np.maximum(exponent - 1, 0))
        is_negative = ~is_set
    return np.where(is_negative, -size, size).astype(np.int16)


def test_logprobs_of_a_turn(server: Any, model: SpeechLM):
    with connected(server).realtime.connect(extra_query=INTENT) as connection:
        set_to(connection)
        assert said(connection, noise(1, 1.5))[-1].logprobs is None
        wanted = ["item.input_audio_transcription.logprobs"]
        connection.session.update(session={"type": "transcription", "include": wanted})
        assert until(connection, "session.updated")[-1].session.include == wanted
        done = said(connection, noise(1, 1.5))[-1]
        connection.session.update(session={"type": "transcription", "include": []})
        until(connection, "session.updated")
        assert said(connection, noise(1, 1.5))[-1].logprobs is None
    segments = [x.segment for x in alone(model, noise(1, 1.5)) if x.segment]
    known = [(token, logprob) for x in segments for token, logprob in zip(x.tokens, x.logprobs or (), strict=False)]
    assert len(known) > 4 and [x.logprob for x in done.logprobs] == [logprob for _, logprob in known]
    assert [bytes(x.bytes) for x in done.logprobs] == [model.tokenizer.decode_bytes([token]) for token, _ in known]


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


def test_who_has_no_words_yet_is_looked_at_before_the_others(model: SpeechLM):
    worker, done, gate = Worker(model, Options.given(), 1), list[str](), threading.Event()
    worker.run(gate.wait)
    late = [worker.run_late(partial(done.append, name), due) for name, due in (("c", 2.0), ("a", 1.0), ("b", 1.0))]
    first = worker.run(partial(done.append, "audio"))
    gate.set()
    for future in (*late, first):
        future.result(20)
    assert done == ["audio", "a", "b", "c"]
    worker.close()


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


def test_the_asynchronous_client_is_understood_too(server: Any):
    async def first() -> str:
        client = openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key=KEY)
        async with client.realtime.connect(extra_query=INTENT) as connection:
            return str((await connection.recv()).type)

    assert asyncio.run(first()) == "session.created"
