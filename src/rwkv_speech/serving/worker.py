"""The one thread that owns the model: recordings join its running batch, and leave it when they are done."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from rwkv_speech.batch import BadSample
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.results import Segment, Transcript
from rwkv_speech.decoding.transcriber import Recording, Transcriber
from rwkv_speech.models.speech_lm import SpeechLM

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


logger = logging.getLogger(__name__)


class Worker:
    """Transcribes what other threads give it, `slots` pieces of audio at once; each recording's `key` is its own."""

    def __init__(self, model: SpeechLM, options: Options, slots: int) -> None:
        self._begin = partial(Transcriber, model, options, slots)
        self._transcriber: Transcriber | None = self._begin()
        self._orders = SimpleQueue[Callable[[], None]]()
        self._futures = dict[Any, Future[Transcript | BadSample]]()
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

    def cancel(self, key: Any) -> None:
        """Give up a recording, and what it takes up in the batch."""
        self._orders.put(partial(self._drop, key))

    def close(self) -> None:
        """Return when all that was submitted is done; nothing may be submitted after it."""
        self._orders.put(self._end)
        self._thread.join()

    def _take(self, recording: Recording, future: Future[Transcript | BadSample], listener: Listener | None) -> None:
        self._futures[recording.key] = future
        if listener:
            self._listeners[recording.key] = _Told(listener)
        if self._transcriber is None:
            self._transcriber = self._begin()
        self._transcriber.submit(recording)

    def _drop(self, key: Any) -> None:
        self._listeners.pop(key, None)
        if self._transcriber and (future := self._futures.pop(key, None)):
            self._transcriber.cancel(key)
            future.set_exception(InterruptedError("given up"))

    def _end(self) -> None:
        self._is_open = False

    def _run(self) -> None:
        while self._is_open or self._futures:
            try:
                self._round()
            except Exception as error:  # the thread outlives whatever a recording does to it
                logger.exception("decoding failed; %d recordings are given up", len(self._futures))
                self._transcriber = None
                for future in self._futures.values():
                    future.set_exception(error)
                self._futures.clear()
                self._listeners.clear()

    def _round(self) -> None:
        # With nothing to decode it sleeps until something comes.
        while not self._orders.empty() or (self._is_open and not self._futures):
            self._orders.get()()
        if self._transcriber is None:
            return
        for recording, result in self._transcriber.poll():
            self._listeners.pop(recording.key, None)
            self._futures.pop(recording.key).set_result(result)
        for key, told in self._listeners.items():
            told.tell(self._transcriber.settled(key))
