"""The audio of one realtime connection, and the events that are made of it; in the worker's thread."""

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rwkv_speech.decoding.results import Segment, whole_text
from rwkv_speech.decoding.streaming import Committed, Event, Stream, scored
from rwkv_speech.serving.answers import logprobs
from rwkv_speech.serving.faults import Fault
from rwkv_speech.tokenizer import WorldTokenizer

Sent = dict[str, Any]
_TRANSCRIPTION = "conversation.item.input_audio_transcription"
# What is being said is looked at so often, unless the model has more to do, and for the first time after so much of it.
_PACE_SECONDS, _FIRST_SECONDS = 0.125, 0.3
_STEP_SECONDS = 0.05  # half of the shortest silence that may end a turn


@dataclass
class _Item:
    """A turn that is heard from the second `start` of all audio on: the text of its deltas, and what is settled."""

    start: float
    text: str = ""
    segments: list[Segment] = field(default_factory=list)
    id: str = field(default_factory=lambda: f"item_{secrets.token_hex(10)}")


class Hearing:
    """Makes items of audio: each turn that the VAD finds is one, or with no `finds_turns` what is committed.

    A transcript is that of its audio, as the `task` says it, however often it was looked at on the way; with a
    tokenizer the tokens' log-probabilities are told, too.
    """

    def __init__(
        self,
        begin: Callable[[], Stream],
        task: str,
        sample_rate: int,
        finds_turns: bool,
        seconds: float = 0.0,
        tokenizer: WorldTokenizer | None = None,
    ) -> None:
        self._begin, self._task, self._rate = begin, task, sample_rate
        self._finds_turns, self._tokenizer = finds_turns, tokenizer
        self.seconds = self._seen = seconds  # of audio since the connection began; at the last look
        self._item: _Item | None = None
        self._last_id: str | None = None
        self._restart()

    @property
    def is_open(self) -> bool:
        """Whether there is audio that belongs to no complete item."""
        return self._item is not None

    @property
    def has_words(self) -> bool:
        """Whether words have been told of what is being said."""
        return self._item is not None and bool(self._item.text)

    @property
    def is_due(self) -> bool:
        """Whether another look may find more words."""
        start = self._stream.speech_start
        is_long = start is not None and self.seconds - self._offset - start >= _FIRST_SECONDS
        return is_long and self.seconds - self._seen >= _PACE_SECONDS

    def look(self) -> list[Sent]:
        """The words of what is being said that are certain by now."""
        self._seen = self.seconds
        return list(self._take(self._stream.look()))

    def push(self, samples: np.ndarray) -> list[Sent]:
        """Take samples (S,), int16."""
        events = list[Sent]()
        if not self._finds_turns and self._item is None:
            self._item = _Item(self.seconds)
        # So little at once that no turn both begins and ends within it: one without words would never be seen.
        step = round(_STEP_SECONDS * self._rate) if self._finds_turns else len(samples)
        for first in range(0, len(samples), step):
            part = samples[first : first + step]
            self.seconds += len(part) / self._rate
            events += self._take(self._stream.push(part))
            events += self._turn() if self._finds_turns else ()
        return events

    def commit(self) -> list[Sent]:
        """The item of all audio that is there; raises Fault if there is none."""
        if self._item is None:
            raise Fault(400, "the buffer is empty; expected audio before", "input_audio_buffer_commit_empty")
        events = list(self._take(self._stream.finish()))
        if self._item is not None:
            events += self._end(self.seconds)
        self._restart()
        return events

    def clear(self) -> list[Sent]:
        """Forget the audio."""
        self._item = None
        self._restart()
        return [{"type": "input_audio_buffer.cleared"}]

    def _restart(self) -> None:
        self._stream, self._offset = self._begin(), self.seconds

    def _take(self, found: Iterable[Event]) -> Iterator[Sent]:
        for event in found:
            if not isinstance(event, Committed):
                continue
            segment = event.segment
            if self._item is None:
                yield from self._start(segment.start if segment else event.words[0].start)
            assert self._item is not None
            if text := event.text if self._item.text else event.text.lstrip():
                self._item.text += text
                delta = {"item_id": self._item.id, "content_index": 0, "delta": text}
                yield {"type": f"{_TRANSCRIPTION}.delta"} | delta | self._scored(event.logprobs)
            self._item.segments += [segment] if segment else []
            if segment and self._finds_turns:
                yield from self._end(self._offset + segment.end)

    def _turn(self) -> Iterator[Sent]:
        """What the VAD has found since: another turn, or the end of one that holds no words."""
        start = self._stream.speech_start
        if self._item and (start is None or self._offset + start != self._item.start):
            yield from self._end(self.seconds)
        if start is not None and self._item is None:
            yield from self._start(start)

    def _start(self, second: float) -> Iterator[Sent]:
        self._item = _Item(self._offset + second)
        known = {"item_id": self._item.id, "audio_start_ms": round(1000 * self._item.start)}
        yield {"type": "input_audio_buffer.speech_started"} | known

    def _end(self, second: float) -> Iterator[Sent]:
        item, self._item = self._item, None
        assert item is not None
        if self._finds_turns:
            known = {"item_id": item.id, "audio_end_ms": round(1000 * second)}
            yield {"type": "input_audio_buffer.speech_stopped"} | known
        before = {"previous_item_id": self._last_id}
        yield {"type": "input_audio_buffer.committed", "item_id": item.id} | before
        content = [{"type": "input_audio", "transcript": None}]
        message = {"id": item.id, "type": "message", "role": "user", "status": "completed", "content": content}
        yield {"type": "conversation.item.added", "item": message} | before
        usage = {"type": "duration", "seconds": second - item.start}
        done = {"item_id": item.id, "content_index": 0, "transcript": whole_text(self._task, item.segments).strip()}
        known = self._scored(x for segment in item.segments for x in scored(segment))
        yield {"type": f"{_TRANSCRIPTION}.completed", "usage": usage} | done | known
        self._last_id = item.id

    def _scored(self, known: Iterable[tuple[int, float]]) -> Sent:
        return {"logprobs": logprobs(known, self._tokenizer)} if self._tokenizer else {}
