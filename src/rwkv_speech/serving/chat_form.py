"""The fields of a chat, and what its messages say: each is honoured, or refused by its name."""

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from rwkv_speech.audio import SAMPLE_RATE, AudioError
from rwkv_speech.batch import Sample
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.serving.faults import Fault
from rwkv_speech.serving.form import Audio, Text
from rwkv_speech.serving.worker import Said

_MOST_MESSAGES, _MOST_TOKENS = 128, 4096
_SYSTEM = ("system", "developer")
SessionId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]*$", max_length=64)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Fields):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class InputAudio(_Fields):
    """A recording in base64; what it is its content says, too."""

    data: str
    format: Literal["wav", "mp3", "flac"]


class AudioPart(_Fields):
    """What is spoken in a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | AudioPart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Fields):
    """One message; the answers among them are text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts), Field(min_length=1, max_length=16)]

    @property
    def text(self) -> str:
        """Its text parts, one a line."""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def recordings(self) -> list[InputAudio]:
        """Its audio parts."""
        return [part.input_audio for part in self.content if isinstance(part, AudioPart)]

    def sample(self, task: str, model: SpeechLM, most_seconds: float) -> Sample:
        """As the model takes it: text alone is read in place of audio, beside audio it is read before it."""
        ids = tuple(model.tokenizer.encode(self.text))
        if not self.recordings:
            return Sample("text", torch.empty(0), "", [], 0.0, 0, task, input_ids=ids)
        [recording] = self.recordings
        try:
            content = base64.b64decode(recording.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Fault(400, "messages: the audio is no base64", "invalid_audio", "messages") from error
        audio = Audio(content, most_seconds, "messages")
        try:
            waveform = torch.cat(list(audio.blocks()))
        except AudioError as error:
            raise audio.fault(str(error)) from error
        return Sample("audio", waveform, "", [], len(waveform) / SAMPLE_RATE, 0, task, prompt_ids=ids)


class StreamOptions(_Fields):
    """What else is streamed."""

    include_usage: bool = False


class ChatForm(_Fields):
    """The fields of openai's `chat.completions.create` that can be honoured, and `session_id`; others are refused."""

    model: Text
    messages: list[Message] = Field(min_length=1, max_length=_MOST_MESSAGES)
    session_id: SessionId = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    max_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    modalities: list[Literal["text"]] = Field(["text"], min_length=1, max_length=1)
    n: Literal[1] = 1

    def turns(self) -> tuple[str, list[Message], list[Message]]:
        """What is said first of all, what users say, and the answers between these; raises Fault for another order."""
        has_system = self.messages[0].role in _SYSTEM
        messages = self.messages[has_system:]
        users, answers = messages[::2], messages[1::2]
        if {x.role for x in users} != {"user"} or {x.role for x in answers} - {"assistant"} or len(messages) % 2 == 0:
            raise _refused("expected user and assistant in turn, a user last, after one system message at most")
        for message in self.messages:
            if message.recordings and message.role != "user":
                raise _refused("expected audio of users alone")
            if len(message.recordings) > 1:
                raise _refused("expected one recording in a message; send the others as turns of their own")
            if not (message.recordings or message.text.strip()):
                raise _refused("found one without text or audio")
        return self.messages[0].text if has_system else "", users, answers

    def said(self, model: SpeechLM, most_seconds: float, is_known: bool) -> list[Said]:
        """The turns that a session has to read, of which it has all but the last if it `is_known`.

        Raises Fault for messages in another order, and for audio that cannot be used.
        """
        system, users, answers = self.turns()
        given: Sequence[tuple[int, ...] | None] = [*(tuple(model.tokenizer.encode(x.text)) for x in answers), None]
        if is_known:
            system, users, given = "", users[-1:], given[-1:]
        before = [system, *[""] * (len(users) - 1)]
        samples = [message.sample(self.model, model, most_seconds) for message in users]
        return [Said(*x) for x in zip(samples, before, given, strict=True)]


def _refused(message: str) -> Fault:
    return Fault(400, f"messages: {message}", "invalid_value", "messages")
