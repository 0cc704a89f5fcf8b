"""A server over a small model with random weights that matter, and the official client."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from hard_files import sound
from torch import Tensor

from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.decoding.transcriber import Transcriber
from rwkv_speech.decoding.vad import WINDOW, Vad
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.models.parts import Parts
from rwkv_speech.serving.server import Service, read_keys, web_server

KEY = "a-key-of-the-tests"
# Of noise nothing else would be left; what stands here is what a client's text is compared with.
OPTIONS: dict[str, Any] = {
    "temperature": 0.0,
    "vad": "none",
    "no_speech_threshold": 1.0,
    "max_new_tokens": 8,
    "max_segment": 1.0,
}


def noise(number: int, seconds: float = 0.4) -> np.ndarray:
    """16-bit samples, so that a file holds them exactly."""
    count = int(16_000 * seconds) + 320 * number
    return (3_000 * np.random.default_rng(number).standard_normal(count)).clip(-32_768, 32_767).astype(np.int16)


def wav(number: int, seconds: float = 0.4) -> tuple[str, bytes]:
    return "a.wav", sound(noise(number, seconds), "WAV")


@pytest.fixture(scope="session")
def model(tiny_parts: Parts) -> SpeechLM:
    model = SpeechLM.build(tiny_parts, task_names=["asr", "asr_fr", "chat", "st_en"])
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in model.trained_parameters():
            x.copy_(0.5 * torch.randn(x.shape, generator=draw))
    torch.manual_seed(0)
    model.ctc = (
        CtcHead(model.encoder.width, CtcSpec(" abcdefghiklmnopqrstuvwxyz", hidden=8)).eval().requires_grad_(False)
    )
    return model.eval()


@contextmanager
def running(model: SpeechLM, config: ServeConfig) -> Iterator[Any]:
    """The server in a thread, its `address` and its `service`."""
    service = Service(model, config, read_keys(config.api_keys))
    server: Any = web_server(service, config)
    server.service = service
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    server.address = f"http://{host}:{port}"
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = Path(tmp_path_factory.mktemp("keys")) / "keys.txt"
    keys.write_text(f"another-key-of-the-tests\n{KEY}\n")
    decoding = {**OPTIONS, "temperature": "0"}
    return {
        "port": 0,
        "micro_bsz": 4,
        "api_keys": str(keys),
        "max_upload_mb": 0.2,
        "max_audio_seconds": 5.0,
        **decoding,
    }


@pytest.fixture(scope="session")
def server(model: SpeechLM, settings: dict[str, Any]) -> Iterator[Any]:
    with running(model, ServeConfig(**settings)) as server:
        yield server


@pytest.fixture(scope="session")
def limited(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a server for realtime connections."""
    return {**settings, "idle_seconds": 20.0, "max_streams": 6, "max_segment": 2.0}


@pytest.fixture(scope="session")
def realtime_server(model: SpeechLM, limited: dict[str, Any]) -> Iterator[Any]:
    with running(model, ServeConfig(**limited)) as server:
        yield server


def connected(server: Any, key: str = KEY, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0, timeout=60, **options)


@pytest.fixture(scope="session")
def client(server: Any) -> openai.OpenAI:
    return connected(server)


def offline(model: SpeechLM, number: int = 0, **options: Any) -> Any:
    task = options.pop("task", "asr")
    [found] = model.transcribe(noise(number), 4, task, **{**OPTIONS, **options})
    return found


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, nothing is decoded."""
    gate, poll = threading.Event(), Transcriber.poll
    monkeypatch.setattr(Transcriber, "poll", lambda *given: poll(*given) if gate.wait(0.01) else [])
    return gate


@pytest.fixture
def open_to_all(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "api_keys": ""}


@pytest.fixture
def vad_by_loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(vad: Vad, samples: Tensor) -> Tensor:
        return torch.tensor([float(x.square().mean() > 1e-6) for x in samples.split(WINDOW)])

    monkeypatch.setattr(Vad, "block", block)
