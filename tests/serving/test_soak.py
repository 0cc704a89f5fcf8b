"""Clients in parallel, every tenth request of them hostile, for minutes: nothing grows, nothing is mixed up."""

import base64
import io
import os
import random
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile as sf
from websockets.exceptions import ConnectionClosed, InvalidStatus

from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.serving.realtime import FRAME_BYTES
from serving.conftest import noise, wav

CLIENTS, CLIPS = 16, 12
KEY, HOSTILE_KEY = "a-key-of-honest-clients", "a-key-of-hostile-clients"
INTENT = {"intent": "transcription"}
SESSIONS, STOLEN = deque[str](maxlen=20), Counter[str]()  # of honest clients; how often others have named them


def silence(hours: int) -> bytes:
    """A small FLAC that is long."""
    content = io.BytesIO()
    with sf.SoundFile(content, "w", 8_000, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(hours):
            file.write(np.zeros(8_000 * 3_600, np.int16))
    return content.getvalue()


SILENCE = silence(10)


@pytest.fixture(scope="module")
def server(model: SpeechLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("soak")
    model.save(folder / "last.safetensors")
    (folder / "uploads").mkdir()
    decoding = ["--vad", "none", "--temperature", "0", "--no_speech_threshold", "1", "--max_new_tokens", "8"]
    limits = ["--max_requests", "14", "--upload_seconds", "2", "--max_upload_mb", "2", "--idle_seconds", "10"]
    (folder / "keys.txt").write_text(f"{KEY}\n{HOSTILE_KEY}\n")
    keys = ["--api_keys", str(folder / "keys.txt")]
    words = ["serve", "--proj_dir", str(folder), "--port", "0", *decoding, *limits, *keys]
    variables = {**os.environ, "TMPDIR": str(folder / "uploads")}
    with subprocess.Popen(
        [sys.executable, "-m", "rwkv_speech", *words], env=variables, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        line = next(line for line in process.stderr if "running on" in line)
        log = list[str]()  # a server whose log nobody reads waits for ever once the pipe is full
        reader = threading.Thread(target=log.extend, args=(process.stderr,))
        reader.start()
        yield process, line.split(" on ")[1].split()[0], folder / "uploads", log
        process.terminate()
        reader.join()


def memory(process: Any) -> int:
    """Resident megabytes."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1_000_000


HEADERS = (
    b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\nAuthorization: Bearer a-key-of-hostile-clients\r\n"
)


def left(address: str, sent: bytes, seconds: float) -> int:
    """A client that goes in the middle of its request."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(sent)
        time.sleep(seconds)
    return 0


def dripped(address: str) -> int:
    """A client whose headers never end; the server must end them."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection, suppress(ConnectionError):
        connection.sendall(HEADERS)
        for _ in range(100):
            connection.sendall(b"X: y\r\n")
            time.sleep(0.2)
        return 599
    return 0


def voice(clip: int) -> list[Any]:
    data = base64.b64encode(wav(clip)[1]).decode()
    content = [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]
    return [{"role": "user", "content": content}]


def transcribed(client: openai.OpenAI, clip: int, _: random.Random) -> str:
    return client.audio.transcriptions.create(file=wav(clip), model="asr").text


def talked(client: openai.OpenAI, clip: int, draw: random.Random) -> str:
    """Two turns of a session of its own; what the second one's answer is hangs on the first."""
    session, found = f"soak-{uuid.uuid4()}", list[str]()
    for turn in range(2):
        said = client.chat.completions.create(
            model="chat", messages=voice((clip + turn) % CLIPS), extra_body={"session_id": session}
        )
        found.append(str(said.choices[0].message.content))
        assert said.model_extra and said.model_extra["session"]["turns"] == turn + 1
        SESSIONS.append(session)
    return " | ".join(found)


def spoken(client: openai.OpenAI, clip: int, draw: random.Random) -> str:
    """A realtime connection of one item, sent in parts, with looks at them on the way."""
    with client.realtime.connect(extra_query=INTENT) as connection:
        update(connection)
        for part in np.array_split(noise(clip, 1.0), draw.randint(1, 9)):
            connection.input_audio_buffer.append(audio=base64.b64encode(part.tobytes()).decode())
            time.sleep(draw.choice([0.0, 0.05, 0.2]))
        connection.input_audio_buffer.commit()
        while True:
            event = connection.recv()
            assert event.type != "error", event
            if event.type == "conversation.item.input_audio_transcription.completed":
                return event.transcript


def update(connection: Any) -> None:
    audio = {"format": {"type": "audio/pcm", "rate": 16_000}, "transcription": {"model": "asr"}}
    connection.session.update(session={"type": "transcription", "audio": {"input": audio}})
    while connection.recv().type != "session.updated":
        pass


HONEST = {"transcription": transcribed, "chat": talked, "realtime": spoken}


def gone_from(client: openai.OpenAI, *sent: Any) -> int:
    """A realtime connection that is left with audio in its buffer, or is ended by the server."""
    with client.realtime.connect(extra_query=INTENT) as connection:
        update(connection)
        for message in sent:
            connection.send_raw(message)
        if len(sent) > 1:
            while connection.recv().type != "error":
                pass
            return 400
        time.sleep(random.choice([0.0, 0.3]))
        return 0


def left_chat(client: openai.OpenAI, seconds: float) -> int:
    """An answer that never ends, which is left half way."""
    request = {"model": "chat", "messages": voice(0), "max_completion_tokens": 4096, "temperature": 2, "stream": True}
    with client.with_options(timeout=20).chat.completions.create(**request) as parts:  # type: ignore[call-overload]
        end = time.monotonic() + seconds
        for _ in parts:
            if time.monotonic() > end:
                break
    return 0


def stolen(client: openai.OpenAI) -> int:
    """The session of another client: it must be a new one, and the other's must not change."""
    session = random.choice(list(SESSIONS) or ["none"])
    STOLEN[session] += 1
    chat = client.chat.completions.create(model="chat", messages=voice(3), extra_body={"session_id": session})
    assert chat.model_extra
    return 200 if chat.model_extra["session"]["turns"] <= STOLEN[session] else 599


def append(content: str) -> str:
    return f'{{"type": "input_audio_buffer.append", "audio": "{content}"}}'


def hostile(client: openai.OpenAI, address: str) -> int:
    """The status of a request that nobody should make."""
    create = client.audio.transcriptions.create
    chat, wrong = client.chat.completions.create, voice(0)
    wrong[0]["content"][0]["input_audio"]["data"] = "not base64!"
    requests: list[Callable[[], Any]] = [
        lambda: create(file=("../../../etc/passwd", b"\x00" * 100), model="asr"),
        lambda: create(file=("a.wav", wav(0)[1]), model="../../etc/passwd"),
        lambda: create(file=("a.wav", bytes(3_000_000)), model="asr"),
        lambda: create(file=("a.flac", SILENCE), model="asr"),
        lambda: create(file=wav(0), model="asr", temperature="hot"),  # type: ignore[call-overload]
        lambda: client.with_options(timeout=0.01).audio.transcriptions.create(file=wav(0), model="asr"),
        lambda: left(address, HEADERS + b"\r\n--x\r\n", random.choice([0.0, 0.1, 2.5])),
        lambda: left(address, HEADERS, random.choice([0.0, 2.5])),
        lambda: dripped(address),
        lambda: chat(model="chat", messages=wrong),
        lambda: chat(model="chat", messages=[{"role": "user", "content": "x" * 3_000_000}]),
        lambda: chat(model="chat", messages=voice(0) * 128, extra_body={"session_id": "../etc"}),
        lambda: left_chat(client, random.choice([0.0, 0.5, 2.0])),
        lambda: client.with_options(timeout=0.05).chat.completions.create(model="chat", messages=voice(0)),
        lambda: stolen(client),
        lambda: gone_from(client, append(base64.b64encode(noise(0, 2.0).tobytes()).decode())),
        lambda: gone_from(client, append("AAAA"), append("not base64!")),
        lambda: gone_from(client, append("A" * (FRAME_BYTES + 1)), "{}"),
        lambda: gone_from(client, "secret", "[]"),
    ]
    try:
        return found if isinstance(found := random.choice(requests)(), int) else 200
    except openai.APIStatusError as error:
        return error.status_code
    except InvalidStatus as error:
        return error.response.status_code
    except (openai.APIConnectionError, httpx.HTTPError, ConnectionClosed):
        return 0


@pytest.mark.soak
def test_hostile_clients_harm_nobody(server: Any, pytestconfig: pytest.Config):
    process, address, uploads, log = server
    length = 60 * float(pytestconfig.getoption("--soak_minutes"))
    warm_up = length / 5
    # Each request has a connection of its own: one that lies idle is closed, perhaps just when it is used again.
    http = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=120)
    client, enemy = (
        openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120, http_client=http)
        for key in (KEY, HOSTILE_KEY)
    )
    one = random.Random(0)
    expected = {name: [ask(client, clip, one) for clip in range(CLIPS)] for name, ask in HONEST.items()}
    assert all(len(set(texts)) > CLIPS // 2 for texts in expected.values())
    end, statuses = time.monotonic() + length, Counter[tuple[str, int]]()
    wrong, sizes = list[tuple[str, str]](), list[tuple[float, int]]()

    def use(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            if draw.random() < 0.1:
                statuses["hostile", hostile(enemy, address)] += 1
                continue
            name, clip = draw.choice(list(HONEST)), draw.randrange(CLIPS)
            try:
                text = HONEST[name](client, clip, draw)
                statuses[name, 200] += 1
                wrong.extend([(name, text)] * (text != expected[name][clip]))
            except openai.APIStatusError as error:
                statuses[name, error.status_code] += 1
                time.sleep(0.2)
            except InvalidStatus as error:
                statuses[name, error.response.status_code] += 1
                time.sleep(0.2)

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        users = [pool.submit(use, number) for number in range(CLIENTS)]
        while time.monotonic() < end:
            time.sleep(min(1, length / 20))
            sizes.append((time.monotonic() - end + length, memory(process)))
    print(f"\nanswers by status: {sorted(statuses.items())}; MB at first, after warm-up, at last: "
          f"{sizes[0][1]}, {next(mb for s, mb in sizes if s >= warm_up)}, {sizes[-1][1]}")  # fmt: skip
    for user in users:
        user.result()
    assert len(log) < 100, log[-20:]
    assert not wrong and {status for _, status in statuses if status >= 500} <= {503}
    assert all(statuses[name, 200] for name in HONEST)
    warm = max(size for seconds, size in sizes if seconds <= warm_up)
    assert max(size for seconds, size in sizes if seconds > warm_up) <= 1.05 * warm
    assert all(ask(client, 1, one) == expected[name][1] for name, ask in HONEST.items())
    assert list(uploads.iterdir()) == []
    inside = [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert not any(str(uploads) in name for name in inside)
