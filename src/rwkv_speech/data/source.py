"""What a source of utterances is: one recording's metadata, an indexed set of them, several with weights."""

import bisect
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.audio import AudioError, load_audio
from rwkv_speech.errors import UserError

# What people record in; headerless .raw is not among them, for its rate is unknown.
AUDIO_SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .spx .mp3 .mp2 .m4a .m4b .mp4 .aac .webm .weba .mka .wma .amr .3gp .ac3 .wv .ape .tta "
    ".aiff .aif .aifc .au .snd .caf .w64 .rf64 .sph".split()
)
TaskCounts = Counter[tuple[str | None, str | None]]  # (task, language) -> utterances
_MOST = 1000
_CHARACTERS_PER_SECOND = 15
_WEIGHTED = re.compile(r"(?P<spec>.*)@(?P<weight>[+-]?(\d+\.?\d*|\.\d+))", re.DOTALL)


@dataclass(frozen=True)
class Utterance:
    """What is known of one recording without decoding it.

    `text` is what is learned: a transcript, a translation, or the first of the `answers`, all of which are right.
    `source_text` is what is spoken where that is something else, and `source_lang` its language; `prompt` is read
    before the audio. `offset` and `duration` (s) choose a segment of the file. `audio` is an absolute path, or None
    where the source keeps the bytes itself; `identity` then names them, if it can: it changes whenever they may have
    changed. `input_text` is read in place of audio. A conversation is its first turn, with the others in `then`.
    """

    id: str
    audio: str | None
    text: str
    duration: float | None = None
    offset: float = 0.0
    lang: str | None = None
    task: str | None = None
    speaker: str | None = None
    identity: str | None = None
    source_lang: str | None = None
    source_text: str | None = None
    answers: tuple[str, ...] = ()
    prompt: str = ""
    input_text: str | None = None
    then: tuple["Utterance", ...] = ()

    @property
    def question(self) -> str:
        """The transcript of what has an answer, "" where there is none."""
        return self.source_text or "" if self.answers else ""

    @property
    def turns(self) -> "tuple[Utterance, ...]":
        """All turns of a conversation; what is none is one."""
        return (self, *self.then)

    @property
    def seconds(self) -> float | None:
        """The duration of all turns, None where it is not known; text counts as if it were spoken."""
        known = [turn.duration if turn.input_text is None else spoken_seconds(turn.input_text) for turn in self.turns]
        return None if None in known else sum(filter(None, known))


def load_turn(found: Utterance) -> Tensor:
    """Decode what lies in a file to float32 (S,), 16 kHz mono; raises AudioError."""
    if found.audio is None:
        raise AudioError(f"{found.id}: has no audio file; expected a path: mend its source")
    return load_audio(found.audio, found.offset, found.duration)


def spoken_seconds(text: str) -> float:
    """About as long as it takes to say a text."""
    return max(1, len(text)) / _CHARACTERS_PER_SECOND


@dataclass(frozen=True)
class Columns:
    """Which columns of a Hugging Face dataset hold the audio and the text."""

    audio: str = "audio"
    text: str = "text"


@dataclass(frozen=True)
class Part:
    """A run of `size` neighbouring utterances; each is taken `weight` times per epoch on average."""

    size: int
    weight: Fraction = Fraction(1)


def split_weight(spec: str) -> tuple[str, Fraction]:
    """Split a final `@NUMBER` off a data source; without one the weight is 1.

    A file or folder of the whole name wins over the weight. Raises UserError for a weight that is not above 0 and
    at most 1000.
    """
    found = _WEIGHTED.fullmatch(spec)
    if found is None or os.path.exists(spec):
        return spec, Fraction(1)
    weight = Fraction(found["weight"])
    if not 0 < weight <= _MOST:
        raise UserError(
            f"data source {spec!r}: weight {found['weight']}; expected above 0 and at most {_MOST}, such as @2 (every "
            "utterance twice per epoch) or @0.5 (every other one); leave the part out to give it no weight"
        )
    return found["spec"], weight


class Source(Protocol):
    """An indexed set of utterances."""

    def __len__(self) -> int: ...

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one utterance, without decoding."""
        ...

    def load(self, index: int) -> Tensor:
        """Decode one utterance to float32 (S,), 16 kHz mono; raises AudioError."""
        ...

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every utterance, (N,), NaN where they are not known."""
        ...

    def tasks(self) -> TaskCounts:
        """Give the number of utterances of each task and language, None where they name none."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what can be known of the content without decoding it, wherever it lies."""
        ...


def digest(values: Iterable[object]) -> str:
    """SHA-256 (hex) of values one after another: bytes as they are, others as Python writes them."""
    found = hashlib.sha256()
    for value in values:
        found.update(value if isinstance(value, bytes) else repr(value).encode())
        found.update(b"\n")
    return found.hexdigest()


class ConcatSource:
    """Several sources one after another, each with its weight, 1 by default; ids stay as the sources gave them."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[Fraction] | None = None) -> None:
        self._sources = list(sources)
        self._weights = [Fraction(1)] * len(self._sources) if weights is None else list(weights)
        self._ends = list(accumulate(len(source) for source in self._sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one utterance, without decoding."""
        source, local = self._locate(index)
        return source.utterance(local)

    def load(self, index: int) -> Tensor:
        """Decode one utterance to float32 (S,), 16 kHz mono; raises AudioError."""
        source, local = self._locate(index)
        return source.load(local)

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every utterance, (N,), NaN where they are not known."""
        return np.concatenate([np.zeros(0, np.float32), *(source.durations() for source in self._sources)])

    def tasks(self) -> TaskCounts:
        """Give the number of utterances of each task and language, None where they name none."""
        counts = TaskCounts()
        for source in self._sources:
            counts.update(source.tasks())
        return counts

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the sources' fingerprints and weights."""
        return digest(
            (source.fingerprint(), weight) for source, weight in zip(self._sources, self._weights, strict=True)
        )

    def parts(self) -> list[Part]:
        """Give the size and weight of every source."""
        return [Part(len(source), weight) for source, weight in zip(self._sources, self._weights, strict=True)]

    def _locate(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} of {len(self)}")
        part = bisect.bisect_right(self._ends, index)
        return self._sources[part], index - (self._ends[part - 1] if part else 0)


def parts_of(source: Source) -> list[Part]:
    """The runs of utterances that have weights of their own."""
    return source.parts() if isinstance(source, ConcatSource) else [Part(len(source))]
