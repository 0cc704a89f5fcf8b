"""The slot engine: requests wait, are read, share the steps of one table of states, and end each in its own time."""

# S slots · F frames · K labels of the CTC head · V vocabulary

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.batch import Sample
from rwkv_speech.decoding.options import GREEDY, Options
from rwkv_speech.decoding.reader import Reader
from rwkv_speech.decoding.strategy import Hypothesis, Track, measured
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.state import State

# Requests that `run` has read ahead, for each slot: the longest of them comes first.
_AHEAD = 4


@dataclass(frozen=True, eq=False)
class Request:
    """One piece of audio to decode: `key` is the caller's, `limit` the most tokens of its text.

    Above `temperature` 0 the tokens are sampled. `before` is text that stands before the audio, in place of the
    options' `initial_prompt`.
    """

    key: Any
    sample: Sample
    limit: int
    temperature: float = 0.0
    before: str | None = None


@dataclass(frozen=True, eq=False)
class Done:
    """A request's texts, best first, and the CTC head's log-probabilities (F, K) of its frames, on the CPU."""

    request: Request
    hypotheses: list[Hypothesis]
    ctc: Tensor | None


@dataclass(eq=False)
class _Slot:
    """What a slot is busy with."""

    request: Request
    ctc: Tensor | None
    track: Track
    token: int = 0  # chosen, and not yet read


class Engine:
    """Decodes requests in `slots` at once; what is found in one does not depend on the others.

    All slots make every step, the empty ones too, so that a step always has one shape. A slot whose text has ended
    takes the longest of the waiting requests.
    """

    def __init__(self, model: SpeechLM, options: Options = GREEDY, slots: int = 8) -> None:
        self._model, self._options = model, options
        self._reader = Reader(model)
        self._slots: list[_Slot | None] = [None] * slots
        self._state = model.lm.zero_state(slots)
        self._logits: Tensor | None = None  # (S, V) of the next token of each slot
        self._waiting: list[tuple[int, int, Request]] = []  # a heap: longest first, then in order
        self._count = itertools.count()
        encode = model.tokenizer.encode
        self._before, self._after = encode(options.initial_prompt), encode(options.prompt)

    @property
    def num_unfinished(self) -> int:
        """The requests that wait or are being decoded."""
        return len(self._waiting) + sum(slot is not None for slot in self._slots)

    def submit(self, request: Request) -> None:
        """Have a request decoded by the next calls of `poll`."""
        sample = request.sample
        length = len(sample.waveform if sample.frames is None else sample.frames)
        heapq.heappush(self._waiting, (-length, next(self._count), request))

    @torch.no_grad()
    def poll(self) -> list[Done]:
        """One round: a step of the texts in the making, free slots filled, a token chosen for each; what has ended."""
        self._step()
        return [*self._admit(), *self._choose()]

    def run(self, requests: Iterable[Request]) -> Iterator[Done]:
        """Decode requests, which are taken as they are wanted; results come as they end, in any order."""
        source = iter(requests)
        exhausted = False
        while not exhausted or self.num_unfinished:
            while not exhausted and len(self._waiting) < _AHEAD * len(self._slots):
                request = next(source, None)
                exhausted = request is None
                if request is not None:
                    self.submit(request)
            yield from self.poll()

    def _step(self) -> None:
        if any(self._slots):
            tokens = torch.tensor([slot.token if slot else 0 for slot in self._slots])
            self._logits = self._model.lm.step(tokens.to(self._state.wkv.device, non_blocking=True), self._state)

    def _admit(self) -> list[Done]:
        """Fill the free slots from what waits; the requests that hold no audio token have no text, and are done."""
        done = []
        free = [number for number, slot in enumerate(self._slots) if slot is None]
        while free and self._waiting:
            _, _, request = heapq.heappop(self._waiting)
            encoded = self._reader.encode(request.sample)
            if len(encoded.audio) == 0:
                done.append(Done(request, [Hypothesis((), (), (), cut=False)], encoded.ctc))
                continue
            before = self._before if request.before is None else self._model.tokenizer.encode(request.before)
            logits, state = self._reader.prefill(encoded, request.sample.task, before, self._after)
            number = free.pop(0)
            self._place(number, logits, state)
            self._slots[number] = _Slot(request, encoded.ctc, Track(request.limit))
        return done

    def _place(self, number: int, logits: Tensor, state: State) -> None:
        """Put logits (1, V) and a state of one sequence into a slot."""
        if self._logits is None:
            self._logits = logits.new_zeros(len(self._slots), logits.shape[-1])
        self._logits[number] = logits[0]
        for table, row in zip(self._state, state, strict=True):
            table[:, number] = row[:, 0]

    def _choose(self) -> list[Done]:
        """Append a token to each text; those that have ended leave their slots."""
        if self._logits is None:
            return []
        logprobs, entropies = measured(self._logits)
        best, tokens = logprobs.max(-1)
        # One copy to the host; token ids are exact in float32.
        table = torch.stack((tokens.float(), best, entropies)).tolist()
        done = []
        for number, (slot, token, logprob, entropy) in enumerate(zip(self._slots, *table, strict=True)):
            if slot is None:
                continue
            slot.token = int(token)
            found = slot.track.append(slot.token, logprob, entropy, self._model.tokenizer.eos_id)
            if found is not None:
                done.append(Done(slot.request, [found], slot.ctc))
                self._slots[number] = None
        return done
