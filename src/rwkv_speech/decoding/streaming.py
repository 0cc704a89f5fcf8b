"""Text of speech that is still arriving: segments as of the whole recording, or words soon after they are said."""

# S samples

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE, Resampler, as_waveform
from rwkv_speech.decoding.forks import Forks
from rwkv_speech.decoding.long_audio import Piece, Segmenter
from rwkv_speech.decoding.results import Segment, Vote, Word
from rwkv_speech.decoding.vad import BLOCK
from rwkv_speech.errors import UserError
from rwkv_speech.text import join_texts

_RATES = 1000, 1_000_000
# Samples from one possible look at the open piece to the next: an eighth of a second.
_LOOK = BLOCK // 2


@dataclass(frozen=True)
class Committed:
    """Text that stays: all of a stream's, one after another as they stand, are its transcript.

    `words` are those of this text, where their times are known; `segment` is the segment that ends here, if one does;
    `logprobs` are the tokens of this text, where they are known, each with its log-probability.
    """

    text: str
    words: list[Word]
    segment: Segment | None = None
    logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Partial:
    """What seems to follow the committed text: it is replaced by the next committed or partial text."""

    text: str


Event = Committed | Partial


class Listener(Protocol):
    """What makes events of the pieces of a recording."""

    def hear(self, piece: Piece | None) -> list[Event]:
        """The piece that is being spoken, as far as it goes; None where nobody speaks."""

    def close(self, piece: Piece) -> list[Event]:
        """A piece that is complete."""

    def finish(self) -> list[Event]:
        """The end of the recording."""


class Stream:
    """A recording that comes in parts of any length, which change no bit of what is made of it.

    Neither its memory nor the time that a second of audio costs grows with it.
    """

    def __init__(self, segmenter: Segmenter, listener: Listener, pace: float | None, sample_rate: int) -> None:
        if not _RATES[0] <= sample_rate <= _RATES[1]:
            raise UserError(
                f"sample_rate: found {sample_rate}, expected samples a second from {_RATES[0]} to {_RATES[1]}"
            )
        if pace is not None and not pace > 0:
            raise UserError(f"pace: found {pace}, expected seconds above 0, or None for no partial texts")
        self._segmenter, self._listener = segmenter, listener
        # How a resampler rounds depends on the length of what it is given.
        self._given = _Blocks(sample_rate // 10)
        self._resampler = Resampler(sample_rate, "stream")
        self._blocks = _Blocks(_LOOK)
        # Blocks from one look at the open piece to the next.
        self._every = max(1, round(pace * SAMPLE_RATE / _LOOK)) if pace else 0
        self._num_blocks = 0
        self._has_ended = False

    def push(self, samples: Tensor | np.ndarray) -> list[Event]:
        """Take the next samples (S,), floating-point numbers between -1 and 1 or int16; the events that they make.

        Raises AudioError for anything else, and UserError after `finish`.
        """
        self._check_open()
        return [event for block in self._given.push(as_waveform(samples, "stream")) for event in self._resample(block)]

    def look(self) -> list[Event]:
        """The events of what is being said, as far as it goes; for a stream whose `pace` is None."""
        self._check_open()
        return self._listener.hear(self._segmenter.open_piece)

    @property
    def speech_start(self) -> float | None:
        """The second at which what is being said began, None where nobody speaks."""
        start = self._segmenter.speech_start
        return None if start is None else start / SAMPLE_RATE

    def finish(self) -> list[Event]:
        """The events of all that is left; nothing can be pushed after it."""
        self._check_open()
        self._has_ended = True
        events = [*self._resample(self._given.rest), *self._listen(self._resampler.finish())]
        pieces = [*self._segmenter.push(self._blocks.rest), *self._segmenter.finish()]
        events += [event for piece in pieces for event in self._listener.close(piece)]
        return events + self._listener.finish()

    def _resample(self, samples: Tensor) -> list[Event]:
        return self._listen(self._resampler.push(samples))

    def _listen(self, samples: Tensor) -> list[Event]:
        events = list[Event]()
        for block in self._blocks.push(samples):
            events += [event for piece in self._segmenter.push(block) for event in self._listener.close(piece)]
            self._num_blocks += 1
            if self._every and self._num_blocks % self._every == 0:
                events += self._listener.hear(self._segmenter.open_piece)
        return events

    def _check_open(self) -> None:
        if self._has_ended:
            raise UserError("stream: has been finished, expected no more samples; begin another with SpeechLM.stream()")


class _Blocks:
    """Samples that come in any parts, in blocks of one length."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.rest = torch.zeros(0)

    def push(self, samples: Tensor) -> list[Tensor]:
        """The blocks that the next samples complete."""
        samples = torch.cat([self.rest, samples])
        whole = len(samples) // self._size * self._size
        self.rest = samples[whole:].clone()
        return list(samples[:whole].split(self._size)) if whole else []


class SegmentListener:
    """Commits the segment of each complete piece, as `decode` makes it: none of silence."""

    def __init__(self, decode: Callable[[Piece], list[Segment]], forks: Forks) -> None:
        self._decode, self._forks, self._last = decode, forks, LastCharacter()
        self._num_segments = 0

    def hear(self, piece: Piece | None) -> list[Event]:
        """What the piece seems to say."""
        return [] if piece is None else [Partial(self._last.joined(self._forks.read(piece).text))]

    def close(self, piece: Piece) -> list[Event]:
        """Its segment."""
        self._forks.restart()
        events = list[Event]()
        for segment in self._decode(piece):
            text, found = self._last.commit(segment.text), replace(segment, id=self._num_segments)
            events.append(Committed(text, segment.words or [], found, scored(segment)))
            self._num_segments += 1
        return events

    def finish(self) -> list[Event]:
        """Nothing is left."""
        return []


class ClassListener:
    """Of a task of classes: the pieces vote, and the text is committed at the end, with the last segment."""

    def __init__(self, decode: Callable[[Piece], list[Segment]], forks: Forks) -> None:
        self._decode, self._forks = decode, forks
        self._vote, self._last, self._num_segments = Vote(), list[Segment](), 0

    def hear(self, piece: Piece | None) -> list[Event]:
        """What leads; in the first piece, what that seems to be."""
        if self._num_segments:
            return [Partial(self._vote.text)]
        return [] if piece is None else [Partial(self._forks.read(piece).text)]

    def close(self, piece: Piece) -> list[Event]:
        """Its vote, and the segment before it."""
        self._forks.restart()
        events = list[Event]()
        for segment in self._decode(piece):
            events += [Committed("", [], before) for before in self._last]
            self._last = [replace(segment, id=self._num_segments)]
            self._vote.add(segment)
            self._num_segments += 1
        return events

    def finish(self) -> list[Event]:
        """The text that most seconds of the recording have."""
        return [Committed(self._vote.text, [], last) for last in self._last]


def scored(segment: Segment) -> tuple[tuple[int, float], ...]:
    """The tokens of a segment with their log-probabilities; that of the end of text is none of the text."""
    return tuple(zip(segment.tokens, segment.logprobs or (), strict=False))


class LastCharacter:
    """Of the committed text: it decides how the next piece's text is joined to it."""

    def __init__(self) -> None:
        self._last = ""

    def joined(self, text: str) -> str:
        """A new piece's text, with the blank that belongs before it."""
        return join_texts([self._last, text])[len(self._last) :]

    def commit(self, text: str, is_first: bool = True) -> str:
        """The same of a text that stays, unless it goes on within a piece."""
        text = self.joined(text) if is_first else text
        self._last = text[-1:] or self._last
        return text
