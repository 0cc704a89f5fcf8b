"""The one thread that owns the model: recordings and turns join its running batch, and leave it when they are done."""

import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from rwkv_speech.batch import BadSample, Sample
from rwkv_speech.decoding.engine import Done, Request
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.results import Segment, Transcript
from rwkv_speech.decoding.session import Session, TextParts, Turn
from rwkv_speech.decoding.transcriber import Recording, Transcriber
from rwkv_speech.models.speech_lm import SpeechLM

# A round takes little longer, so that what others send is soon heard.
_ROUND_SECONDS = 0.1
Found = TypeVar("Found")
Listener = Callable[[list[Segment]], None]


@dataclass
class _Told:
    """A listener, and how many segments it knows."""

    listener: Listener
    num_segments: int = 0

    def tell(self, segments: list[Segment]) -> None:
        """Say what is settled, if that is more."""
        if len(segments) > self.num_segments:
            self.num_segments = len(segments)
            self.listener(segments)


@dataclass(frozen=True)
class Said:
    """What is said in a turn of a conversation, text that is read before it, and the answer where it is given."""

    sample: Sample
    before: str = ""
    answer: tuple[int, ...] | None = None


class Talk:
    """The next turns of a conversation, the last of which is answered; the session is changed, and is its alone."""

    def __init__(self, session: Session, said: Sequence[Said], options: Options, model: SpeechLM) -> None:
        self.session = session
        self._said, self._options, self._parts = list(said), options, TextParts(model.tokenizer)
        self._listener: Callable[[str], None] = lambda part: None

    def begin(self, listener: Callable[[str], None]) -> Request:
        """The first turn; the listener is told the parts of the answer."""
        self._listener = listener
        return self._request()

    def tell(self, ids: Sequence[int]) -> None:
        """The tokens so far of the turn that is being answered."""
        if len(self._said) == 1 and (part := self._parts.next(ids)):
            self._listener(part)

    def take(self, done: Done) -> Request | Turn:
        """Remember a turn: the next one's request, or the answer to the last."""
        turn = self.session.take(done, self._said.pop(0).answer)
        if self._said:
            return self._request()
        if rest := self._parts.last(turn.tokens):
            self._listener(rest)
        return turn

    def _request(self) -> Request:
        said = self._said[0]
        # Of a turn whose answer is given nothing is written but what the engine cannot do without.
        options = self._options if said.answer is None else replace(self._options, max_new_tokens=1)
        request = self.session.request(said.sample, options, self)
        return replace(request, before=said.before) if said.before else request


logger = logging.getLogger(__name__)


class Worker:
    """Transcribes what other threads give it, `slots` pieces of audio at once; each recording's `key` is its own."""

    def __init__(self, model: SpeechLM, options: Options, slots: int) -> None:
        self._begin = partial(Transcriber, model, options, slots, is_fair=True)
        self._transcriber: Transcriber | None = self._begin()
        self._orders = SimpleQueue[Callable[[], None]]()
        self._spare: list[tuple[float, int, Callable[[], None]]] = []  # a heap, of what can wait
        self._count = itertools.count()
        self._futures = dict[Any, Future[Any]]()
        self._listeners = dict[Any, _Told]()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether what is submitted will be done."""
        return self._is_open and self._thread.is_alive()

    def submit(self, recording: Recording, listener: Listener | None = None) -> Future[Transcript | BadSample]:
        """Have a recording transcribed, beside the others.

        The listener is called in the worker's thread, with all segments that are settled, when there are more.
        """
        future = Future[Transcript | BadSample]()
        future.set_running_or_notify_cancel()
        self._orders.put(partial(self._take, recording, future, listener))
        return future

    def converse(self, talk: Talk, listener: Callable[[str], None]) -> Future[Turn]:
        """Have the turns of a conversation read and answered, beside the others; `cancel` knows it by the talk.

        The listener is called in the worker's thread, with each part of the answer.
        """
        future = Future[Turn]()
        future.set_running_or_notify_cancel()
        self._orders.put(partial(self._begin_talk, talk, future, listener))
        return future

    def run(self, work: Callable[[], Found]) -> Future[Found]:
        """Have the model's thread do something else between two rounds of the batch; it should take a short time."""
        future = Future[Found]()
        self._orders.put(partial(_run, work, future))
        return future

    def run_late(self, work: Callable[[], Found], due: float) -> Future[Found]:
        """The same when nothing else waits but the batch: one a round, first what is due first."""
        future = Future[Found]()
        late = due, next(self._count), partial(_run, work, future)
        self._orders.put(partial(self._keep, late))
        return future

    def cancel(self, key: Any) -> None:
        """Give up a recording or a talk, and what it takes up in the batch."""
        self._orders.put(partial(self._drop, key))

    def close(self) -> None:
        """Return when all that was submitted is done; nothing may be submitted after it."""
        self._orders.put(self._end)
        self._thread.join()

    def _keep(self, late: tuple[float, int, Callable[[], None]]) -> None:
        heapq.heappush(self._spare, late)

    def _take(self, recording: Recording, future: Future[Transcript | BadSample], listener: Listener | None) -> None:
        self._futures[recording.key] = future
        if listener:
            self._listeners[recording.key] = _Told(listener)
        self._opened.submit(recording)

    def _begin_talk(self, talk: Talk, future: Future[Turn], listener: Callable[[str], None]) -> None:
        self._futures[talk] = future
        self._opened.engine.submit(talk.begin(listener))

    @property
    def _opened(self) -> Transcriber:
        self._transcriber = self._transcriber or self._begin()
        return self._transcriber

    def _drop(self, key: Any) -> None:
        self._listeners.pop(key, None)
        if self._transcriber and (future := self._futures.pop(key, None)):
            self._transcriber.cancel(key)
            future.set_exception(InterruptedError("given up"))

    def _end(self) -> None:
        self._is_open = False

    def _run(self) -> None:
        while self._is_open or self._futures or self._spare:
            try:
                self._round()
            except Exception as error:  # the thread outlives whatever a recording does to it
                logger.exception("decoding failed; %d requests are given up", len(self._futures))
                self._transcriber = None
                for future in self._futures.values():
                    future.set_exception(error)
                self._futures.clear()
                self._listeners.clear()

    def _round(self) -> None:
        # With nothing to decode it sleeps until something comes; what comes meanwhile waits for a round.
        is_idle = self._is_open and not self._futures and not self._spare
        for _ in range(max(self._orders.qsize(), int(is_idle))):
            self._orders.get()()
        if self._spare:
            heapq.heappop(self._spare)[-1]()
        if self._transcriber is None:
            return
        for recording, result in self._transcriber.poll(_ROUND_SECONDS):
            self._listeners.pop(recording.key, None)
            self._futures.pop(recording.key).set_result(result)
        for key, told in self._listeners.items():
            told.tell(self._transcriber.settled(key))
        self._go_on(self._transcriber)

    def _go_on(self, transcriber: Transcriber) -> None:
        """Take what has been found of talks, and tell what is being written."""
        while transcriber.answered:
            done = transcriber.answered.popleft()
            talk: Talk = done.request.key
            found = talk.take(done)
            if isinstance(found, Turn):
                self._futures.pop(talk).set_result(found)
            else:
                transcriber.engine.submit(found)
        for request, ids in transcriber.engine.unfinished():
            if isinstance(request.key, Talk):
                request.key.tell(ids)


def _run(work: Callable[[], Found], future: Future[Found]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:  # it is for whoever asked
        future.set_exception(error)
