"""Requests that cannot be served: the status, code and field that the official client reports."""

import math
from typing import Any

import numpy as np
import openai
import pytest
from hard_files import sound

from rwkv_speech.decoding.transcribe import SpeechLM
from serving.conftest import connected, wav

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
        {"chunking_strategy": {"type": "server_vad", "threshold": 2}},
        422, "invalid_value", "chunking_strategy",
    ),
    "chunking by another": (
        {"chunking_strategy": {"type": "semantic_vad"}}, 422, "invalid_value", "chunking_strategy",
    ),
    "chunking by words": (
        {"chunking_strategy": {"type": "server_vad", "words": 3}},
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
