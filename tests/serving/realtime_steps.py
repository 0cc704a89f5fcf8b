"""What a realtime client sends and waits for."""

import base64
from typing import Any

import numpy as np

from rwkv_speech.decoding.streaming import Committed
from rwkv_speech.decoding.transcribe import SpeechLM
from serving.conftest import OPTIONS

INTENT = {"intent": "transcription"}


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
