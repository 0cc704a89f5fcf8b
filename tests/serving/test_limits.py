"""Full, slow and failing: what a server promises beyond its answers."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from hard_files import sound

from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.decoding.transcriber import Transcriber
from rwkv_speech.errors import UserError
from rwkv_speech.models.parts import Parts
from rwkv_speech.serving.server import read_keys
from serving.conftest import connected, noise, offline, running, wav

ROOT = Path(__file__).parents[2]


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
        assert server.service._worker._transcriber.engine.num_unfinished == 0


def test_what_takes_too_long_leaves_the_batch(model: SpeechLM, open_to_all: dict[str, Any], gate: threading.Event):
    with running(model, ServeConfig(**open_to_all, request_seconds=0.3)) as server:
        with pytest.raises(openai.InternalServerError) as caught:
            connected(server).audio.transcriptions.create(file=wav(5), model="asr")
        assert (caught.value.status_code, caught.value.code) == (503, "timeout")
        assert caught.value.response.headers["x-should-retry"] == "false"
        wait_until(lambda: not server.service._worker._futures)
        assert server.service._worker._transcriber.engine.num_unfinished == 0


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


def taken(address: str) -> int:
    """How many transcriptions a server has accepted, those that it has answered included."""
    with urllib.request.urlopen(f"{address}/metrics") as response:
        text = response.read().decode()
    counts = r"^rwkv_speech_requests(?:_in_flight|_total\{path=\"/v1/audio/transcriptions\".*\}) (\S+)$"
    return sum(int(float(count)) for count in re.findall(counts, text, re.MULTILINE))


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
            while taken(address) < len(sent):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert all(type(future.result()) is str for future in sent)
        assert process.wait() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
