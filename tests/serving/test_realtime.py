"""What the official client hears over a realtime connection, beside a stream of the same samples without a server."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.decoding.vad import Vad
from rwkv_speech.models.parts import Parts
from rwkv_speech.serving.worker import Worker
from serving.conftest import connected, noise, running
from serving.realtime_steps import INTENT, alone, append, said, set_to, text, until


def test_a_committed_buffer_is_an_item(realtime_server: Any, model: SpeechLM):
    with connected(realtime_server).realtime.connect(extra_query=INTENT) as connection:
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


def test_an_rwkv7_model_says_what_it_says_alone(rwkv7_parts: Parts, limited: dict[str, Any]):
    model = SpeechLM.build(rwkv7_parts).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for x in model.trained_parameters():
            x.normal_(0, 0.5)
    with (
        running(model, ServeConfig(**limited)) as server,
        connected(server).realtime.connect(extra_query=INTENT) as connection,
    ):
        set_to(connection)
        for number in (1, 2):
            expected = text(alone(model, noise(number, 1.5)))
            assert said(connection, noise(number, 1.5))[-1].transcript == expected != ""


def test_words_come_while_the_buffer_is_open(realtime_server: Any):
    with connected(realtime_server).realtime.connect(extra_query=INTENT) as connection:
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
def test_what_is_set_changes_the_text(sent: Any, option: Any, realtime_server: Any, model: SpeechLM):
    with connected(realtime_server).realtime.connect(model="asr", extra_query=INTENT) as connection:
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


def test_telephone_samples_are_heard_as_libsndfile_reads_them(realtime_server: Any, model: SpeechLM):
    for law, subtype in (("pcmu", "ULAW"), ("pcma", "ALAW")):
        content = np.random.default_rng(3).integers(0, 256, 8_000, np.uint8)
        with connected(realtime_server).realtime.connect(extra_query=INTENT) as connection:
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


def test_logprobs_of_a_turn(realtime_server: Any, model: SpeechLM):
    with connected(realtime_server).realtime.connect(extra_query=INTENT) as connection:
        set_to(connection)
        assert said(connection, noise(1, 1.5))[-1].logprobs is None
        wanted = ["item.input_audio_transcription.logprobs"]
        connection.session.update(session={"type": "transcription", "include": wanted})
        assert until(connection, "session.updated")[-1].session.include == wanted
        *deltas, _, _, done = said(connection, noise(1, 1.5))
        connection.session.update(session={"type": "transcription", "include": []})
        until(connection, "session.updated")
        assert said(connection, noise(1, 1.5))[-1].logprobs is None
    content = b"".join(bytes(x.bytes) for delta in deltas for x in delta.logprobs)
    assert content.decode("utf-8", "replace").strip() == "".join(x.delta for x in deltas).strip() != ""
    segments = [x.segment for x in alone(model, noise(1, 1.5)) if x.segment]
    known = [(token, logprob) for x in segments for token, logprob in zip(x.tokens, x.logprobs or (), strict=False)]
    assert len(known) > 4 and [x.logprob for x in done.logprobs] == [logprob for _, logprob in known]
    assert [bytes(x.bytes) for x in done.logprobs] == [model.tokenizer.decode_bytes([token]) for token, _ in known]


@pytest.mark.parametrize(("before", "after", "size"), [(8_192, 16_000, 1_234), (3_200, 10_400, 16_000)])
def test_a_sound_without_words_is_an_empty_turn_and_what_is_cleared_is_gone(
    before: int, after: int, size: int, model: SpeechLM, limited: dict[str, Any], vad_by_loudness: None
):
    with (
        running(model, ServeConfig(**{**limited, "vad": "silero"})) as server,
        connected(server).realtime.connect(extra_query=INTENT) as connection,
    ):
        set_to(connection, model="st_en")
        silence, more = np.zeros(before, np.int16), np.zeros(after, np.int16)
        append(connection, np.concatenate([silence, noise(1, 0.1), more]), size)  # the second comes all at once
        assert until(connection, "conversation.item.input_audio_transcription.completed")[-1].transcript == ""
        append(connection, noise(1, 1.0))
        connection.input_audio_buffer.clear()
        until(connection, "input_audio_buffer.cleared")
        connection.input_audio_buffer.commit()
        assert connection.recv().error.code == "input_audio_buffer_commit_empty"


def test_connections_at_once_hear_what_each_hears_alone(realtime_server: Any, model: SpeechLM):
    def hear(number: int) -> str:
        with connected(realtime_server).realtime.connect(extra_query=INTENT) as connection:
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
