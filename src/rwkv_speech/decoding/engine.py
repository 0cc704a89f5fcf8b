"""The slot engine: requests wait, are read, share the steps of one table of states, and end each in its own time."""

# S slots · F frames · K labels of the CTC head · V vocabulary

import heapq
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.batch import Sample
from rwkv_speech.decoding.beam import Beam, candidates
from rwkv_speech.decoding.ctc_prefix import PrefixScorer, Spelling
from rwkv_speech.decoding.draft import Verifier
from rwkv_speech.decoding.graph import StepGraph
from rwkv_speech.decoding.keywords import Keywords
from rwkv_speech.decoding.options import GREEDY, Options
from rwkv_speech.decoding.reader import Reader, Reading
from rwkv_speech.decoding.rescoring import Rank, by_score, is_spoken, rank_of
from rwkv_speech.decoding.strategy import Hypothesis, Scores, Strategy, Track
from rwkv_speech.errors import UserError
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.state import State

# Requests that `run` has read ahead, for each slot: the longest of them comes first.
_AHEAD = 4


@dataclass(frozen=True, eq=False)
class Request:
    """One piece of audio to decode: `key` is the caller's, `limit` the most tokens of its text.

    At `temperature` 0 the likeliest tokens are taken, by the options' beam search if its width is above 1; above it the
    best of several samples. `before` is text that stands before the audio, in place of the options' `initial_prompt`;
    `draft` is a text to verify, in place of the CTC head's, whatever the options say. `start` is the state to begin
    from, in place of the task's; `keywords` those to expect, and `best_of` the number of samples, in place of the
    options'.
    """

    key: Any
    sample: Sample
    limit: int
    temperature: float = 0.0
    before: str | None = None
    draft: str | None = None
    start: State | None = None
    keywords: Keywords | None = None
    best_of: int = 0


@dataclass(frozen=True, eq=False)
class Done:
    """A request's texts, best first, and the CTC head's log-probabilities (F, K) of its frames, on the CPU.

    `passes` is how often the language model was called for it, one call after the other; `state` what it remembered
    before the text, where the request had a `start`.
    """

    request: Request
    hypotheses: list[Hypothesis]
    ctc: Tensor | None
    passes: int = 1
    state: State | None = None


@dataclass(eq=False)
class _Job:
    """A request that has been read, and what there is of its `wanted` texts."""

    request: Request
    ctc: Tensor | None
    wanted: int = 1
    found: list[Hypothesis] = field(default_factory=list)
    passes: int = 1  # the prefill
    state: State | None = None  # after it, where that is wanted
    rank: Rank = by_score

    def done(self) -> Done:
        best_first = sorted(self.found, key=self.rank, reverse=True)
        return Done(self.request, best_first, self.ctc, self.passes, self.state)


class Engine:
    """Decodes `slots` requests at once; what is found in one does not depend on the others.

    The states lie in a table of S rows, one for each text: with a beam search each request has as many as beams. All
    rows make every step, the empty ones too, so that a step always has one shape; but where a kernel keeps them apart.
    Free rows take the longest of the waiting requests, among so many of a `window`; 1 is first come, first served.
    Raises UserError for a draft where the weights have no CTC head.
    """

    def __init__(self, model: SpeechLM, options: Options = GREEDY, slots: int = 8, window: int = 0) -> None:
        if options.draft and model.ctc is None:
            raise UserError("--draft 1: the weights have no CTC head, whose text it verifies; train one with --ctc 1")
        if options.ctc_weight and model.ctc is None:
            raise UserError("--ctc_weight: the weights have no CTC head to listen; train one with --ctc 1")
        self._model, self._options = model, options
        rows = slots * options.beam
        self._state = model.lm.zero_state(rows)
        self._graph = StepGraph.of(model.lm, self._state)
        self._keywords = Keywords.of(options, model.tokenizer, model.lm.sizes.vocab, self._state.wkv.device)
        self._spelling: Spelling | None = None
        if model.ctc and options.ctc_weight and options.beam > 1:
            self._spelling = Spelling(model.ctc.spec, model.tokenizer, model.lm.sizes.vocab)
        self._reader, self._strategy = Reader(model), Strategy(options, model.tokenizer.eos_id)
        self._logits: Tensor | None = None  # (S, V) of the next token of each row
        self._jobs: list[_Job | None] = [None] * rows  # whose each row is
        self._tracks: list[Track | None] = [None] * rows  # the text in each row; those of a beam search may lack one
        self._beams: list[tuple[_Job, Beam]] = []
        self._verifiers: list[tuple[_Job, Verifier]] = []
        self._texts: deque[tuple[_Job, Track, Tensor, State]] = deque()  # that wait for a row
        self._read: deque[tuple[_Job, Tensor, State]] = deque()  # whose texts are to be begun
        # A heap: longest first, among so many that no short one waits for ever.
        self._waiting: list[tuple[int, int, int, Request]] = []
        self._window = window or _AHEAD * slots
        self._count = itertools.count()
        self.num_unfinished = 0  # requests that wait or are being decoded
        encode = model.tokenizer.encode
        self._before, self._after = encode(options.initial_prompt), encode(options.prompt)

    def submit(self, request: Request) -> None:
        """Have a request decoded by the next calls of `poll`."""
        number = next(self._count)
        heapq.heappush(self._waiting, (number // self._window, -request.sample.length, number, request))
        self.num_unfinished += 1

    @torch.no_grad()
    def poll(self, seconds: float = math.inf) -> list[Done]:
        """One round: texts go on by a token, drafts by a pass, free rows are filled; what has ended.

        Once the round has taken so many seconds, no more is read than what is read together.
        """
        end = time.monotonic() + seconds
        self._step()
        done = [*self._verify(), *self._admit(end), *self._choose()]
        self.num_unfinished -= len(done)
        return done

    def cancel(self, is_dropped: Callable[[Request], bool]) -> None:
        """Give up requests, whatever there is of their texts; nothing comes of them, and their rows are free."""
        tables: Sequence[Iterable[tuple[Any, ...]]] = (self._read, self._texts, self._beams, self._verifiers)
        behind: list[_Job] = [entry[0] for table in tables for entry in table]
        jobs = {job for job in (*self._jobs, *behind) if job and is_dropped(job.request)}
        waiting = [entry for entry in self._waiting if not is_dropped(entry[-1])]
        self.num_unfinished -= len(jobs) + len(self._waiting) - len(waiting)
        heapq.heapify(waiting)
        self._waiting = waiting
        for row, job in enumerate(self._jobs):
            if job in jobs:
                self._jobs[row] = self._tracks[row] = None
        self._read = deque(entry for entry in self._read if entry[0] not in jobs)
        self._texts = deque(entry for entry in self._texts if entry[0] not in jobs)
        self._beams = [entry for entry in self._beams if entry[0] not in jobs]
        self._verifiers = [entry for entry in self._verifiers if entry[0] not in jobs]

    def unfinished(self) -> Iterator[tuple[Request, list[int]]]:
        """What there is so far of each text that is written token by token, once, and not searched for."""
        for job, track in zip(self._jobs, self._tracks, strict=True):
            is_searched = self._options.beam > 1 and job and job.request.temperature == 0
            if job and track and job.wanted == 1 and not is_searched:
                yield job.request, track.answer

    def run(self, requests: Iterable[Request]) -> Iterator[Done]:
        """Decode requests, which are taken as they are wanted; results come as they end, in any order."""
        source = iter(requests)
        exhausted = False
        while not exhausted or self.num_unfinished:
            while not exhausted and len(self._waiting) < _AHEAD * len(self._jobs):
                request = next(source, None)
                exhausted = request is None
                if request is not None:
                    self.submit(request)
            yield from self.poll()

    def _step(self) -> None:
        jobs = {id(job): job for job in self._jobs if job}
        lm, device = self._model.lm, self._state.wkv.device
        if jobs and self._logits is not None and lm.slots_are_apart:
            rows = [row for row, track in enumerate(self._tracks) if track]
            tokens = torch.tensor([track.ids[-1] for track in self._tracks if track])
            self._logits[rows] = lm.step(tokens, self._state, torch.tensor(rows))
        elif jobs:
            tokens = torch.tensor([track.ids[-1] if track else 0 for track in self._tracks])
            self._logits = self._graph.step(tokens) if self._graph else lm.step(tokens.to(device), self._state)
        for job in jobs.values():
            job.passes += 1

    def _verify(self) -> list[Done]:
        """A pass of each draft; texts whose draft is of no more use go on as the others do."""
        done, going = list[Done](), []
        for job, verifier in self._verifiers:
            drafts = verifier.drafts
            if not verifier.ended:
                verifier.advance()
                job.passes += 1
            if verifier.ended:
                job.found.append(verifier.ended)
                done.append(job.done())
            elif drafts:
                going.append((job, verifier))
            else:
                self._texts.append((job, verifier.track, verifier.logits, verifier.state))
        self._verifiers = going
        return done

    def _admit(self, end: float) -> list[Done]:
        """Fill the free rows; what has been found on the way to hold no audio token has no text, and is done."""
        done, has_read = list[Done](), False
        free = [row for row, job in enumerate(self._jobs) if job is None]
        while True:
            while self._texts and free:
                self._place(free.pop(0), *self._texts.popleft())
            room = len(free) - len(self._verifiers) - len(self._texts)
            has_time = not has_read or time.monotonic() < end
            if room > 0 and self._waiting and not self._read and has_time:
                has_read = True
                done += self._read_some()
            elif room > 0 and self._read and room >= self._rows(self._read[0][0].request):
                self._start(*self._read.popleft(), free)
            else:
                return done

    def _read_some(self) -> list[Done]:
        """Encode and prefill the first that wait, as many as are read together."""
        together = list[Request]()
        while self._waiting and len(together) < self._reader.rows:
            request = self._waiting[0][-1]
            if together and self._kind(request) != self._kind(together[0]):
                break
            together.append(heapq.heappop(self._waiting)[-1])
        encoded = self._reader.encode([request.sample for request in together])
        pairs = list(zip(together, encoded, strict=True))
        empty = [pair for pair in pairs if not len(pair[1].audio)]
        pairs = [pair for pair in pairs if len(pair[1].audio)]
        if pairs:
            readings = [self._reading(request) for request, _ in pairs]
            logits, state = self._reader.prefill([one for _, one in pairs], readings)
            for row, (request, one) in enumerate(pairs):
                here = slice(row, row + 1)
                mine = State(*(x[:, here] for x in state))
                kept = State(*(x.clone() for x in mine)) if request.start else None
                self._read.append((_Job(request, one.ctc, state=kept), logits[here], mine))
        return [Done(request, [Hypothesis((), (), (), False)], one.ctc, 0) for request, one in empty]

    def _kind(self, request: Request) -> tuple[Any, ...]:
        """What requests have in common that are read together."""
        sample, room = request.sample, self._reader.room(self._reading(request))
        return self._reader.size(sample), room, sample.normalised, sample.frames is None, sample.input_ids is None

    def _reading(self, request: Request) -> Reading:
        before = self._before if request.before is None else self._model.tokenizer.encode(request.before)
        return Reading(request.sample.task, [*before, *request.sample.prompt_ids], self._after, request.start)

    def _rows(self, request: Request) -> int:
        """The free rows that a request waits for."""
        return self._options.beam if request.temperature == 0 else 1

    def _start(self, job: _Job, logits: Tensor, state: State, free: list[int]) -> None:
        """Begin the texts of a job that has been read, in the free rows."""
        request, options = job.request, self._options
        if request.temperature > 0:
            job.wanted = request.best_of or options.best_of
            job.rank = rank_of(self._model, request.sample.task, job.ctc, options.ctc_weight)
            for number in range(job.wanted):
                chance = random.Random(f"{options.sampling_seed} {request.temperature} {number}")
                track = self._track(request, chance)
                self._texts.append((job, track, logits, state))
        elif options.beam > 1:
            rows = [free.pop(0) for _ in range(options.beam)]
            track, scorer = self._track(request), self._scorer(job)
            if scorer:
                track.prefix, track.total = scorer.start, options.ctc_weight * scorer.start.total
            self._place(rows[0], job, track, logits, state)
            for row in rows[1:]:
                self._jobs[row] = job
            beam = Beam(rows, [track, *[None] * (options.beam - 1)], self._strategy, scorer=scorer)
            self._beams.append((job, beam))
        elif (draft := self._draft(job)) is not None:
            verifier = Verifier(self._model, self._strategy, self._track(request), draft, logits, state)
            self._verifiers.append((job, verifier))
        else:
            self._place(free.pop(0), job, self._track(request), logits, state)

    def _track(self, request: Request, chance: random.Random | None = None) -> Track:
        keywords, separator = request.keywords or self._keywords, self._model.separator_of(request.sample.task)
        return Track(request.limit, request.temperature, chance, keywords=keywords, separator=separator)

    def _scorer(self, job: _Job) -> PrefixScorer | None:
        if self._spelling is None or job.ctc is None or not is_spoken(job.request.sample.task):
            return None
        return PrefixScorer(job.ctc, self._spelling)

    def _draft(self, job: _Job) -> str | None:
        head = self._model.ctc
        if job.request.draft is not None or not self._options.draft or head is None or job.ctc is None:
            return job.request.draft  # of text that is read nothing is heard
        return head.spec.text(job.ctc)

    def _place(self, row: int, job: _Job, track: Track, logits: Tensor, state: State) -> None:
        """Put a text with its logits (1, V) and its state into a row."""
        if self._logits is None:
            self._logits = torch.zeros(len(self._jobs), logits.shape[-1], device=logits.device)
        self._jobs[row], self._tracks[row], self._logits[row] = job, track, logits[0]
        for table, one in zip(self._state, state, strict=True):
            table[:, row] = one[:, 0]

    def _choose(self) -> list[Done]:
        """Append a token to each text; those that have ended leave their rows."""
        if self._logits is None or not any(self._tracks):
            return []
        found = self._strategy.scores(self._logits, self._tracks)
        searched = {row for _, beam in self._beams for row in beam.slots}
        tracks = [None if row in searched else track for row, track in enumerate(self._tracks)]
        done = list[Done]()
        if any(tracks):
            for row, (track, choice) in enumerate(zip(tracks, self._strategy.choose(found, tracks), strict=True)):
                if track and (text := self._strategy.take(track, choice)):
                    done += self._end(row, text)
        return done + self._search(found) if self._beams else done

    def _end(self, row: int, text: Hypothesis) -> list[Done]:
        """Free the row of a text that has ended; the job, if it was its last."""
        job = self._jobs[row]
        assert job is not None
        self._jobs[row] = self._tracks[row] = None
        job.found.append(text)
        return [job.done()] if len(job.found) == job.wanted else []

    def _search(self, found: Scores) -> list[Done]:
        """Move all beam searches on by a token; their states follow in one copy."""
        done, going, copies = list[Done](), [], list[tuple[int, int]]()
        best = candidates([beam for _, beam in self._beams], found)
        for (job, beam), follow in zip(self._beams, best, strict=True):
            moved = beam.advance(follow)
            tracks: Sequence[Track | None] = [None] * len(beam.slots) if moved is None else beam.tracks
            for row, track in zip(beam.slots, tracks, strict=True):
                self._tracks[row] = track
            if moved is None:
                for row in beam.slots:
                    self._jobs[row] = None
                job.found = beam.finished
                done.append(job.done())
            else:
                going.append((job, beam))
                copies += moved
        self._beams = going
        if copies:
            source, target = torch.tensor(copies, device=found.scores.device).T
            for table in self._state:
                table[:, target] = table[:, source]
        return done
