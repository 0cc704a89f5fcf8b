"""A recording of any length as pieces that are decoded one by one: cut in pauses, without the silence between them."""

# S samples · W windows of 512 samples

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.decoding.vad import BLOCK, WINDOW, Vad

# silero-vad's: speech begins at a window of the threshold or more, and ends where all are so much below it for a pause.
THRESHOLD, _BELOW, _LOWEST = 0.5, 0.15, 0.01
_MIN_SPEECH = SAMPLE_RATE * 4 // 25
# A silence as long as PAUSE parts two pieces and is left out, but for PAD on each side; a shorter one stays.
PAUSE = SAMPLE_RATE * 3 // 10
PAD = SAMPLE_RATE // 10
# Where a silence is left out, so are the frames beside it of so much less power than the loudest, but for a margin: the
# VAD needs its time to hear an end, and models are trained on audio that begins and ends with its sound.
_FRAME, _MARGIN, _SILENT = SAMPLE_RATE // 100, SAMPLE_RATE // 50, 1e-5
# Pieces that end in silence are so many samples long, or a multiple: on a CPU, each new length costs memory for good.
_STEP = SAMPLE_RATE * 8 // 100
# What a piece that grows too long may be cut in; without a VAD, a pause has a hundredth of the power.
_SHORT_PAUSE = 3  # windows
_QUIET = 0.01

# From the samples (S,) of a piece to places in it, in order, that lie between two words.
WordGaps = Callable[[Tensor], Sequence[int]]


@dataclass(frozen=True)
class SpeechBounds:
    """What the VAD takes for speech: the probability it begins with, and samples: of the silence that ends it, and of
    what is kept before its first window."""

    threshold: float = THRESHOLD
    pause: int = PAUSE
    before: int = PAD

    @property
    def low_threshold(self) -> float:
        """What lies below is silence."""
        return max(_LOWEST, self.threshold - _BELOW)


@dataclass(frozen=True)
class Piece:
    """The samples `waveform` (S,) of a recording from its sample `start` on."""

    start: int
    waveform: Tensor

    @property
    def end(self) -> int:
        """The recording's first sample behind the piece."""
        return self.start + len(self.waveform)


class Segmenter:
    """Cuts a recording that comes in parts: the same pieces, to the bit, for any parts, in constant memory.

    `vad` is "silero", or "none" to leave nothing out. A piece that would be longer than `max_seconds` is cut in the
    longest pause of its second half; without one, at the last of its `word_gaps`; without these, where it is quietest.
    """

    def __init__(
        self,
        max_seconds: float,
        vad: str = "silero",
        word_gaps: WordGaps | None = None,
        bounds: SpeechBounds = SpeechBounds(),
    ) -> None:
        self._max = max(round(max_seconds * SAMPLE_RATE), SAMPLE_RATE)
        self._vad, self._word_gaps = Vad() if vad == "silero" else None, word_gaps
        self._bounds = bounds
        self._waiting = torch.zeros(0)  # less than a block
        self._blocks, self._blocks_start = list[Tensor](), 0  # what the next piece may be made of
        self._end = 0  # of the last block
        self._begin: int | None = None  # of the open piece
        self._windows = list[tuple[int, float]]()  # those of the open piece that were looked at: start, probability
        self._speech = 0  # where the open piece's speech began
        self._is_trimmed = False  # whether a silence before the open piece is left out
        self._silence: int | None = None  # where the silence at its end begins
        self._last_end = 0  # of the last piece
        self.removed_samples = 0  # in no piece, as far as it is known

    def push(self, samples: Tensor) -> list[Piece]:
        """The recording's next samples (S,), 16 kHz -> the pieces that they complete."""
        *blocks, rest = torch.cat([self._waiting, samples]).split(BLOCK)
        if len(rest) == BLOCK:
            blocks, rest = [*blocks, rest], rest[:0]
        self._waiting = rest.clone()
        return [piece for block in blocks for piece in self._add(block)]

    def finish(self) -> list[Piece]:
        """The pieces that are left at the recording's end."""
        pieces = self._add(self._waiting) if len(self._waiting) else []
        if self._begin is not None:
            silence = self._end if self._silence is None else self._silence
            is_short = self._end - silence < min(PAUSE, self._bounds.pause)
            pieces += self._close(silence, self._end if is_short else silence + PAD)
        self.removed_samples += self._end - self._last_end
        return pieces

    @property
    def speech_start(self) -> int | None:
        """The sample at which the open piece begins, None where nobody speaks."""
        return self._begin

    @property
    def open_piece(self) -> Piece | None:
        """What the next piece begins with, as far as the recording goes, and a piece may."""
        if self._begin is None:
            return None
        heard = torch.cat([self._samples(self._begin, self._end), self._waiting])
        return Piece(self._begin, heard[: self._max])

    def _add(self, block: Tensor) -> list[Piece]:
        starts = range(self._end, self._end + len(block), WINDOW)
        self._blocks.append(block)
        self._end += len(block)
        probabilities = self._vad.block(block).tolist() if self._vad else [1.0] * len(starts)
        pieces = [piece for window in zip(starts, probabilities, strict=True) for piece in self._window(*window)]
        needed = self._end - max(PAUSE, self._bounds.before) if self._begin is None else self._begin
        while self._blocks_start + len(self._blocks[0]) <= needed:
            self._blocks_start += len(self._blocks.pop(0))
        return pieces

    def _window(self, start: int, probability: float) -> list[Piece]:
        end, bounds = start + WINDOW, self._bounds
        if probability >= bounds.threshold:
            if self._begin is None:
                before = 0 if start < PAUSE else start - bounds.before
                self._begin, self._speech = max(self._last_end, before), start
                self._is_trimmed = self._begin > 0
            self._silence = None
        elif probability < bounds.low_threshold and self._silence is None:
            self._silence = start
        if self._begin is None:
            return []
        self._windows.append((start, probability))
        is_full = end + WINDOW - self._begin > self._max
        # A piece that is full ends in whatever silence there is.
        pause = min(PAUSE, bounds.pause) if is_full else bounds.pause
        is_quiet = probability < bounds.low_threshold
        if self._silence is not None and start - self._silence >= pause and is_quiet:
            return self._close(self._silence, self._silence + PAD)
        return self._cut(min(end, self._end)) if is_full else []

    def _close(self, silence: int, end: int) -> list[Piece]:
        """End the open piece, at whose end is silence, at `end`; it is none if it holds too little speech."""
        begin, self._begin, self._windows = self._begin, None, []
        assert begin is not None
        if silence <= begin or silence - self._speech <= (_MIN_SPEECH if self._vad else 0):
            return []
        if self._is_trimmed or end < self._end:
            first, last = sound(self._samples(begin, end))
            begin, whole = begin + first * self._is_trimmed, begin + last
            if end < self._end:
                end = begin + -(-(whole - begin) // _STEP) * _STEP
        return [self._piece(begin, end)]

    def _cut(self, end: int) -> list[Piece]:
        """End the open piece, which cannot grow beyond `end`, at the best place, where the next one begins."""
        assert self._begin is not None
        audio = self._samples(self._begin, end)
        if self._vad:
            quiet = [(start, probability < self._bounds.low_threshold) for start, probability in self._windows]
        else:
            loudness = audio.split(WINDOW)
            limit = _QUIET * audio.square().mean()
            quiet = [(self._begin + i * WINDOW, bool(x.square().mean() <= limit)) for i, x in enumerate(loudness)]
        middle = self._begin + len(audio) // 2
        pauses = [(place >= middle, size, place) for size, place in _runs(quiet) if size >= _SHORT_PAUSE]
        if pauses:
            *_, place = max(pauses)
        else:
            gaps = self._word_gaps(audio) if self._word_gaps else ()
            last = max((gap for gap in gaps if len(audio) // 2 <= gap < len(audio)), default=None)
            place = self._begin + (_quietest(audio) if last is None else last)
        piece = self._piece(self._begin, place)
        self._is_trimmed = False
        self._begin, self._windows = place, [(start, x) for start, x in self._windows if start >= place]
        return [piece]

    def _piece(self, begin: int, end: int) -> Piece:
        self.removed_samples += begin - self._last_end
        self._last_end = end
        return Piece(begin, self._samples(begin, end))

    def _samples(self, begin: int, end: int) -> Tensor:
        return torch.cat(self._blocks)[begin - self._blocks_start : end - self._blocks_start].clone()


def cut(blocks: Iterable[Tensor], segmenter: Segmenter) -> Iterator[Piece]:
    """The pieces of a recording that is read in blocks (S,), each as soon as it is known."""
    for block in blocks:
        yield from segmenter.push(block)
    yield from segmenter.finish()


def sound(waveform: Tensor) -> tuple[int, int]:
    """Where a waveform (S,) begins and ends to be more than silence, with a margin."""
    power = functional.avg_pool1d(waveform.square()[None], _FRAME, ceil_mode=True)[0]
    loud = (power >= _SILENT * power.max()).nonzero()
    return max(0, int(loud[0]) * _FRAME - _MARGIN), min(len(waveform), (int(loud[-1]) + 1) * _FRAME + _MARGIN)


def _runs(windows: list[tuple[int, bool]]) -> list[tuple[int, int]]:
    """The runs of windows that are true: number of windows, middle sample."""
    runs = []
    for quiet, run in itertools.groupby(windows, lambda window: window[1]):
        starts = [start for start, _ in run]
        if quiet:
            runs.append((len(starts), (starts[0] + starts[-1] + WINDOW) // 2))
    return runs


def _quietest(audio: Tensor) -> int:
    """The middle of the quietest two windows of the second half."""
    half = len(audio) // 2
    power = functional.avg_pool1d(audio[None, half:].square(), 2 * WINDOW, WINDOW // 4)
    return half + int(power.argmin()) * (WINDOW // 4) + WINDOW
