"""Conversations: the recurrent state alone remembers what was said, so that no turn costs more than the first."""

# L layers · B batch · S samples

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE, as_waveform, load_audio
from rwkv_speech.batch import BETWEEN_TURNS, Sample
from rwkv_speech.decoding.engine import Done, Engine, Request
from rwkv_speech.decoding.options import Options
from rwkv_speech.errors import UserError, first_line
from rwkv_speech.files import write_atomically
from rwkv_speech.models.checkpoint import ordered
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.state import State
from rwkv_speech.tasks import Naming
from rwkv_speech.tokenizer import WorldTokenizer

Said = Tensor | np.ndarray | Path | str
FORMAT = "rwkv_speech-session-1"
# An answer may be longer than what it answers.
_MOST_TOKENS = 256


@dataclass(frozen=True)
class Turn:
    """An answer: its text and tokens; `cut` says whether it was cut off at its limit.

    `heard` is what was heard, by a task that transcribes first; None by others.
    """

    text: str
    tokens: tuple[int, ...]
    cut: bool
    heard: str | None = None


class TextParts:
    """A text in parts of whole characters, as its tokens come."""

    def __init__(self, tokenizer: WorldTokenizer) -> None:
        self._decoder, self._known = tokenizer.incremental(), 0

    def next(self, ids: Sequence[int]) -> str:
        """What the tokens so far add to those of the last call."""
        part = "".join(map(self._decoder.push, ids[self._known :]))
        self._known = len(ids)
        return part

    def last(self, ids: Sequence[int]) -> str:
        """What all tokens add, and what is left."""
        return self.next(ids) + self._decoder.flush()


class Session:
    """One conversation of a model: `say` takes audio or text and gives an answer, and the state remembers both.

    A turn reads, from the state that the one before left, BETWEEN_TURNS (but for the first), what is said, the task's
    prompt, the separator, and its answer without the end of text: as turns are trained. The answer of a task that
    transcribes first has what was heard and the separator before it, which nobody is shown.
    """

    def __init__(self, model: SpeechLM, task: str) -> None:
        self._model, self.task = model, task
        with torch.no_grad():
            self._state = State(*(x.clone() for x in model.initial_state([task])))
        self.num_turns = 0

    @classmethod
    def begun(cls, model: SpeechLM, task: str = "", path: str | Path = "") -> "Session":
        """The session that `path` holds, or where there is none yet a new one of `task`; raises UserError as `load`.

        Without a name it is that of the state `chat`, or of the one that texts have which name no task.
        """
        if path and os.path.lexists(path):
            return cls.load(path, model, task)
        names = list(model.initial_states)
        wanted = task or ("chat" if "chat" in names else "")
        return cls(model, Naming.among(names, wanted).state(None, None))

    @property
    def state(self) -> State:
        """A copy of what is remembered; B = 1."""
        return State(*(x.clone() for x in self._state))

    def say(self, said: Said, **options: Any) -> Turn:
        """The answer to a waveform (S,) at 16 kHz, to a recording's Path, or to a text.

        The `options` are those of `SpeechLM.transcribe`. Raises AudioError for what cannot be decoded, and UserError
        for an option that is unknown or out of range.
        """
        answer = self.answer(said, Options.given(**options))
        while True:
            try:
                next(answer)
            except StopIteration as end:
                turn: Turn = end.value
                return turn

    def stream(self, said: Said, **options: Any) -> Iterator[str]:
        """The same in parts as they are written, one of them for a beam search and the best of several samples.

        The turn is remembered when the last part has been taken.
        """
        return self.answer(said, Options.given(**options))

    @torch.no_grad()
    def answer(self, said: Said, options: Options) -> Generator[str, None, Turn]:
        """What `stream` gives, and at its end the turn."""
        engine, parts, done = Engine(self._model, options, slots=1), TextParts(self._model.tokenizer), list[Done]()
        engine.submit(self.request(said, options))
        while not done:
            done = engine.poll()
            if part := "".join(parts.next(ids) for _, ids in engine.unfinished()):
                yield part
        if rest := parts.last(done[0].hypotheses[0].ids):
            yield rest
        return self.take(done[0])

    def request(self, said: Said | Sample, options: Options, key: Any = None) -> Request:
        """What an engine of the same options is asked for the next answer; `take` what it finds.

        A Sample is one of this model's, as a data set gives it.
        """
        sample = said if isinstance(said, Sample) else self.sample(said)
        first = options.temperatures[0]
        before = BETWEEN_TURNS if self.num_turns else None
        limit, more = options.max_new_tokens or _MOST_TOKENS, options.best_of
        return Request(key, sample, limit, first, before, start=self._state, best_of=more)

    def take(self, done: Done, answer: Sequence[int] | None = None) -> Turn:
        """Remember a turn as an engine found it, or with an `answer` that is given; raises UserError for another's."""
        if done.request.start is not self._state:
            raise UserError("session: found the answer to another turn or another session; take each answer once")
        best = done.hypotheses[0]
        if done.state is not None:  # None of audio too short to be heard
            before = () if best.heard is None else (*best.heard, self._model.separator_id)
            self._state = self._read([*before, *(best.ids if answer is None else answer)], done.state)
            self.num_turns += 1
        decode = self._model.tokenizer.decode
        return Turn(decode(best.ids), best.ids, best.cut, None if best.heard is None else decode(best.heard))

    def fork(self) -> "Session":
        """Another session that remembers the same, and goes its own way."""
        other = Session(self._model, self.task)
        other._state, other.num_turns = self.state, self.num_turns
        return other

    def save(self, path: str | Path) -> None:
        """Write what is remembered, whole or not at all."""
        tensors = {name: x.detach().cpu().contiguous() for name, x in self._state._asdict().items()}
        known = {"format": FORMAT, "task": self.task, "num_turns": str(self.num_turns)}
        known |= {"made_with": json.dumps(self._made_with), "sha256": _digest(tensors)}
        content = ordered(save(tensors, known))
        write_atomically(Path(path), lambda temporary: temporary.write_bytes(content))

    @classmethod
    def load(cls, path: str | Path, model: SpeechLM, task: str = "") -> "Session":
        """Continue a session that was saved.

        Raises UserError naming the file if it is damaged or none, if it was made with other weights, or if `task` is
        given and another.
        """
        tensors, known = _read_file(Path(path))
        if task and known["task"] != task:
            raise UserError(
                f"{path}: is a session of the task {known['task']!r}, found --task {task}; leave it out, or name a new "
                "file"
            )
        session = cls(model, known["task"])
        made_with: dict[str, str] = json.loads(known["made_with"])
        for part, found in session._made_with.items():
            if made_with[part] != found:
                raise UserError(
                    f"{path}: was made with another {part} (SHA-256 {made_with[part][:12]}...) than the weights have "
                    f"({found[:12]}...); give the weights that it was made with, or name a new file"
                )
        like = session._state
        session._state = State(*(tensors[name].to(x.device, x.dtype) for name, x in like._asdict().items()))
        session.num_turns = int(known["num_turns"])
        return session

    def sample(self, said: Said) -> Sample:
        """What is said as the model takes it: a waveform (S,), a recording's Path, or a text that is read."""
        if isinstance(said, str):
            ids = tuple(self._model.tokenizer.encode(said))
            return Sample("text", torch.empty(0), "", [], 0.0, 0, self.task, input_ids=ids)
        waveform = load_audio(said) if isinstance(said, Path) else as_waveform(said, "audio")
        return Sample("audio", waveform, "", [], len(waveform) / SAMPLE_RATE, 0, self.task)

    @torch.no_grad()
    def _read(self, ids: Sequence[int], state: State) -> State:
        """The state behind some more tokens."""
        if not ids:
            return state
        lm = self._model.lm
        x = lm.embed(torch.tensor([ids], device=state.wkv.device))
        return lm.hidden(x, state)[1]

    @cached_property
    def _made_with(self) -> dict[str, str]:
        """What tells the weights from others, by what people know it as."""
        model = self._model
        learned = {"initial_state": model.initial_states[self.task]}
        if self.task in model.soft_prompts:
            learned["soft_prompt"] = model.soft_prompts[self.task]
        return {
            "base model": model.parts.base_sha256,
            "adapter": model.adapter_sha256,
            "initial state": _digest(learned),
        }


def converse(
    model: SpeechLM,
    conversations: Iterable[Sequence[Sample]],
    options: Options,
    slots: int,
    given_history: bool = False,
) -> Iterator[tuple[Sample, Turn]]:
    """The answer to each turn of conversations, so many of which are held at once, as they are found.

    Each goes on with its own answers, or with those that the samples have.
    """
    engine, waiting = Engine(model, options, slots), iter(conversations)
    talking = 0
    while True:
        while talking < slots and (turns := next(waiting, None)):
            session = Session(model, turns[0].task)
            engine.submit(session.request(turns[0], options, (session, turns)))
            talking += 1
        if not talking:
            return
        for done in engine.poll():
            session, turns = done.request.key
            yield turns[0], session.take(done, turns[0].ids if given_history else None)
            if len(turns) > 1:
                engine.submit(session.request(turns[1], options, (session, turns[1:])))
            else:
                talking -= 1


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of names and bytes."""
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        found.update(name.encode())
        found.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a session's file; raises UserError naming it if it is none, or damaged."""
    try:
        with safe_open(path, "pt") as file:
            known: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as a session ({first_line(error)}); expected a file that --session wrote: name "
            "another, or remove it to start a new one"
        ) from error
    if known.get("format") != FORMAT or known.get("sha256") != _digest(tensors):
        fault = "is damaged" if known.get("format") == FORMAT else "is no session"
        raise UserError(
            f"{path}: {fault}, expected a file that --session wrote, as it was written; name another, or remove it to "
            "start a new one"
        )
    return tensors, known
