"""What the official client gets from a running server, beside what the same recording gives without one."""

import asyncio
import io
import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest
import srt
import webvtt
from fastapi import UploadFile
from hard_files import sound
from prometheus_client.parser import text_string_to_metric_families

from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.results import Segment, Transcript
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.decoding.transcriber import Transcriber
from rwkv_speech.decoding.writers import render
from rwkv_speech.serving.answers import Deltas, answer
from rwkv_speech.serving.events import Told
from rwkv_speech.serving.faults import Fault
from rwkv_speech.serving.form import Form
from serving.conftest import OPTIONS, connected, noise, offline, running, wav


def test_json_is_the_text_and_what_it_cost(client: openai.OpenAI, model: SpeechLM):
    found = client.audio.transcriptions.create(file=wav(0), model="asr")
    assert found.text == offline(model).text != "" and found.logprobs is None
    assert found.usage is not None and (found.usage.type, found.usage.seconds) == ("duration", len(noise(0)) / 16_000)


@pytest.mark.parametrize("form", ["text", "srt", "vtt"])
def test_texts_and_subtitles_come_as_they_are(form: Any, client: openai.OpenAI, model: SpeechLM):
    found: Any = client.audio.transcriptions.create(file=wav(1), model="asr", response_format=form)
    expected = offline(model, 1)
    assert type(found) is str and found == (f"{expected.text}\n" if form == "text" else render(expected, form))
    if form == "srt":
        assert len(list(srt.parse(found))) == len(expected.segments) == 1
    elif form == "vtt":
        assert len(webvtt.from_string(found)) == 1


@pytest.mark.parametrize("wanted", [[], ["segment"], ["word"], ["word", "segment"]], ids=str)
def test_verbose_json_has_the_times_that_are_asked_for(wanted: Any, client: openai.OpenAI, model: SpeechLM):
    more = {"timestamp_granularities": wanted} if wanted else {}
    found: Any = client.audio.transcriptions.create(
        file=wav(2), model="asr", response_format="verbose_json", language="en", **more
    )
    expected = offline(model, 2, word_timestamps="word" in wanted, language="en")
    assert (found.text, found.language, found.duration) == (expected.text, "en", len(noise(2)) / 16_000)
    assert found.task == "transcribe" and type(found.duration) is float
    if wanted == ["word"]:
        assert found.segments is None
    else:
        [segment], [same] = found.segments, expected.segments
        assert all(
            getattr(segment, name) == getattr(same, name) for name in type(segment).model_fields if name != "seek"
        )
        assert segment.seek == int(100 * same.start)
    if "word" in wanted:
        assert [(word.word, word.start, word.end) for word in found.words] == [
            (word.word.strip(), word.start, word.end) for word in expected.words
        ]
        assert len(found.words) > 0
    else:
        assert found.words is None


def test_logprobs_are_those_of_the_tokens(client: openai.OpenAI, model: SpeechLM):
    found = client.audio.transcriptions.create(file=wav(3), model="asr", include=["logprobs"])
    [segment] = offline(model, 3).segments
    assert found.logprobs and segment.logprobs
    assert [entry.logprob for entry in found.logprobs] == list(segment.logprobs[: len(segment.tokens)])
    content = bytes(int(byte) for entry in found.logprobs for byte in entry.bytes or [])
    assert content == model.tokenizer.decode_bytes(segment.tokens)
    assert math.isclose(sum(segment.logprobs) / len(segment.logprobs), segment.avg_logprob)


@pytest.mark.parametrize(
    ("sent", "option"),
    [
        ({"prompt": "the weather"}, {"initial_prompt": "the weather"}),
        ({"temperature": 0.9}, {"temperature": 0.9}),
        ({"keywords": ["is good\t20", "ab"]}, {"keywords": ["is good\t20", "ab"]}),
        ({"language": "fr"}, {"language": "fr"}),
        ({"languages": ["fr"]}, {"language": "fr"}),
        ({"model": "chat"}, {"task": "chat"}),
    ],
    ids=str,
)
def test_what_is_asked_for_changes_the_text(sent: Any, option: Any, client: openai.OpenAI, model: SpeechLM):
    """Beside a request that asks for nothing, in the same batch."""
    with ThreadPoolExecutor() as pool:
        plain = pool.submit(client.audio.transcriptions.create, file=wav(4), model="asr")
        found = client.audio.transcriptions.create(**{"file": wav(4), "model": "asr", **sent})
    assert found.text == offline(model, 4, **option).text
    assert plain.result().text == offline(model, 4).text != found.text


@pytest.mark.parametrize("include", [[], ["logprobs"]], ids=str)
def test_streamed_parts_are_the_whole(include: Any, client: openai.OpenAI, model: SpeechLM):
    upload = ("a.wav", sound(noise(7, 4.0), "WAV"))
    more = {"include": include} if include else {}
    *parts, last = client.audio.transcriptions.create(file=upload, model="asr", stream=True, **more)
    [expected] = model.transcribe(noise(7, 4.0), 4, "asr", **OPTIONS)
    assert len(parts) == len(expected.segments) > 3 and last.type == "transcript.text.done"
    assert "".join(part.delta for part in parts) == last.text == expected.text
    assert {part.type for part in parts} == {"transcript.text.delta"}
    if include:
        found = [[entry.logprob for entry in part.logprobs] for part in parts]
        assert found == [list(segment.logprobs[: len(segment.tokens)]) for segment in expected.segments]
        assert [entry.logprob for entry in last.logprobs] == [x for part in found for x in part]
    else:
        assert last.logprobs is None


def test_the_first_part_comes_before_the_recording_is_decoded(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
):
    """It is sent, and then decoding stops."""
    settled = Transcriber.settled

    def stopping(transcriber: Transcriber, key: Any) -> Any:
        found = settled(transcriber, key)
        if found:
            gate.clear()
        return found

    monkeypatch.setattr(Transcriber, "settled", stopping)
    gate.set()
    with client.audio.transcriptions.create(
        file=("a.wav", sound(noise(7, 4.5), "WAV")), model="asr", stream=True
    ) as events:
        assert next(events).type == "transcript.text.delta" and not gate.is_set()
        monkeypatch.setattr(Transcriber, "settled", settled)
        gate.set()
        assert [event.type for event in events][-1] == "transcript.text.done"


def test_chunks_are_cut_by_what_the_client_takes_for_speech(
    model: SpeechLM, settings: dict[str, Any], vad_by_loudness: None
):
    silence = np.zeros(8_000, np.int16)
    upload = ("a.wav", sound(np.concatenate([noise(1, 0.5), silence, noise(2, 0.5)]), "WAV"))

    def num_segments(chunking: Any) -> int:
        more = {"chunking_strategy": chunking, "response_format": "verbose_json"}
        return len(client.audio.transcriptions.create(file=upload, model="asr", **more).segments)

    with running(model, ServeConfig(**{**settings, "vad": "silero", "max_segment": 5.0})) as server:
        client = connected(server)
        for chunking, count in (
            ("auto", 2),
            ({"type": "server_vad"}, 2),
            ({"type": "server_vad", "silence_duration_ms": 800, "prefix_padding_ms": 200, "threshold": 0.4}, 1),
        ):
            assert num_segments(chunking) == count


def test_the_language_that_is_found_is_told(model: SpeechLM):
    found = Transcript("a", [], 1.0, "asr", "fr")
    for spoken, told in (("", [{"code": "fr"}]), ("fr", None)):
        form = Form.model_validate({"file": UploadFile(io.BytesIO()), "model": "asr", "language": spoken})
        assert json.loads(bytes(answer(form, found, model.tokenizer).body)).get("languages") == told
        [done] = Deltas(form, model.tokenizer).done(replace(found, text=""))
        assert done.get("languages") == told


def test_pieces_of_a_task_of_classes_vote_in_a_stream(model: SpeechLM):
    texts = ["anger", "joy", "anger"]
    segments = [
        Segment(i, float(i), i + 1.0, text, list(text.encode()), 0.0, 0.0, 1.0, 0.0, logprobs=(-float(i),) * 6)
        for i, text in enumerate(texts)
    ]
    form = Form.model_validate({"file": UploadFile(io.BytesIO()), "model": "emotion", "include[]": ["logprobs"]})
    found, deltas = Transcript("anger", segments, 3.0, "emotion"), Deltas(form, model.tokenizer)
    assert list(deltas.of(segments)) == []
    delta, done = deltas.done(found)
    assert delta["delta"] == done["text"] == "anger"
    assert [x["logprob"] for x in delta["logprobs"]] == [x["logprob"] for x in done["logprobs"]] == [0.0] * 5


def test_what_goes_wrong_in_a_stream_is_told(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(openai.BadRequestError, match="cannot be decoded"):  # before its first part
        client.audio.transcriptions.create(file=("a.wav", b"no" * 500), model="asr", stream=True)

    def fail(deltas: Deltas, found: Any) -> Any:
        raise Fault(413, "too long after all", "audio_too_long", "file")

    monkeypatch.setattr(Deltas, "done", fail)
    events = client.audio.transcriptions.create(file=("a.wav", sound(noise(7, 4.0), "WAV")), model="asr", stream=True)
    assert next(events).type == "transcript.text.delta"
    with pytest.raises(openai.APIError, match="too long after all") as caught:
        list(events)
    assert (caught.value.code, caught.value.param) == ("audio_too_long", "file")


def test_translation(client: openai.OpenAI, model: SpeechLM):
    found: Any = client.audio.translations.create(file=wav(1), model="st_en", response_format="verbose_json")
    expected = offline(model, 1, task="st_en")
    assert (found.text, found.language, found.task) == (expected.text, "english", "translate")
    assert [segment.text for segment in found.segments] == [segment.text for segment in expected.segments]
    assert client.audio.translations.create(file=wav(1), model="st_en", prompt="the").text != found.text
    assert client.audio.translations.create(file=wav(1), model="st_en", response_format="srt") == render(
        expected, "srt"
    )  # type: ignore[comparison-overlap]
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.translations.create(file=wav(1), model="asr")
    assert caught.value.param == "model"


def test_metrics_are_prometheus_text(client: openai.OpenAI, server: Any):
    def read() -> dict[str, float]:
        text = client._client.get(f"{server.address}/metrics").text
        samples = [x for family in text_string_to_metric_families(text) for x in family.samples]
        return {x.name + "".join(f" {value}" for value in x.labels.values()): x.value for x in samples}

    before = read()
    client.audio.transcriptions.create(file=wav(0), model="asr")
    client._client.get(f"{server.address}/a/path/that/is/none")
    after = read()
    path = "/v1/audio/transcriptions"
    for name, more in {
        f"rwkv_speech_requests_total {path} 200": 1,
        "rwkv_speech_requests_total other 404": 1,
        f"rwkv_speech_request_seconds_count {path}": 1,
        "rwkv_speech_audio_seconds_total": len(noise(0)) / 16_000,
    }.items():
        assert after[name] - before.get(name, 0) == pytest.approx(more)
    assert after["rwkv_speech_requests_in_flight"] == 0 and not any("that" in name for name in after)


def test_sixteen_clients_get_what_one_alone_gets(server: Any, model: SpeechLM):
    expected = [offline(model, number).text for number in range(16)]
    clients = [connected(server) for _ in expected]

    def text(number: int) -> str:
        return clients[number % 16].audio.transcriptions.create(file=wav(number % 16), model="asr").text

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(text, range(32))) == expected * 2
    assert len(set(expected)) > 8  # else another's text would not show


def test_each_state_is_a_model(client: openai.OpenAI):
    assert {found.id for found in client.models.list()} == {"asr", "asr_fr", "chat", "st_en"}
    assert client.models.retrieve("asr").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("whisper-1")
    assert caught.value.code == "model_not_found"


def test_health_needs_no_key(server: Any):
    http = connected(server, "none")._client
    assert http.get(f"{server.address}/health/live").json() == {"status": "ok"}
    assert http.get(f"{server.address}/health/ready").json() == {"status": "ok"}
    assert [http.head(f"{server.address}/health/{name}").status_code for name in ("live", "ready")] == [200, 200]


@pytest.mark.parametrize("steps", range(6))
def test_a_cancellation_that_comes_together_with_a_part_is_not_forgotten(steps: int):
    async def is_told() -> bool:
        told = list[Callable[[str], None]]()

        def submit(tell: Callable[[str], None]) -> Future[str]:
            told.append(tell)
            return Future()

        waiting = asyncio.ensure_future(anext(Told(submit, lambda: None).parts(10)))
        await asyncio.sleep(0.01)
        told[0]("part")
        for _ in range(steps):  # of the event loop
            await asyncio.sleep(0)
        was_asked = waiting.cancel()
        await asyncio.wait([waiting])
        return waiting.cancelled() == was_asked

    assert asyncio.run(is_told())
