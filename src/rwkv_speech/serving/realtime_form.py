"""What a client of the realtime API may set, and what it sends: each field is honoured, or refused by its name."""

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import soundfile
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from rwkv_speech import tasks
from rwkv_speech.decoding.long_audio import SpeechBounds
from rwkv_speech.decoding.options import Options
from rwkv_speech.errors import UserError
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.serving.faults import Fault
from rwkv_speech.serving.form import (
    Language,
    SpeechDetection,
    Text,
    check_language,
    check_model,
    expected,
    unsupported,
)

# Seconds that a word ended before it is sent.
_HOLDS = {"minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 1.0, "xhigh": 1.5}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Transcription(_Fields):
    """How text is made of the audio; `delay` says how sure a word has to be."""

    model: Text
    language: Language = ""
    prompt: Text = ""
    keywords: list[Text] = Field([], max_length=100)
    delay: Literal["minimal", "low", "medium", "high", "xhigh"] = "low"


class Pcm(_Fields):
    """16-bit little-endian samples, mono."""

    type: Literal["audio/pcm"]
    rate: int = Field(24_000, ge=8_000, le=48_000)

    def samples(self, content: bytes) -> np.ndarray:
        """The samples (S,), int16; raises Fault for half a sample at the end."""
        if len(content) % 2:
            raise Fault(400, "audio: ends within a sample; expected 16-bit samples", "invalid_audio", "audio")
        return np.frombuffer(content, "<i2").astype(np.int16)


class Telephone(_Fields):
    """G.711: a sample is a byte, by the mu-law or the A-law; mono, 8 kHz."""

    type: Literal["audio/pcmu", "audio/pcma"]
    rate: ClassVar[int] = 8_000

    def samples(self, content: bytes) -> np.ndarray:
        """The samples (S,), int16."""
        law = "ULAW" if self.type == "audio/pcmu" else "ALAW"
        raw = {"format": "RAW", "subtype": law, "samplerate": self.rate, "channels": 1}
        samples, _ = soundfile.read(io.BytesIO(content), dtype="int16", **raw)
        return np.asarray(samples)


class TurnDetection(SpeechDetection):
    """The server finds where speech begins and ends; only sessions that answer have the fields that must be null."""

    create_response: Literal[False] | None = None
    interrupt_response: Literal[False] | None = None
    idle_timeout_ms: None = None


class AudioInput(_Fields):
    """What comes, and what is made of it."""

    format: Annotated[Pcm | Telephone, Field(discriminator="type")]
    transcription: Transcription
    turn_detection: TurnDetection | None
    noise_reduction: None = None

    def check(self, model: SpeechLM, default: Options) -> None:
        """Raises Fault for what these weights cannot do."""
        wanted = self.transcription
        check_model(wanted.model, model)
        check_language(wanted.model, wanted.language, model)
        if self.turn_detection and default.vad == "none":
            raise unsupported("turn_detection", "this server finds no speech; expected null")
        try:
            expected(tuple(wanted.keywords), default.keyword_weight, model)
        except UserError as error:
            raise Fault(400, str(error), "invalid_value", "keywords") from error

    def state(self, model: SpeechLM) -> str:
        """The learned state: that of the language, if there is one, else the model's."""
        wanted = self.transcription
        own = tasks.state_name(wanted.model, wanted.language, by_lang=True)
        return own if own in model.initial_states else wanted.model

    def options(self, default: Options) -> Options:
        """The server's own with what is asked for."""
        wanted, changes = self.transcription, dict[str, Any]()
        if wanted.language:
            changes["language"] = wanted.language
        if wanted.prompt:
            changes["initial_prompt"] = wanted.prompt
        if wanted.keywords:
            changes["keywords"] = tuple(wanted.keywords)
        return replace(default, **changes)

    @property
    def bounds(self) -> SpeechBounds | None:
        """What the VAD takes for a turn; None where the client says where one ends."""
        return self.turn_detection.bounds() if self.turn_detection else None

    @property
    def hold(self) -> float:
        """Seconds that a word has to have ended before it is sent."""
        return _HOLDS[self.transcription.delay]


class _Audio(_Fields):
    input: dict[str, Any] = {}


class Session(_Fields):
    """The changes of a `session.update`."""

    type: Literal["transcription"]
    audio: _Audio = _Audio()
    include: list[Literal["item.input_audio_transcription.logprobs"]] | None = None

    def changed(self, known: AudioInput) -> AudioInput:
        """What is known, with what is given in place of it; raises ValidationError for values that are none."""
        given = dict(self.audio.input)
        if isinstance(changes := given.get("transcription"), Mapping):
            given["transcription"] = known.transcription.model_dump() | dict(changes)
        return AudioInput.model_validate(known.model_dump() | given)


class Update(_Fields):
    """`session.update`"""

    type: Literal["session.update"]
    event_id: Text | None = None
    session: Session


class Append(_Fields):
    """`input_audio_buffer.append`"""

    type: Literal["input_audio_buffer.append"]
    event_id: Text | None = None
    audio: str

    def content(self) -> bytes:
        """What the base64 holds; raises Fault for what is none."""
        try:
            return base64.b64decode(self.audio, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Fault(400, "audio: is no base64", "invalid_audio", "audio") from error


class Commit(_Fields):
    """`input_audio_buffer.commit`"""

    type: Literal["input_audio_buffer.commit"]
    event_id: Text | None = None


class Clear(_Fields):
    """`input_audio_buffer.clear`"""

    type: Literal["input_audio_buffer.clear"]
    event_id: Text | None = None


ClientEvent = Update | Append | Commit | Clear
CLIENT_EVENT: TypeAdapter[ClientEvent] = TypeAdapter(Annotated[ClientEvent, Field(discriminator="type")])
