"""What prediction shows: a line for each recording, in the order they were named, a bar, and a last line of counts."""

import sys
import time
from collections.abc import Iterator, Sequence

from torch import Tensor
from tqdm import tqdm

from rwkv_speech.audio import SAMPLE_RATE, claimed_seconds, read_blocks
from rwkv_speech.batch import BadSample
from rwkv_speech.data.inputs import Input
from rwkv_speech.decoding.results import Transcript
from rwkv_speech.decoding.writers import clock, one_line

# What is read lies a few pieces before what is decoded.
_BAR = "{percentage:3.0f}% {bar} {n:.0f} of {total:.0f} s of audio, {elapsed} of {remaining}{postfix}"


class Screen:
    """Shows transcripts of `inputs` as they come, in any order; `num_faults` things that were named are none of them.

    A single text stands alone, several behind their names; `verbose`: each segment on a line, with its times.
    """

    def __init__(self, inputs: Sequence[Input], num_faults: int, verbose: bool) -> None:
        self._inputs, self._verbose = inputs, verbose
        self._is_alone = len(inputs) + num_faults == 1
        self.num_skipped = num_faults
        self._found: dict[int, Transcript | BadSample] = {}  # that wait for one before them
        self._next = self._num_texts = 0
        self._seconds, self._started = 0.0, time.perf_counter()
        shown = sys.stderr.isatty()
        total = sum(map(_claimed, inputs)) if shown else 0.0
        self._bar = tqdm(total=total, bar_format=_BAR, disable=not shown)

    def watched(self, found: Input) -> Iterator[Tensor]:
        """The samples of an input at 16 kHz, block by block, which the bar counts; raises AudioError."""
        seconds = 0.0
        for block in read_blocks(found.audio, offset=found.offset, duration=found.duration, name=found.label):
            yield block
            seconds += len(block) / SAMPLE_RATE
            self._seconds += len(block) / SAMPLE_RATE
            self._bar.set_postfix_str(f"{self._speed():.0f} times real time", refresh=False)
            self._bar.update(len(block) / SAMPLE_RATE)
        if not self._bar.disable:
            self._bar.total += seconds - _claimed(found)

    def show(self, number: int, found: Transcript | BadSample) -> None:
        """Print what was found in the input of a number, once all before it are there."""
        self._found[number] = found
        while self._next in self._found:
            self._print(self._next, self._found.pop(self._next))
            self._next += 1

    def close(self) -> None:
        """Print what still waits, as after an interruption, and the counts."""
        for number in sorted(self._found):
            self._print(number, self._found.pop(number))
        self._bar.close()
        skipped = f", {self.num_skipped} skipped" if self.num_skipped else ""
        files = "1 file" if self._num_texts == 1 else f"{self._num_texts} files"
        line = f"{files}, {self._seconds / 3600:.2f} h of audio, {self._speed():.1f} times real time{skipped}"
        if not self._is_alone:
            print(line, file=sys.stderr)

    def _speed(self) -> float:
        return self._seconds / (time.perf_counter() - self._started)

    def _print(self, number: int, found: Transcript | BadSample) -> None:
        name = self._inputs[number].label
        if isinstance(found, BadSample):
            self.num_skipped += 1
            tqdm.write(f"error: {found.reason}", file=sys.stderr)
            return
        self._num_texts += 1
        if self._verbose:
            lines = [f"[{clock(x.start)} --> {clock(x.end)}] {one_line(x.text)}" for x in found.segments]
            tqdm.write("\n".join(lines if self._is_alone else [name, *lines]))
        else:
            tqdm.write(one_line(found.text) if self._is_alone else f"{name}\t{one_line(found.text)}")
        if found.cut:
            tqdm.write(f"warning: {name}: the text was cut off; raise --max_new_tokens", file=sys.stderr)


def _claimed(found: Input) -> float:
    return found.duration or claimed_seconds(found.audio)
