"""What the official client gets from a running server, beside what the same recording gives without one."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import srt
import webvtt
from hard_files import sound
from prometheus_client.parser import text_string_to_metric_families

from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.decoding.transcriber import Transcriber
from rwkv_speech.decoding.writers import render
from rwkv_speech.errors import UserError
from rwkv_speech.models.parts import Parts
from rwkv_speech.serving.answers import Deltas
from rwkv_speech.serving.faults import Fault
from rwkv_speech.serving.server import read_keys
from serving.conftest import OPTIONS, connected, noise, running, wav

ROOT = Path(__file__).parents[2]


def offline(model: SpeechLM, number: int = 0, **options: Any) -> Any:
    task = options.pop("task", "asr")
    [found] = model.transcribe(noise(number), 4, task, **{**OPTIONS, **options})
    return found


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, nothing is decoded."""
    gate, poll = threading.Event(), Transcriber.poll
    monkeypatch.setattr(Transcriber, "poll", lambda mine: poll(mine) if gate.wait(0.01) else [])
    return gate


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


WAV = wav(0)[1]
LONG = sound(np.zeros(16_000 * 36_000 // 600, np.int16), "FLAC")  # a minute of silence in little space
KINDS = {
    400: openai.BadRequestError,
    404: openai.NotFoundError,
    413: openai.APIStatusError,
    422: openai.UnprocessableEntityError,
}
SENT: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "model unknown": ({"model": "whisper-1"}, 404, "model_not_found", "model"),
    "model a path": ({"model": "../../etc/passwd"}, 404, "model_not_found", "model"),
    "file empty": ({"file": ("secret.wav", b"")}, 400, "invalid_audio", "file"),
    "file no audio": ({"file": ("secret.wav", b"no" * 500)}, 400, "invalid_audio", "file"),
    "file cut": ({"file": ("secret.wav", WAV[:9_000])}, 400, "invalid_audio", "file"),
    "file NaN": (
        {"file": ("secret.wav", sound(np.full(900, np.nan, np.float32), "WAV", "FLOAT"))},
        400, "invalid_audio", "file",
    ),
    "file too long": ({"file": ("secret.flac", LONG)}, 413, "audio_too_long", "file"),
    "file too large": ({"file": ("secret", bytes(300_000))}, 413, "too_large", "file"),
    "temperature a word": ({"temperature": "hot"}, 422, "invalid_value", "temperature"),
    "temperature high": ({"temperature": 1.5}, 422, "invalid_value", "temperature"),
    "temperature nan": ({"temperature": math.nan}, 422, "invalid_value", "temperature"),
    "format": ({"response_format": "xml"}, 422, "invalid_value", "response_format"),
    "speakers": (
        {"response_format": "diarized_json"}, 422, "invalid_value", "response_format",
    ),
    "stream of subtitles": ({"stream": True, "response_format": "srt"}, 400, "unsupported_value", "stream"),
    "times in json": (
        {"timestamp_granularities": ["word"]}, 400, "unsupported_value", "timestamp_granularities",
    ),
    "times of phrases": (
        {"timestamp_granularities": ["phrase"], "response_format": "verbose_json"},
        422, "invalid_value", "timestamp_granularities",
    ),
    "times of an answer": (
        {"model": "chat", "timestamp_granularities": ["word"], "response_format": "verbose_json"},
        400, "unsupported_value", "timestamp_granularities",
    ),
    "logprobs of text": (
        {"include": ["logprobs"], "response_format": "text"}, 400, "unsupported_value", "include",
    ),
    "include": ({"include": ["everything"]}, 422, "invalid_value", "include"),
    "language a text": ({"language": "good English"}, 422, "invalid_value", "language"),
    "language of chat": (
        {"model": "chat", "language": "en"}, 400, "unsupported_value", "language",
    ),
    "language of another": (
        {"model": "asr_fr", "language": "de"}, 400, "unsupported_value", "language",
    ),
    "languages": ({"languages": ["en", "fr"]}, 422, "invalid_value", "languages"),
    "language twice": (
        {"language": "en", "languages": ["fr"]}, 400, "unsupported_value", "languages",
    ),
    "keywords none": ({"keywords": ["?!"]}, 400, "invalid_value", "keywords"),
    "keywords many": ({"keywords": ["a"] * 101}, 422, "invalid_value", "keywords"),
    "prompt long": ({"prompt": "a" * 5_000}, 422, "invalid_value", "prompt"),
    "known speakers": (
        {"known_speaker_names": ["Ann"]}, 422, "unknown_parameter", "known_speaker_names",
    ),
    "chunking of a server without a VAD": (
        {"chunking_strategy": "auto"}, 400, "unsupported_value", "chunking_strategy",
    ),
    "chunking": (
        {"chunking_strategy": {"type": "server_vad"}},
        422, "unknown_parameter", "chunking_strategy",
    ),
    "field unknown": (
        {"extra_body": {"best_of": 5}}, 422, "unknown_parameter", "best_of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SENT)
def test_a_bad_request_is_answered_by_the_right_error(name: str, client: openai.OpenAI):
    sent, status, code, param = SENT[name]
    with pytest.raises(openai.APIStatusError) as caught:
        client.audio.transcriptions.create(**{"file": ("secret.wav", WAV), "model": "asr", **sent})
    error = caught.value
    assert (type(error), error.status_code, error.code, error.param) == (KINDS[status], status, code, param)
    assert error.type == "invalid_request_error" and isinstance(error.body, dict) and error.body["message"]
    assert not any(word in str(error.body) for word in ("secret", "passwd", "a-key", "/", "\\", "Traceback"))


def multipart(client: openai.OpenAI, fields: dict[str, Any], **headers: str) -> Any:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    parts = [f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in fields.items()]
    content = "".join([*parts, "--x--\r\n"]).encode()
    url = f"{client.base_url}audio/transcriptions"
    return client._client.post(url, content=content, headers={**client.auth_headers, **kind, **headers})


def test_requests_that_the_client_would_not_make(client: openai.OpenAI):
    def told(response: Any) -> tuple[Any, ...]:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and "YTpi" not in error["message"]
        return response.status_code, error["code"], error["param"]

    assert told(multipart(client, {"model": "asr"})) == (422, "missing_required_parameter", "file")
    assert told(multipart(client, {"model": "asr", "file": "text"})) == (422, "invalid_value", "file")
    assert told(multipart(client, {"a": ""}, **{"Content-Type": "application/json"})) == (
        415,
        "unsupported_media_type",
        None,
    )
    assert told(multipart(client, {"a": ""}, **{"Content-Type": "multipart/form-data"})) == (
        400,
        "invalid_request",
        None,
    )
    http, url = client._client, str(client.base_url)
    assert told(http.get(f"{url}audio/transcriptions", headers=client.auth_headers)) == (
        405,
        "method_not_allowed",
        None,
    )
    assert told(http.get(f"{url}nothing", headers=client.auth_headers)) == (404, "not_found", None)
    for headers in ({}, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer wrong"}):
        assert told(http.get(f"{url}models", headers=headers)) == (401, "invalid_api_key", None)


def test_a_wrong_key_is_an_authentication_error(server: Any):
    with pytest.raises(openai.AuthenticationError) as caught:
        connected(server, "wrong").audio.transcriptions.create(file=wav(0), model="asr")
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")


def test_a_model_without_ctc_head_has_no_times_of_words(client: openai.OpenAI, model: SpeechLM):
    head, model.ctc = model.ctc, None
    try:
        with pytest.raises(openai.BadRequestError) as caught:
            client.audio.transcriptions.create(
                file=wav(0), model="asr", response_format="verbose_json", timestamp_granularities=["word"]
            )
    finally:
        model.ctc = head
    assert caught.value.param == "timestamp_granularities"


@pytest.fixture
def open_to_all(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "api_keys": ""}


def test_a_full_server_says_when_to_come_again_and_answers_what_it_took_before_it_ends(
    model: SpeechLM, open_to_all: dict[str, Any], gate: threading.Event
):
    with running(model, ServeConfig(**open_to_all, max_requests=3, max_client_requests=2)) as server:
        client = connected(server)
        with ThreadPoolExecutor() as pool:
            first = [pool.submit(client.audio.transcriptions.create, file=wav(5), model="asr") for _ in range(2)]
            wait_until(lambda: server.service.app.num_requests == 2)
            with pytest.raises(openai.RateLimitError) as caught:
                client.audio.transcriptions.create(file=wav(6), model="asr")
            assert caught.value.code == "rate_limit_exceeded" and caught.value.response.headers["Retry-After"] == "1"
            server.service.app._clients["another"] = 1
            with pytest.raises(openai.InternalServerError) as full:
                client.audio.transcriptions.create(file=wav(6), model="asr")
            assert (full.value.status_code, full.value.code) == (503, "overloaded")
            assert full.value.response.headers["Retry-After"] == "1"
            ready = client._client.get(f"{server.address}/health/ready")
            assert (ready.status_code, ready.json()) == (503, {"status": "busy"})
            server.should_exit = True
            gate.set()
            assert [future.result().text for future in first] == [offline(model, 5).text] * 2


def test_a_client_that_goes_leaves_the_batch(model: SpeechLM, open_to_all: dict[str, Any], gate: threading.Event):
    with running(model, ServeConfig(**open_to_all)) as server:
        with pytest.raises(openai.APITimeoutError):
            connected(server).with_options(timeout=0.3).audio.transcriptions.create(file=wav(5), model="asr")
        wait_until(lambda: not server.service._worker._futures and server.service.app.num_requests == 0)
        assert server.service._worker._transcriber._engine.num_unfinished == 0


def test_what_takes_too_long_leaves_the_batch(model: SpeechLM, open_to_all: dict[str, Any], gate: threading.Event):
    with running(model, ServeConfig(**open_to_all, request_seconds=0.3)) as server:
        with pytest.raises(openai.InternalServerError) as caught:
            connected(server).audio.transcriptions.create(file=wav(5), model="asr")
        assert (caught.value.status_code, caught.value.code) == (503, "timeout")
        assert caught.value.response.headers["x-should-retry"] == "false"
        wait_until(lambda: not server.service._worker._futures)
        assert server.service._worker._transcriber._engine.num_unfinished == 0


def test_a_recording_on_which_decoding_fails_does_not_end_the_server(
    client: openai.OpenAI, model: SpeechLM, monkeypatch: pytest.MonkeyPatch
):
    def fail(transcriber: Transcriber) -> Any:
        raise RuntimeError("in /root/secret")

    with monkeypatch.context() as patch:
        patch.setattr(Transcriber, "poll", fail)
        with pytest.raises(openai.InternalServerError) as caught:
            client.audio.transcriptions.create(file=wav(0), model="asr")
    assert (caught.value.status_code, caught.value.code) == (500, "server_error") and "secret" not in str(caught.value)
    assert client.audio.transcriptions.create(file=wav(0), model="asr").text == offline(model).text


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_uploaded_file_is_gone_after_its_request(client: openai.OpenAI, server: Any):
    client.audio.transcriptions.create(file=("a.flac", sound(noise(0, 4.0), "WAV")), model="asr")

    def temporary() -> list[str]:
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return [link for link in links if "deleted" in link and "/tmp" in link]

    before = len(temporary())
    client.audio.transcriptions.create(file=("a.wav", sound(noise(0, 4.0), "WAV")), model="asr")
    assert len(temporary()) <= before


@pytest.mark.parametrize("content", [None, b"", b"short\n", b"\xff" * 20])
def test_files_without_a_good_key_are_refused(content: bytes | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(UserError, match="--api_keys: .*expected"):
        read_keys(str(tmp_path / "keys"))


def test_sigterm_ends_the_command_when_what_it_accepted_is_answered(tmp_path: Path):
    """By the script, on the embedded default with untrained weights."""
    SpeechLM.build(Parts("tiny")).save(tmp_path / "last.safetensors")
    variables = {**os.environ, "venv": "none", "PYTHON": sys.executable, "proj_dir": str(tmp_path), "port": "0"}
    words = ["sh", str(ROOT / "demo/demo-server.sh"), "--device", "cpu", "--vad", "none", "--temperature", "0"]
    with subprocess.Popen(words, env=variables, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        address = next(line for line in process.stderr if "running on" in line).split(" on ")[1].split()[0]
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor() as pool:
            sent = [
                pool.submit(client.audio.transcriptions.create, file=wav(i, 3.0), model="asr", response_format="text")
                for i in range(4)
            ]
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert all(type(future.result()) is str for future in sent)
        assert process.wait() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
