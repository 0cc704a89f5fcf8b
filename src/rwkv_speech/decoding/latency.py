"""How far a stream's words lag behind the speech: LAAL, and the log that OmniSTEval and SimulEval read."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.decoding.streaming import Committed, Event, Stream
from rwkv_speech.files import write_text_atomically


@dataclass(frozen=True)
class Instance:
    """A recording, what a stream made of it, and when each word was committed; the names are SimulEval's.

    All times are milliseconds. `delays` is how much audio had been read by then; `elapsed` is when the word was there
    after the start of a recording that arrives as it is spoken, the time of computing included.
    """

    index: int
    source: str
    source_length: float
    prediction: str
    prediction_length: int
    delays: list[float]
    elapsed: list[float]
    reference: str

    @property
    def reference_length(self) -> int:
        """Words of the reference, or its characters where those of the prediction are timed."""
        is_words = self.prediction_length == len(self.prediction.split())
        return len(self.reference.split()) if is_words else len("".join(self.reference.split()))


def laal(times: Sequence[float], source_length: float, reference_length: int) -> float:
    """Length-Adaptive Average Lagging of words that came at `times`, in the unit of the source's length.

        LAAL = 1/τ · Σ_{i=1..τ} ( d_i - (i - 1) · |X| / max(|Y|, |Y*|) ),   τ = the first i with d_i >= |X|, or the last

    |X| is the source's length, |Y| the hypothesis's and |Y*| the reference's: how long the words come after those of an
    ideal speaker of equal words. Raises ValueError without words. Source: Papi et al. 2022 (arXiv:2206.05807).
    """
    if not times:
        raise ValueError("LAAL of no words is not defined")
    pace = source_length / max(len(times), reference_length)
    tau = next((i for i, d in enumerate(times, start=1) if d >= source_length), len(times))
    return sum(d - i * pace for i, d in enumerate(times[:tau])) / tau


def mean_laal(instances: Iterable[Instance], computation_aware: bool = False) -> float:
    """The mean LAAL (ms) of the instances with words; NaN if there are none."""
    found = [
        laal(x.elapsed if computation_aware else x.delays, x.source_length, x.reference_length)
        for x in instances
        if x.delays
    ]
    return sum(found) / len(found) if found else float("nan")


def listen(
    stream: Stream,
    waveform: Tensor,
    chunk: int,
    index: int = 0,
    source: str = "",
    reference: str = "",
    characters: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Instance:
    """Push a waveform (S,) in pieces of `chunk` samples, and note when each word, or character, is committed."""
    text, at = "", list[tuple[float, float]]()  # of each character
    free = 0.0  # when the computation of what has come so far is done

    def take(work: Callable[[], list[Event]], heard: float) -> None:
        nonlocal text, free
        start = clock()
        events = work()
        free = max(free, heard) + 1000 * (clock() - start)
        for event in events:
            if isinstance(event, Committed):
                text += event.text
                at.extend([(heard, free)] * len(event.text))

    milliseconds = 1000 / SAMPLE_RATE
    for start in range(0, len(waveform), chunk):
        part = waveform[start : start + chunk]
        take(partial(stream.push, part), (start + len(part)) * milliseconds)
    take(stream.finish, len(waveform) * milliseconds)
    # A word is there with its last character.
    ends = [i for i, x in enumerate(text) if not x.isspace() and (characters or not text[i + 1 : i + 2].strip())]
    return Instance(
        index,
        source,
        len(waveform) * milliseconds,
        ("" if characters else " ").join(text.split()),
        len(ends),
        [at[i][0] for i in ends],
        [at[i][1] for i in ends],
        reference,
    )


def write_instances(path: Path, instances: Iterable[Instance]) -> None:
    """Write one JSON object a line, atomically: `omnisteval shortform --hypothesis_file` and longform read it."""
    write_text_atomically(path, "".join(json.dumps(asdict(x), ensure_ascii=False) + "\n" for x in instances))
