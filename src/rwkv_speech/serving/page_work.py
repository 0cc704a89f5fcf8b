"""What the page does with the model: recordings, a microphone and turns become text, a picture, files and speeds."""

# S samples

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rwkv_speech import tasks
from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.batch import BadSample
from rwkv_speech.config import PageConfig
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.results import Segment, Transcript, whole_text
from rwkv_speech.decoding.session import Session, Turn
from rwkv_speech.decoding.streaming import Committed, Event, Stream
from rwkv_speech.decoding.transcribe import stream_through
from rwkv_speech.decoding.transcriber import Recording, Transcriber
from rwkv_speech.decoding.turns import Turns
from rwkv_speech.errors import UserError
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.serving.events import Told
from rwkv_speech.serving.form import Audio, check_language
from rwkv_speech.serving.page_view import Outline
from rwkv_speech.serving.worker import Said, Talk, Worker
from rwkv_speech.synthetic.espeak import Speech, Synthesizer, Voice

# A part of a microphone is waited for so long; the browser would lose the next one.
_PATIENCE_SECONDS = 0.3
# A part that the browser has lost, and not one that is late, is told.
_LOST_SECONDS = 0.45
# What is being said is read again after so much more of it.
_PACE_SECONDS = 0.5
# A silence of so long ends a turn.
_TURN_SILENCE_SECONDS = 0.8
_HEADER_BYTES = 44  # of the WAV that a browser's recorder makes
_SESSION_FILE = "conversation.session"
Found = TypeVar("Found")


@dataclass(frozen=True)
class Heard:
    """What a recording says so far: text that stays, text that may change, and how fast it came.

    The `transcript` is there at the end.
    """

    text: str
    partial: str
    speed: str
    outline: Outline
    transcript: Transcript | None = None


@dataclass(frozen=True)
class Answer:
    """An answer so far, and how fast it came; the session that remembers it is there at the end."""

    text: str
    speed: str
    session: Session | None = None


@dataclass
class Live:
    """A microphone, part by part."""

    rate: int
    outline: Outline
    task: str
    language: str
    waiting: list[np.ndarray] = field(default_factory=list)  # parts that came while others were heard
    work: asyncio.Task[None] | None = None
    stream: Stream | None = None  # with the first part
    latency: float = 0.0
    text: str = ""
    partial: str = ""
    seconds: float = 0.0
    busy_seconds: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    begun: float = 0.0  # when it was switched on, by the first part
    lost_seconds: float = 0.0  # that passed since, of which no part came

    def push(self, samples: np.ndarray) -> None:
        """Take the next part, which has waited for nothing but its end."""
        now = time.monotonic()
        self.seconds += len(samples) / self.rate
        self.begun = self.begun or now - self.seconds
        self.lost_seconds = now - self.begun - self.seconds
        self.outline.push(samples)
        self.waiting.append(samples)

    def take(self, events: list[Event]) -> None:
        """What the next part made."""
        for event in events:
            if isinstance(event, Committed):
                self.text, self.partial = self.text + event.text, ""
                self.segments += [event.segment] if event.segment else []
            else:
                self.partial = event.text
        if self.stream and self.stream.speech_start is None and not events:
            self.partial = ""


@dataclass
class Talking:
    """A microphone whose turns are answered one by one: it hears nothing while an answer is made or spoken."""

    turns: Turns
    is_answered: bool = True
    deaf_until: float = 0.0


class Desk:
    """One model and its worker; of each visitor it knows what it is given."""

    def __init__(self, model: SpeechLM, config: PageConfig) -> None:
        self._model, self._config, self._options = model, config, Options.of(config)
        self._worker = Worker(model, self._options, config.micro_bsz)
        self._transcriber: Transcriber | None = None
        self._synthesizer, self._voice_lock = _synthesizer(), threading.Lock()

    @property
    def can_speak(self) -> bool:
        """Whether answers can be spoken: eSpeak NG is installed."""
        return self._synthesizer is not None

    @property
    def finds_turns(self) -> bool:
        """Whether silences are found."""
        return self._options.vad != "none"

    @property
    def states(self) -> list[str]:
        """The tasks: names of the learned states."""
        return list(self._model.initial_states)

    @property
    def languages(self) -> list[str]:
        """What can be said to be spoken: languages with a state of their own, and auto where one finds them."""
        own = f"{tasks.DEFAULT}_"
        found = sorted(name.removeprefix(own) for name in self.states if name.startswith(own))
        return ["auto", *found] if tasks.LANGUAGE in self.states else found

    def close(self) -> None:
        """Return when all is done that was begun."""
        self._worker.close()

    async def transcribe(self, content: bytes, task: str, language: str) -> AsyncGenerator[Heard]:
        """The transcript of a file's bytes in parts, as soon as nothing can change them, and at the end whole.

        Raises UserError for what cannot be read or takes too long.
        """
        options, begun, first = self._asked(task, language), time.monotonic(), 0.0
        audio, outline = Audio(content, self._config.max_audio_seconds, "the recording"), Outline(SAMPLE_RATE)
        recording = Recording(object(), "the recording", partial(outline.watched, audio.blocks()), task, None,
                              options=options)  # fmt: skip
        told = Told(partial(self._worker.submit, recording), partial(self._worker.cancel, recording.key))
        async with aclosing(told.parts(self._config.request_seconds)) as parts:
            async for segments in parts:
                first = first or time.monotonic() - begun
                yield Heard(whole_text(task, segments), "", _first(first), outline)
        found = self._found(told)
        if isinstance(found, BadSample):
            raise UserError(found.reason)
        took = time.monotonic() - begun
        speed = f"{_first(first or took)} {_times(found.seconds, took)}"
        yield Heard(found.text, "", speed, outline, found)

    async def hear(self, live: Live | None, content: bytes, task: str, language: str) -> tuple[Live, Heard]:
        """What a microphone says so far, with the next part of it, a WAV; None before the first one."""
        rate, samples = _part(content)
        live = live or Live(rate, Outline(rate), task, language)
        live.push(samples)
        if live.seconds > self._config.max_audio_seconds:
            raise UserError(f"the microphone: found more than {self._config.max_audio_seconds:g} s; record again")
        if live.work is None or live.work.done():
            live.work = asyncio.create_task(self._listen(live))
        await asyncio.wait([live.work], timeout=_PATIENCE_SECONDS)
        if live.work.done():
            live.work.result()  # what went wrong
        return live, Heard(live.text, live.partial, _live_speed(live), live.outline)

    async def finish(self, live: Live) -> Heard:
        """The transcript of what a microphone said; nothing comes after it."""
        assert live.work is not None
        await live.work
        await self._listen(live)
        assert live.stream is not None
        live.take(await self._run(live.stream.finish))
        known = live.seconds, live.task, live.language or None
        found = Transcript(live.text.strip(), live.segments, *known)
        return Heard(live.text, "", _live_speed(live), live.outline, found)

    async def _listen(self, live: Live) -> None:
        """Take all parts that wait."""
        if live.stream is None:
            opened = await self._run(partial(self._begin, live))
            live.stream = opened
        stream = live.stream
        while live.waiting:
            samples, begun = np.concatenate(live.waiting), time.monotonic()
            live.waiting.clear()
            live.take(await self._run(partial(stream.push, samples)))
            live.latency = time.monotonic() - begun
            live.busy_seconds += live.latency

    async def overhear(self, talking: Talking | None, content: bytes) -> tuple[Talking, Tensor | None]:
        """The next part of a microphone, a WAV, and the turn (S,), 16 kHz, that ends in it, which is to be answered."""
        rate, samples = _part(content)
        if talking is None:
            segmenter = (await self._run(self._opened)).segmenter()
            talking = Talking(Turns(segmenter, _TURN_SILENCE_SECONDS, rate, self._config.max_turn_seconds))
        if not talking.is_answered or time.monotonic() < talking.deaf_until:
            return talking, None
        return talking, self._turn_of(talking, await self._run(partial(talking.turns.push, samples)))

    async def last_turn(self, talking: Talking) -> Tensor | None:
        """What has been said when a microphone is switched off."""
        return self._turn_of(talking, await self._run(talking.turns.finish)) if talking.is_answered else None

    def _turn_of(self, talking: Talking, ended: list[Tensor]) -> Tensor | None:
        talking.is_answered = not ended
        return torch.cat(ended) if ended else None

    def spoken(self, text: str) -> Speech:
        """The text by a synthetic voice."""
        assert self._synthesizer is not None
        with self._voice_lock:  # eSpeak says one thing at a time
            return self._synthesizer.say(text, Voice())

    async def answer(self, session: Session | None, said: bytes | str | Tensor, task: str) -> AsyncGenerator[Answer]:
        """The answer to a file's bytes, to a waveform (S,) or to a text, in parts, and then with what remembers it.

        What is given is not changed, so that a turn that fails leaves nothing. Raises UserError as `transcribe`.
        """
        begun, first, text = time.monotonic(), 0.0, ""
        session = session.fork() if session else Session(self._model, task)
        sample = session.sample(await asyncio.to_thread(self._turn, said) if isinstance(said, bytes) else said)
        talk = Talk(session, [Said(sample)], self._options, self._model)
        told = Told(partial(self._worker.converse, talk), partial(self._worker.cancel, talk))
        async with aclosing(told.parts(self._config.request_seconds)) as parts:
            async for part in parts:
                first, text = first or time.monotonic() - begun, text + part
                yield Answer(text, _first(first))
        turn: Turn = self._found(told)
        took = time.monotonic() - begun
        speed = _first(first or took) + (f" {_times(sample.duration, took)}" if sample.duration else "")
        yield Answer(turn.text, speed, session)

    def loaded(self, path: Path) -> Session:
        """The conversation that a file holds; raises UserError for none, and for one of other weights."""
        try:
            return Session.load(path, self._model)
        except UserError as error:
            raise UserError(str(error).replace(str(path), "the file")) from error

    def saved(self, session: Session) -> bytes:
        """What `loaded` reads."""
        with TemporaryDirectory() as folder:
            path = Path(folder, _SESSION_FILE)
            session.save(path)
            return path.read_bytes()

    def _asked(self, task: str, language: str) -> Options:
        check_language(task, language, self._model)
        finds_words = self._model.ctc is not None and tasks.base_of(task) == tasks.DEFAULT
        return replace(self._options, word_timestamps=int(finds_words), language=language or self._options.language)

    def _begin(self, live: Live) -> Stream:
        task, options = live.task, self._asked(live.task, live.language)
        return stream_through(self._opened(), self._model, options, "segment", _PACE_SECONDS, live.rate, task)

    def _opened(self) -> Transcriber:
        self._transcriber = self._transcriber or Transcriber(self._model, self._options, slots=1)
        return self._transcriber

    def _turn(self, content: bytes) -> Tensor:
        return torch.cat(list(Audio(content, self._config.max_turn_seconds, "the recording").blocks()))

    async def _run(self, work: Callable[[], Found]) -> Found:
        try:
            async with asyncio.timeout(self._config.request_seconds):
                return await asyncio.wrap_future(self._worker.run(work))
        except TimeoutError as error:
            raise self._too_long() from error

    def _found(self, told: Told[object, Found]) -> Found:
        if not told.future.done():
            raise self._too_long()
        return told.future.result()

    def _too_long(self) -> UserError:
        return UserError(f"found nothing within {self._config.request_seconds:g} s; give less, or try again soon")


def _synthesizer() -> Synthesizer | None:
    try:
        return Synthesizer()
    except UserError:  # then the page says that it has none
        return None


def _part(content: bytes) -> tuple[int, np.ndarray]:
    """Samples a second, and samples (S,), int16, of a part of a recording, whose header tells no length.

    Raises UserError for what no browser's recorder makes.
    """
    channels, rate, bits = (
        int.from_bytes(content[at : at + size], "little") for at, size in ((22, 2), (24, 4), (34, 2))
    )
    samples = content[_HEADER_BYTES:]
    if content[:4] != b"RIFF" or bits != 16 or channels not in (1, 2):
        raise UserError("the microphone: expected 16-bit WAV of one or two channels; use another browser, or a file")
    found = np.frombuffer(samples[: len(samples) // (2 * channels) * 2 * channels], "<i2").reshape(-1, channels)
    return rate, found[:, 0].astype(np.int16)


def _live_speed(live: Live) -> str:
    speed = f"Latency {1000 * live.latency:.0f} ms. {_times(live.seconds, live.busy_seconds)}"
    if live.lost_seconds < _LOST_SECONDS:
        return speed
    return f"{speed} Words may be missing: the browser sent {live.lost_seconds:.1f} s less; the computer is too busy."


def _first(seconds: float) -> str:
    return f"First text after {seconds:.2f} s."


def _times(seconds: float, took: float) -> str:
    return f"{seconds:.1f} s of audio in {took:.1f} s: {seconds / max(took, 1e-3):.1f} times real time."
