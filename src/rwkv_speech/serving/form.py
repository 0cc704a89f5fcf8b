"""The fields of a request for a transcript, and what they ask of decoding: each is honoured, or refused by its name."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator
from torch import Tensor

from rwkv_speech import tasks
from rwkv_speech.audio import SAMPLE_RATE, AudioError, read_blocks
from rwkv_speech.batch import BadSample
from rwkv_speech.decoding.keywords import Keywords
from rwkv_speech.decoding.long_audio import PAD, PAUSE, THRESHOLD, SpeechBounds
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.results import Transcript
from rwkv_speech.decoding.transcriber import Recording
from rwkv_speech.errors import UserError
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.serving.faults import Fault

# A short block keeps the others waiting for a short time only while it is read.
_BLOCK_SECONDS = 5.0
_INTO_ENGLISH = ("st_en", "st")
_MOST_KEYWORDS, _MOST_LETTERS = 100, 4000
_MS = SAMPLE_RATE // 1000  # samples

Text = Annotated[str, StringConstraints(max_length=_MOST_LETTERS)]
Language = Annotated[str, StringConstraints(pattern=r"^([A-Za-z]{2,3}([-_][A-Za-z0-9]+)*)?$", max_length=16)]


class SpeechDetection(BaseModel):
    """What the VAD takes for speech, and the silence that ends a piece or a turn of it."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["server_vad"]
    threshold: float = Field(THRESHOLD, gt=0, lt=1, allow_inf_nan=False)
    prefix_padding_ms: int = Field(PAD // _MS, ge=0, le=5_000)
    silence_duration_ms: int = Field(PAUSE // _MS, ge=100, le=10_000)

    def bounds(self) -> SpeechBounds:
        """The same in samples."""
        return SpeechBounds(self.threshold, self.silence_duration_ms * _MS, self.prefix_padding_ms * _MS)


Chunking = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[SpeechDetection, Tag("server_vad")],
    Discriminator(lambda given: "auto" if isinstance(given, str) else "server_vad"),
]


class TranslationForm(BaseModel):
    """The fields of openai's `audio.translations.create`; any other is refused."""

    model_config = ConfigDict(extra="forbid")
    file: UploadFile
    model: Text
    prompt: Text = ""
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)

    def transcription(self) -> "Form":
        """The same request for that model's texts; raises Fault for a model that does not translate into English."""
        if self.model not in _INTO_ENGLISH:
            raise unsupported("model", f"expected one that translates into English: {' or '.join(_INTO_ENGLISH)}")
        return Form.model_validate(dict(self))


class Form(TranslationForm):
    """The fields of `audio.transcriptions.create` that can be honoured; any other is refused."""

    language: Language = ""
    timestamp_granularities: list[Literal["word", "segment"]] = Field([], alias="timestamp_granularities[]")
    include: list[Literal["logprobs"]] = Field([], alias="include[]")
    keywords: list[Text] = Field([], alias="keywords[]", max_length=_MOST_KEYWORDS)
    languages: list[Language] = Field([], alias="languages[]", max_length=1)
    chunking_strategy: Chunking | None = None
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, fields: Any) -> Any:
        """The client sends an object's fields one by one, as `chunking_strategy[threshold]`."""
        start = "chunking_strategy["
        found = {name: fields[name] for name in fields if str(name).startswith(start)}
        if not found:
            return fields
        rest = {name: fields[name] for name in fields if name not in found}
        return rest | {"chunking_strategy": {name[len(start) : -1]: value for name, value in found.items()}}

    def check(self, model: SpeechLM, default: Options) -> None:
        """Raises Fault for what these weights cannot do, and for fields that contradict each other."""
        check_model(self.model, model)
        is_recognition = tasks.base_of(self.model) == tasks.DEFAULT
        if self.languages and self.language:
            raise unsupported("languages", "a language is given, too; leave one of them out")
        check_language(self.model, self.spoken, model)
        if self.timestamp_granularities and self.response_format != "verbose_json":
            raise unsupported("timestamp_granularities", "expected response_format verbose_json with it")
        if self.has_words and (model.ctc is None or not is_recognition):
            raise unsupported("timestamp_granularities", "this model has no times of words; expected segment")
        if self.stream and self.response_format not in ("json", "text"):
            raise unsupported("stream", "expected response_format json or text with it")
        if self.chunking_strategy and default.vad == "none":
            raise unsupported("chunking_strategy", "this server cuts by length alone; leave it out")
        if self.include and self.response_format != "json":
            raise unsupported("include", "expected response_format json with it")

    @property
    def spoken(self) -> str:
        """The language that the client says is spoken, "" if none."""
        return self.language or next(iter(self.languages), "")

    @property
    def has_words(self) -> bool:
        """Whether times of words are wanted."""
        return "word" in self.timestamp_granularities

    @property
    def has_segments(self) -> bool:
        """Whether times of segments are wanted, as they are if nothing is said."""
        return "segment" in self.timestamp_granularities or not self.timestamp_granularities

    def options(self, default: Options, model: SpeechLM) -> Options:
        """The server's own with what is asked for; the temperature 0 stands for all of its own, as in the API."""
        finds = tasks.LANGUAGE in model.initial_states and self.model == tasks.DEFAULT
        changes: dict[str, Any] = {"language": self.spoken or default.language or ("auto" if finds else "")}
        if self.temperature:
            changes["temperature"] = f"{self.temperature:g}"
        if self.prompt:
            changes["initial_prompt"] = self.prompt
        return replace(default, word_timestamps=int(self.has_words), **changes)


class Audio:
    """A recording in a request's `param`, decoded as it is needed and no further than the limit."""

    def __init__(self, content: bytes, most_seconds: float, param: str = "file") -> None:
        self._content, self._most_seconds, self._param = content, most_seconds, param
        self._is_too_long = False

    def blocks(self) -> Iterator[Tensor]:
        """Its samples (S,) at 16 kHz; raises AudioError for what is broken or too long."""
        total = 0
        for block in read_blocks(self._content, _BLOCK_SECONDS, name=self._param):
            total += len(block)
            if total > self._most_seconds * SAMPLE_RATE:
                self._is_too_long = True
                raise AudioError(
                    f"{self._param}: lasts more than {self._most_seconds:g} s; expected a shorter recording"
                )
            yield block

    def fault(self, reason: str) -> Fault:
        """What is answered when it could not be read."""
        if self._is_too_long:
            return Fault(413, reason, "audio_too_long", self._param)
        return Fault(400, reason, "invalid_audio", self._param)


@dataclass(frozen=True)
class Order:
    """A recording as the transcriber takes it, and the upload that it is made of."""

    recording: Recording
    audio: Audio

    @classmethod
    def of(cls, form: Form, audio: Audio, model: SpeechLM, default: Options) -> "Order":
        """What a form asks for; raises Fault as `Form.check`, and for keywords that are none."""
        form.check(model, default)
        try:
            keywords = expected(tuple(form.keywords), default.keyword_weight, model) if form.keywords else None
        except UserError as error:
            raise Fault(400, str(error), "invalid_value", "keywords") from error
        options, wanted = form.options(default, model), form.chunking_strategy
        bounds = wanted.bounds() if isinstance(wanted, SpeechDetection) else None
        given = object(), "file", audio.blocks, form.model
        return cls(Recording(*given, options=options, keywords=keywords, bounds=bounds), audio)

    def result(self, future: asyncio.Future[Transcript | BadSample], limit: float) -> Transcript:
        """What was found; raises Fault for a broken recording, and where nothing is there after `limit` seconds."""
        if not future.done():
            raise Fault(503, f"the recording was not transcribed within {limit:g} s; send a shorter one", "timeout")
        if future.exception():
            raise Fault(500, "decoding failed; the server's log says why", "server_error")
        found = future.result()
        if isinstance(found, BadSample):
            raise self.audio.fault(found.reason)
        return found


@lru_cache(16)
def expected(phrases: tuple[str, ...], weight: float, model: SpeechLM) -> Keywords | None:
    """The keywords, made once for clients that ask again with the same ones: a large vocabulary takes its time."""
    options = Options.given(keywords=phrases, keyword_weight=weight)
    return Keywords.of(options, model.tokenizer, model.lm.sizes.vocab, model.lm.emb.weight.device)


def check_model(name: str, model: SpeechLM) -> None:
    """Raises Fault for a name that none of the learned states has."""
    if name not in model.initial_states:
        known = ", ".join(sorted(model.initial_states))
        raise Fault(404, f"there is no such model here; expected one of {known}", "model_not_found", "model")


def check_language(name: str, spoken: str, model: SpeechLM) -> None:
    """Raises Fault for a spoken language, "" for none, that a model does not recognise."""
    if spoken and tasks.base_of(name) != tasks.DEFAULT:
        raise unsupported("language", "this model does not recognise speech; leave it out")
    own = tasks.state_name(tasks.DEFAULT, spoken, by_lang=True)
    if spoken and name not in (tasks.DEFAULT, own) and own not in model.initial_states:
        raise unsupported("language", "this model recognises another one; expected its own, or none")


def unsupported(param: str, message: str) -> Fault:
    """What a field asks for that is not done here."""
    return Fault(400, f"{param}: {message}", "unsupported_value", param)
