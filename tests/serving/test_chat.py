"""What the official client is answered in a chat, beside what a session without a server says."""

import asyncio
import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from hard_files import sound

from rwkv_speech.audio import as_waveform
from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.engine import Done, Engine
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.session import Session
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.serving.sessions import Sessions
from serving.conftest import OPTIONS, connected, noise, offline, running, wav
from serving.test_limits import wait_until


def part(number: int, kind: str = "wav", seconds: float = 0.4) -> dict[str, Any]:
    content = base64.b64encode(sound(noise(number, seconds), kind.upper())).decode()
    return {"type": "input_audio", "input_audio": {"data": content, "format": kind}}


def user(*content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": x} if isinstance(x, str) else x for x in content]
    return {"role": "user", "content": parts}


def ask(client: openai.OpenAI, *messages: Any, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "chat", "messages": list(messages), **more})


def text(found: Any) -> str:
    return str(found.choices[0].message.content)


def in_session(client: openai.OpenAI, name: str, *content: Any, **more: Any) -> Any:
    return ask(client, user(*content), extra_body={"session_id": name}, **more)


def turns(model: SpeechLM, *said: Any, by_text: bool = False) -> list[str]:
    """The answers to turns; `by_text` remembers of each what its text says, whose bytes may not all be characters."""
    session, options, answers = Session(model, "chat"), Options.given(**OPTIONS), list[str]()
    for x in said:
        engine, done = Engine(model, options, 1), list[Done]()
        engine.submit(session.request(x if isinstance(x, str) else as_waveform(noise(x), ""), options))
        while not done:
            done = engine.poll()
        answers.append(model.tokenizer.decode(done[0].hypotheses[0].ids))
        session.take(done[0], model.tokenizer.encode(answers[-1]) if by_text else None)
    return answers


def as_sound(said: Any) -> Any:
    return said if isinstance(said, str) else part(said)


@pytest.mark.parametrize("said", [3, "what is a dog"], ids=str)
def test_a_question_is_answered_whole_and_in_parts(said: Any, client: openai.OpenAI, model: SpeechLM):
    found, [expected] = ask(client, user(as_sound(said))), turns(model, said)
    assert text(found) == expected != "" and found.choices[0].finish_reason == "length"
    assert (found.object, found.model, found.usage.completion_tokens) == ("chat.completion", "chat", 8)
    chunks = list(ask(client, user(as_sound(said)), stream=True, stream_options={"include_usage": True}))
    *deltas, end, last = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in deltas) == expected and len(deltas) > 2
    assert deltas[0].choices[0].delta.role == "assistant" and end.choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage == found.usage and len({chunk.id for chunk in chunks}) == 1
    read = found.usage.prompt_tokens_details
    assert (read.audio_tokens, read.text_tokens)[isinstance(said, str)] == found.usage.prompt_tokens > 0


def test_kinds_of_audio_and_of_models(client: openai.OpenAI, model: SpeechLM):
    assert text(ask(client, user(part(1, "flac")), model="asr")) == offline(model, 1).text
    mp3 = base64.b64decode(part(1, "mp3")["input_audio"]["data"])
    [expected] = model.transcribe([mp3], 4, "chat", **OPTIONS)
    assert text(ask(client, user(part(1, "mp3")))) == expected.text


def test_text_beside_audio_and_of_the_system_is_read_before_it(client: openai.OpenAI, model: SpeechLM):
    expected = offline(model, 1, task="chat", initial_prompt="in one word").text
    assert (
        text(ask(client, user("in one word", part(1)))) == text(ask(client, user(part(1), "in one word"))) == expected
    )
    system = {"role": "system", "content": "in one word"}
    assert text(ask(client, system, user(part(1)))) == expected != offline(model, 1, task="chat").text


def test_what_is_asked_for_changes_the_answer(client: openai.OpenAI, model: SpeechLM):
    short = ask(client, user(part(4)), max_completion_tokens=3)
    assert text(short) == offline(model, 4, task="chat", max_new_tokens=3).text and short.usage.completion_tokens == 3
    hot = text(ask(client, user(part(4)), temperature=0.9))
    assert hot == offline(model, 4, task="chat", temperature=0.9, best_of=1).text != text(ask(client, user(part(4))))
    *deltas, _ = ask(client, user(part(4)), temperature=0.9, stream=True)
    assert "".join(chunk.choices[0].delta.content for chunk in deltas) == hot and len(deltas) > 2


def test_messages_and_sessions_remember_alike(client: openai.OpenAI, model: SpeechLM):
    said = [2, "and then", 5]
    expected, messages = turns(model, *said), list[Any]()
    written = turns(model, *said, by_text=True)
    for number, content in enumerate(said):
        messages.append(user(as_sound(content)))
        found = ask(client, *messages)
        assert text(found) == written[number]
        messages.append(found.choices[0].message)
        remembered = in_session(client, "alike", as_sound(content))
        assert text(remembered) == expected[number]
        assert remembered.session == {"id": "alike", "turns": number + 1}
    # What a session knows already is not read again.
    again = turns(model, *said, 7)
    assert text(ask(client, *messages, user(part(7)), extra_body={"session_id": "alike"})) == again[-1]
    assert again[-1] != turns(model, 7)[0]


def test_a_streamed_turn_is_remembered(client: openai.OpenAI, model: SpeechLM):
    chunks = list(in_session(client, "streamed", part(2), stream=True))
    assert chunks[-1].session == {"id": "streamed", "turns": 1}
    assert text(in_session(client, "streamed", part(3))) == turns(model, 2, 3)[1]


def test_sessions_of_clients_are_apart(client: openai.OpenAI, server: Any, model: SpeechLM):
    other = connected(server, "another-key-of-the-tests")
    in_session(client, "mine", part(1))
    found = in_session(other, "mine", part(3))
    assert text(found) == turns(model, 3)[0] != turns(model, 1, 3)[1] and found.session["turns"] == 1
    assert text(in_session(client, "mine", part(3))) == turns(model, 1, 3)[1]


def test_many_conversations_at_once_are_what_each_is_alone(server: Any, model: SpeechLM):
    said = [[number, f"say {number}", number + 1] for number in range(8)]
    expected = [turns(model, *one) for one in said]
    clients = [connected(server) for _ in said]

    def converse(number: int) -> list[str]:
        mine = clients[number]
        mine.audio.transcriptions.create(file=wav(number), model="asr")
        return [text(in_session(mine, f"many-{number}", as_sound(x))) for x in said[number]]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(converse, range(8))) == expected
    assert len({tuple(one) for one in expected}) == 8


def test_sessions_are_bounded_in_number_and_age(model: SpeechLM, settings: dict[str, Any]):
    with running(model, ServeConfig(**{**settings, "max_sessions": 2, "session_seconds": 1.0})) as server:
        client, other = connected(server), connected(server, "another-key-of-the-tests")
        in_session(other, "a", part(0))
        for name in ("a", "b", "a", "c"):
            in_session(client, name, part(0))
        kept = server.service._chat._sessions
        assert sorted(kept._kept) == [("key 0", "a"), ("key 1", "c")]  # who has most loses one, others none
        wait_until(lambda: len(kept) == 0)
        assert in_session(client, "c", part(0)).session["turns"] == 1


def test_a_new_client_takes_the_place_of_whoever_was_silent_longest(model: SpeechLM):
    async def kept() -> list[tuple[str, str]]:
        sessions = Sessions(2, 60)
        for client in "abc":
            with sessions.lent(client, "x") as lent:
                assert lent.session is None
                lent.session = Session(model, "chat")
        return list(sessions._kept)

    assert asyncio.run(kept()) == [("b", "x"), ("c", "x")]


def test_a_turn_whose_client_goes_leaves_nothing_behind(
    model: SpeechLM, open_to_all: dict[str, Any], monkeypatch: pytest.MonkeyPatch, gate: threading.Event
):
    with running(model, ServeConfig(**open_to_all, request_seconds=20)) as server:
        client = connected(server)
        with ThreadPoolExecutor() as pool:
            gate.set()
            in_session(client, "left", part(1))
            gate.clear()
            waiting = pool.submit(in_session, client, "left", part(2))
            wait_until(lambda: bool(server.service._worker._futures))
            with pytest.raises(openai.ConflictError) as caught:
                in_session(client, "left", part(3))
            assert caught.value.code == "session_busy" and caught.value.response.headers["Retry-After"] == "1"
            gate.set()
            waiting.result()
            gate.clear()
        with pytest.raises(openai.APITimeoutError):
            in_session(client.with_options(timeout=0.3), "left", part(3))
        wait_until(lambda: not server.service._worker._futures and server.service.app.num_requests == 0)
        assert server.service._worker._transcriber.engine.num_unfinished == 0
        gate.set()
        assert text(in_session(client, "left", part(4))) == turns(model, 1, 2, 4)[-1]


def test_an_answer_that_takes_too_long_or_fails(
    model: SpeechLM, open_to_all: dict[str, Any], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
):
    with running(model, ServeConfig(**open_to_all, request_seconds=0.3)) as server:
        client = connected(server)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, user(part(1)))
        assert (caught.value.status_code, caught.value.code) == (503, "timeout")
        gate.set()
        with monkeypatch.context() as patch:
            patch.setattr(Session, "request", lambda *args: 1 // 0)
            with pytest.raises(openai.InternalServerError) as failed:
                ask(client, user(part(1)), stream=True)
        assert failed.value.code == "server_error" and "division" not in str(failed.value)
        assert text(ask(client, user("hello"))) == turns(model, "hello")[0]


SILENCE = {"data": base64.b64encode(sound(np.zeros(16_000 * 70, np.int16), "FLAC")).decode(), "format": "flac"}
VOICE = part(0)["input_audio"]
BAD: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "model unknown": ({"model": "gpt-audio"}, 404, "model_not_found", "model"),
    "no messages": ({"messages": []}, 422, "invalid_value", "messages"),
    "role": ({"messages": [{"role": "tool", "content": "a"}]}, 422, "invalid_value", "messages"),
    "no content": ({"messages": [{"role": "user"}]}, 422, "missing_required_parameter", "messages"),
    "image": (
        {"messages": [user({"type": "image_url", "image_url": {"url": "http://secret"}})]},
        422, "invalid_value", "messages",
    ),
    "blank": ({"messages": [user(" ")]}, 400, "invalid_value", "messages"),
    "answer last": (
        {"messages": [user("a"), {"role": "assistant", "content": "b"}]}, 400, "invalid_value", "messages",
    ),
    "two users": ({"messages": [user("a"), user("b"), user("c")]}, 400, "invalid_value", "messages"),
    "system alone": ({"messages": [{"role": "system", "content": "a"}]}, 400, "invalid_value", "messages"),
    "spoken system": (
        {"messages": [{**user(part(0)), "role": "system"}, user("a")]}, 400, "invalid_value", "messages",
    ),
    "two recordings": ({"messages": [user(part(0), part(1))]}, 400, "invalid_value", "messages"),
    "no base64": (
        {"messages": [user({"type": "input_audio", "input_audio": {"data": "sec ret", "format": "wav"}})]},
        400, "invalid_audio", "messages",
    ),
    "no audio": (
        {"messages": [user({"type": "input_audio", "input_audio": {"data": "c2VjcmV0", "format": "wav"}})]},
        400, "invalid_audio", "messages",
    ),
    "format": (
        {"messages": [user({"type": "input_audio", "input_audio": {**VOICE, "format": "opus"}})]},
        422, "invalid_value", "messages",
    ),
    "audio long": (
        {"messages": [user({"type": "input_audio", "input_audio": SILENCE})]}, 413, "audio_too_long", "messages",
    ),
    "text long": ({"messages": [user("a" * 5_000)]}, 422, "invalid_value", "messages"),
    "many messages": ({"messages": [user("a")] * 129}, 422, "invalid_value", "messages"),
    "temperature": ({"temperature": 3}, 422, "invalid_value", "temperature"),
    "tokens": ({"max_tokens": 10**6}, 422, "invalid_value", "max_tokens"),
    "spoken answer": ({"modalities": ["text", "audio"]}, 422, "invalid_value", "modalities"),
    "several": ({"n": 2}, 422, "invalid_value", "n"),
    "tools": ({"tools": []}, 422, "unknown_parameter", "tools"),
    "session": ({"extra_body": {"session_id": "../a"}}, 422, "invalid_value", "session_id"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_chat_is_answered_by_the_right_error(name: str, client: openai.OpenAI):
    sent, status, code, param = BAD[name]
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, user("hello"), **sent)
    error = caught.value
    assert (error.status_code, error.code, error.param) == (status, code, param)
    assert error.type == "invalid_request_error" and isinstance(error.body, dict) and error.body["message"]
    assert not any(word in str(error.body) for word in ("secret", "c2Vj", "a-key", "/", "\\", "Traceback"))


def test_a_session_of_another_model_and_what_is_no_json(client: openai.OpenAI):
    in_session(client, "kind", part(0))
    with pytest.raises(openai.BadRequestError) as caught:
        in_session(client, "kind", part(0), model="asr")
    assert (caught.value.code, caught.value.param) == ("unsupported_value", "model")
    headers = {**client.auth_headers, "Content-Type": "application/json"}
    half = b'{"model": "chat", "messages": [{"role": "user", "content": "secret \\ud83d"}]}'
    for content, status, code in (
        (b"{secret", 400, "invalid_json"),
        (half, 422, "invalid_value"),
        (b"[1]", 422, "invalid_value"),
    ):
        answer = client._client.post(f"{client.base_url}chat/completions", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert b"secret" not in answer.content


def test_text_that_the_vocabulary_does_not_hold(client: openai.OpenAI, model: SpeechLM):
    assert text(ask(client, user("Ω 😀\0"))) == turns(model, "Ω 😀\0")[0]
