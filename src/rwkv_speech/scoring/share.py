"""Decode a data set, or one process's share of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.batch import BadSample, Batch, Sample
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.loader import collate
from rwkv_speech.data.source import Source, TaskCounts, Utterance
from rwkv_speech.decoding.options import GREEDY, Options
from rwkv_speech.decoding.results import Row
from rwkv_speech.decoding.transcribe import transcribe_batches
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.scoring.speed import Timer
from rwkv_speech.tasks import Naming


@dataclass(frozen=True)
class Share:
    """Every `world_size`-th utterance of a source, from number `rank`: itself a source."""

    source: Source
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return len(range(self.rank, len(self.source), self.world_size))

    def place(self, index: int) -> int:
        """Where an utterance of the share is in the source."""
        return self.rank + index * self.world_size

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one utterance, without decoding."""
        return self.source.utterance(self.place(index))

    def load(self, index: int) -> Tensor:
        """Decode one utterance to float32 (S,), 16 kHz mono; raises AudioError."""
        return self.source.load(self.place(index))

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every utterance, (N,), NaN where they are not known."""
        return self.source.durations()[self.rank :: self.world_size]

    def tasks(self) -> TaskCounts:
        """Give the number of utterances of each task and language in the whole source."""
        return self.source.tasks()

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the whole source."""
        return self.source.fingerprint()


@dataclass(frozen=True)
class Role:
    """What utterances at these `places` of a source are to be: of these `tasks`, to be heard or, with `texts`, read."""

    places: Sequence[int]
    tasks: Sequence[str]
    texts: Sequence[str] | None = None


@dataclass(frozen=True)
class Recast:
    """Some utterances of a source in another role: itself a source."""

    source: Source
    role: Role

    def __len__(self) -> int:
        return len(self.role.places)

    def utterance(self, index: int) -> Utterance:
        """Give the metadata of one utterance; one that is heard has the language that is spoken."""
        found = replace(self.source.utterance(self.role.places[index]), task=self.role.tasks[index])
        if self.role.texts is None:
            return replace(found, lang=found.source_lang or found.lang, prompt="")
        return replace(found, input_text=self.role.texts[index])

    def load(self, index: int) -> Tensor:
        """Decode one utterance to float32 (S,), 16 kHz mono; raises AudioError."""
        return self.source.load(self.role.places[index])

    def durations(self) -> NDArray[np.float32]:
        """Give the seconds of every utterance, (N,), NaN where they are not known."""
        return self.source.durations()[self.role.places]

    def tasks(self) -> TaskCounts:
        """Give the number of utterances of each task and language of the whole source."""
        return self.source.tasks()

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the whole source."""
        return self.source.fingerprint()


@dataclass
class Part:
    """What one process found in its share of a data set: rows, what could not be used, seconds of each stage."""

    rows: list[Row] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def decode(
    model: SpeechLM,
    share: Share,
    slots: int,
    options: Options,
    task: str = "",
    max_bad: int = 0,
    given_history: bool = False,
    reads_text: bool = False,
) -> Iterator[int | Part]:
    """Decode a share, so many utterances at once: how many more are done, and at the end what was found.

    All have the state `task` if it is given, else each its own. More broken ones than `max_bad` end it. Conversations
    go on with the model's own answers, or with the `given` ones.
    """
    part, timer = Part(), Timer(next(model.trained_parameters()).device)
    dataset = SpeechDataset(
        share, model.tokenizer, naming=Naming.among(list(model.initial_states), task), reads_text=reads_text
    )
    if len(dataset):
        _warm_up(model, dataset)
        with timer.run(model.encoder):
            batches = _batches(dataset, slots, part.bad, max_bad, timer)
            for row in transcribe_batches(model, batches, options, slots, given_history):
                part.rows.append(_completed(row, share))
                yield int((row.turn or 1) == 1)  # a conversation is one
        yield len(part.bad)
    part.bad = [replace(sample, index=share.place(sample.index)) for sample in part.bad]
    part.seconds = dict(timer.seconds)
    yield part


def _completed(row: Row, share: Share) -> Row:
    """With its place in the whole set, and what the source knows besides."""
    found = share.utterance(row.index).turns[max(0, (row.turn or 0) - 1)]
    return replace(row, index=share.place(row.index), speaker=found.speaker, audio=found.audio, offset=found.offset)


def _batches(dataset: SpeechDataset, size: int, bad: list[BadSample], max_bad: int, timer: Timer) -> Iterator[Batch]:
    """Utterances of like duration together, the longest first; what cannot be used goes into `bad`."""
    for (batch,) in timer.read(dataset.loader(Cut(size, shuffle=False))):
        bad += batch.bad
        if sum(not sample.too_long for sample in bad) > max_bad:
            return
        if len(batch):
            yield batch


def _warm_up(model: SpeechLM, dataset: SpeechDataset) -> None:
    """Decode one utterance, so that no time is taken for what is only done once."""
    sample = dataset[0]
    if isinstance(sample, Sample):
        list(transcribe_batches(model, [collate([sample])], replace(GREEDY, max_new_tokens=2)))
