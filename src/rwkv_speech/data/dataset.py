"""Utterances -> samples."""

# S samples

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rwkv_speech.audio import SAMPLE_RATE, AudioError, Framing, check_duration
from rwkv_speech.batch import BETWEEN_TURNS, BadSample, Sample
from rwkv_speech.data.augment import Augmenter
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.feature_cache import FeatureCache, recording_key
from rwkv_speech.data.loader import BatchSampler, StepLoader, collate, in_processes
from rwkv_speech.data.source import Part, Source, Utterance, load_turn, parts_of
from rwkv_speech.errors import UserError
from rwkv_speech.tasks import Naming, task_named
from rwkv_speech.text import as_continuation, as_prompt, normalise_label
from rwkv_speech.tokenizer import WorldTokenizer

_VARIANCE_FLOOR = 1e-7  # as in the encoder


def normalise(waveform: Tensor) -> Tensor:
    """Zero mean and unit variance, (S,) float32: what encoder.normalise makes of an utterance in a batch."""
    centred = waveform - waveform.mean()
    # The sum of torch's own squares, not a dot product, whose rounding error is 40 times as large.
    return centred.div_(torch.sqrt(centred.square().mean() + _VARIANCE_FLOOR))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute as a data worker does: sums and convolutions round differently with other numbers of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class SpeechDataset(Dataset[Sample | BadSample]):
    """Decodes, augments, normalises and tokenises the utterances of a source.

    An utterance is asked for as (epoch, index), or as its index alone, which is epoch 0: persistent workers keep
    their copy of the dataset, so the epoch travels with the index. Only `augment` depends on it.

    `naming` says which state an utterance has. A broken recording becomes a BadSample, never an exception; so does one
    that does not `fit`. An utterance without audio is read: its source text takes the place of audio; so are all with
    `reads_text`, those of recognition their text. With a feature `cache`, which feature_fill.fill has filled, samples
    hold frames. With a `teacher_form`, as in text.as_prompt, answers to what has a transcript get `teacher_ids`, and
    the blank with which a text model begins them. Texts of the states in `transcribes` come behind what is spoken and
    the `separator`, which what is spoken cannot hold; an utterance without a source text becomes a BadSample. Raises
    UserError for an unknown `label_mode`, and for a cache beside changes of the audio.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: WorldTokenizer,
        label_mode: str = "none",
        fit: "Fit | None" = None,
        *,
        naming: Naming = Naming(),  # noqa: B008 (it is frozen)
        normalise: bool = False,
        augment: Augmenter | None = None,
        cache: FeatureCache | None = None,
        teacher_form: str = "",
        reads_text: bool = False,
        transcribes: Collection[str] = (),
        separator: str = "",
    ) -> None:
        normalise_label("", label_mode)  # an unknown mode fails here, not in a data worker
        if cache and augment and augment.settings.flags_on:
            raise UserError(
                f"--feature_cache: cannot keep the frames of audio that {' and '.join(augment.settings.flags_on)} "
                "change in every epoch; leave out one or the other"
            )
        self.source, self._tokenizer = source, tokenizer
        self._label_mode, self._fit, self._naming = label_mode, fit, naming
        self._normalise, self._augment, self._cache, self._teacher_form = normalise, augment, cache, teacher_form
        self._reads_text = reads_text
        self._transcribes, self._separator = frozenset(transcribes), tokenizer.encode(separator)

    def plain(self) -> "SpeechDataset":
        """The same utterances as their waveforms, unchanged: what a feature cache is filled from."""
        changed = copy.copy(self)
        changed._normalise, changed._augment, changed._cache = False, None, None
        return changed

    def with_cache(self, cache: FeatureCache) -> "SpeechDataset":
        """The same utterances with the frames of a cache, which is to be filled first."""
        changed = copy.copy(self)
        changed._cache = cache
        return changed

    @property
    def changes_audio(self) -> bool:
        """Whether an utterance may sound otherwise in each epoch."""
        return bool(self._augment and self._augment.settings.flags_on)

    def __len__(self) -> int:
        return len(self.source)

    def durations(self) -> NDArray[np.float32]:
        """Seconds of every utterance at the slowest speed that may be drawn, (N,), NaN where they are not known."""
        return self.source.durations() / np.float32(self._augment.slowest if self._augment else 1.0)

    def count_too_long(self) -> str:
        """Say before training how many utterances are too long for --ctx_len, "" for none.

        Known durations alone are looked at, at the highest speed; a few more may be left out for their text, and are
        counted by BadFileLog as they are met. Raises UserError if all are too long.
        """
        if self._fit is None or self._reads_text:
            return ""
        seconds = self.source.durations() / np.float32(self._augment.fastest if self._augment else 1.0)
        count = int((seconds > self._fit.longest).sum())
        if count and count == len(seconds):
            raise UserError(
                f"--ctx_len: {self._fit.ctx_len} is less than each of the {count} utterances needs, the shortest of "
                f"which lasts {seconds.min():.2f} s; {self._fit.longest:.2f} s are the most that fit: raise it"
            )
        return f"{count} of {len(seconds)} utterances are too long for --ctx_len {self._fit.ctx_len}" if count else ""

    def parts(self) -> list[Part]:
        """The runs of utterances that have weights of their own."""
        return parts_of(self.source)

    def fingerprint(self) -> str:
        """What tells the data from other data, wherever it lies: its size and its source's SHA-256."""
        return f"{len(self)} utterances, {self.source.fingerprint()[:16]}"

    def loader(self, cut: Cut, steps: int | None = None, workers: int = 0, pin_memory: bool = False) -> StepLoader:
        """One rank's batches, of all epochs or of the first `steps` of each; raises UserError for fewer than those.

        `workers` processes decode, augment, normalise and tokenise; without any, the caller's process does.
        """
        sampler = BatchSampler(self.durations(), cut, self.parts(), steps)
        # torch types a loader by its samples, though it gives what `collate_fn` makes of them.
        batches: DataLoader[Any] = DataLoader(
            self, batch_sampler=sampler, collate_fn=collate, pin_memory=pin_memory, **in_processes(workers)
        )
        return StepLoader(batches, sampler, cut.accumulate)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | BadSample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with _one_thread():
            return self._sample(epoch, index)

    def _sample(self, epoch: int, index: int) -> Sample | BadSample:
        found = self.source.utterance(index)
        if self._reads_text:
            first, *others = (self._read(turn) for turn in found.turns)
            found = replace(first, then=tuple(others))
            if any(turn.input_text is None for turn in found.turns):
                return BadSample(index, found.id, "has no source_text, which is to be read in place of audio")
        if any(self._spoken(turn) is None for turn in found.turns if self._state(turn) in self._transcribes):
            return BadSample(index, found.id, "has no source_text, which its task writes first (--transcribe_first)")
        turns = [self._labelled(index, number, turn, found) for number, turn in enumerate(found.turns, start=1)]
        seconds = [turn.duration if turn.input_text is None else 0.0 for turn in found.turns]
        # Known durations save the decoding of what is left out anyway.
        known = [x / self._speed(epoch, turn) for x, turn in zip(seconds, turns, strict=True) if x is not None]
        if len(known) == len(turns) and (fault := self._fault(sum(known), turns)):
            return BadSample(index, found.id, fault, too_long=True)
        heard = list[Sample]()
        for sample, turn in zip(turns, found.turns, strict=True):
            result = self._heard(epoch, sample, turn)
            if isinstance(result, BadSample):
                return result
            heard.append(result)
        if fault := self._fault(sum(turn.duration for turn in heard), heard):
            return BadSample(index, found.id, fault, too_long=True)
        if self._cache and any(turn.frames is None and turn.input_ids is None for turn in heard):
            raise UserError(
                f"--feature_cache: {self._cache.folder} lacks the frames of {found.id}; expected all of them: start "
                "again, and what is missing is computed"
            )
        return replace(heard[0], then=tuple(heard[1:]))

    def _read(self, turn: Utterance) -> Utterance:
        """With what is spoken, if it is known, to be read in place of audio."""
        is_transcript = not turn.answers and task_named(turn.task or self._naming.task).measure == "wer"
        spoken = turn.text if is_transcript and turn.source_text is None else turn.source_text
        return replace(turn, input_text=spoken if turn.input_text is None else turn.input_text)

    def _state(self, turn: Utterance) -> str:
        return self._naming.state(turn.task, turn.lang)

    def _spoken(self, turn: Utterance) -> str | None:
        """What is spoken, or read, if it is known and not the text."""
        return turn.input_text if turn.source_text is None else turn.source_text

    def _before(self, turn: Utterance) -> list[int]:
        """What is learned before a turn's text: of a state that transcribes first what is spoken and the separator."""
        if self._state(turn) not in self._transcribes:
            return []
        spoken = self._tokenizer.encode(normalise_label(self._spoken(turn) or "", self._label_mode))
        # The first separator ends it.
        return [*(token for token in spoken if token not in self._separator), *self._separator]

    def _labelled(self, index: int, number: int, found: Utterance, first: Utterance) -> Sample:
        """All of a turn but its audio."""
        text, encode = normalise_label(found.text, self._label_mode), self._tokenizer.encode
        form = self._teacher_form if found.question and not first.then else ""
        return Sample(
            id=f"{first.id}#{number}" if first.then else found.id,
            waveform=torch.empty(0),
            text=text,
            ids=[*self._before(found), *encode(as_continuation(form, text) if form else text)],
            duration=0.0,
            index=index,
            task=self._state(found),
            lang=found.lang,
            input_ids=None if found.input_text is None else tuple(encode(found.input_text)),
            turn=number if first.then else 0,
            source_lang=found.source_lang,
            source_text=found.source_text,
            answers=found.answers,
            prompt_ids=tuple(encode(found.prompt)),
            teacher_ids=tuple(encode(as_prompt(form, found.question, found.prompt))) if form else (),
        )

    def _heard(self, epoch: int, sample: Sample, found: Utterance) -> Sample | BadSample:
        """With the turn's audio, or with its frames where they are kept."""
        if sample.input_ids is not None:
            return sample
        kept = self._cache.get(recording_key(found)) if self._cache else None
        if kept is not None:
            return replace(sample, duration=kept.num_samples / SAMPLE_RATE, frames=kept.frames)
        try:
            waveform = self.source.load(sample.index) if sample.turn <= 1 else load_turn(found)
            check_duration(len(waveform) / SAMPLE_RATE, found.duration, sample.id)
        except AudioError as error:
            return BadSample(sample.index, sample.id, str(error))
        # Outside the handler: noise that cannot be decoded is no fault of this utterance.
        if self._augment:
            waveform = self._augment(waveform, epoch, _place(sample))
        duration = len(waveform) / SAMPLE_RATE
        if self._normalise:
            waveform = normalise(waveform)
        return replace(sample, waveform=waveform, duration=duration, normalised=self._normalise)

    def _speed(self, epoch: int, sample: Sample) -> float:
        return self._augment.speed(epoch, _place(sample)) if self._augment else 1.0

    def _fault(self, seconds: float, turns: Sequence[Sample]) -> str | None:
        """Say why the turns are too long for a sequence, beside so many seconds of audio."""
        texts = [len(turn.ids) + len(turn.prompt_ids) + len(turn.input_ids or ()) for turn in turns]
        between = (len(turns) - 1) * (1 + len(self._tokenizer.encode(BETWEEN_TURNS)))
        return self._fit.fault(seconds, sum(texts) + between) if self._fit else None


def _place(sample: Sample) -> int | str:
    """What the changes of its audio depend on: its place in the data set, and in a conversation."""
    return sample.index if sample.turn <= 1 else f"{sample.index}#{sample.turn}"


@dataclass(frozen=True)
class Fit:
    """The longest sequence that is learned from: `ctx_len` positions, each audio token `stack` of the frames."""

    ctx_len: int
    stack: int
    framing: Framing

    @property
    def longest(self) -> float:
        """The seconds that no utterance that fits reaches, whatever its text."""
        return self.framing.shortest(self.ctx_len * self.stack) / SAMPLE_RATE

    def fault(self, seconds: float, num_text_ids: int) -> str | None:
        """Say why an utterance is too long, or None if it fits."""
        positions = self.framing.count(round(seconds * SAMPLE_RATE)) // self.stack + 1 + num_text_ids
        if positions <= self.ctx_len:
            return None
        return (
            f"lasts {seconds:.2f} s with {num_text_ids} text tokens: {positions} positions; the limit is "
            f"{self.ctx_len} (--ctx_len)"
        )
