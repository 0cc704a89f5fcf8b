"""Clients in parallel, every tenth request of them hostile, for minutes: nothing grows, nothing is mixed up."""

import io
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile as sf

from rwkv_speech.decoding.transcribe import SpeechLM
from serving.conftest import wav

SECONDS, WARM_UP = 600, 120
CLIENTS, CLIPS = 16, 12


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
    limits = ["--max_requests", "14", "--upload_seconds", "2", "--max_upload_mb", "2"]
    words = ["serve", "--proj_dir", str(folder), "--port", "0", *decoding, *limits]
    variables = {**os.environ, "TMPDIR": str(folder / "uploads")}
    with subprocess.Popen(
        [sys.executable, "-m", "rwkv_speech", *words], env=variables, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        line = next(line for line in process.stderr if "running on" in line)
        yield process, line.split(" on ")[1].split()[0], folder / "uploads"
        process.terminate()


def memory(process: Any) -> int:
    """Resident megabytes."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1_000_000


HEADERS = (
    b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n"
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


def hostile(client: openai.OpenAI, address: str) -> int:
    """The status of a request that nobody should make."""
    create = client.audio.transcriptions.create
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
    ]
    try:
        return found if isinstance(found := random.choice(requests)(), int) else 200
    except openai.APIStatusError as error:
        return error.status_code
    except openai.APIConnectionError:
        return 0


@pytest.mark.soak
def test_hostile_clients_harm_nobody(server: Any):
    process, address, uploads = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    expected = [client.audio.transcriptions.create(file=wav(number), model="asr").text for number in range(CLIPS)]
    assert len(set(expected)) > CLIPS // 2
    end, statuses, wrong, sizes = time.monotonic() + SECONDS, Counter[int](), list[str](), list[tuple[float, int]]()

    def use(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            if draw.random() < 0.1:
                statuses[hostile(client, address)] += 1
                continue
            clip = draw.randrange(CLIPS)
            try:
                text = client.audio.transcriptions.create(file=wav(clip), model="asr").text
                statuses[200] += 1
                wrong.extend([text] * (text != expected[clip]))
            except openai.APIStatusError as error:
                statuses[error.status_code] += 1
                time.sleep(0.2)

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        users = [pool.submit(use, number) for number in range(CLIENTS)]
        while time.monotonic() < end:
            time.sleep(min(1, SECONDS / 20))
            sizes.append((time.monotonic() - end + SECONDS, memory(process)))
        for user in users:
            user.result()
    print(f"\nanswers by status: {dict(statuses)}; MB at first, after warm-up, at last: "
          f"{sizes[0][1]}, {next(mb for s, mb in sizes if s >= WARM_UP)}, {sizes[-1][1]}")  # fmt: skip
    assert not wrong and {status for status in statuses if status >= 500} <= {503}
    warm = max(size for seconds, size in sizes if seconds <= WARM_UP)
    assert max(size for seconds, size in sizes if seconds > WARM_UP) <= 1.05 * warm
    assert client.audio.transcriptions.create(file=wav(1), model="asr").text == expected[1]
    assert list(uploads.iterdir()) == []
    inside = [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert not any(str(uploads) in name for name in inside)
