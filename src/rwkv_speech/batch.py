"""What data hands to the model: samples, and batches of them.

B batch · S samples · F frames · D encoder width · L text tokens
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE

# What a turn of a conversation begins with, but for the first, as in the texts of World models; id 0 would end them.
BETWEEN_TURNS = "\n\n"


@dataclass(frozen=True)
class Sample:
    """One utterance: `waveform` (S,) float32 at 16 kHz, normalised text, ids (no end of text), seconds.

    `index` is its place in the data set; `task` and `lang` say what is to be made of it, and its language if known.
    `source_text` is what is spoken where that is not the text, in `source_lang`; all `answers` are right, if there are
    any; `prompt_ids` are read before the audio. `normalised` says whether the waveform has zero mean and unit variance.
    From a feature cache come the encoder's `frames` (F, D) instead, and the waveform is empty; so it is where text is
    read in place of audio, its `input_ids`. `turn` counts from 1 within a conversation, and is 0 in none; the
    first has the others in `then`. `teacher_ids` are the prompt that asks the frozen language model for the same text,
    where training compares with what it says.
    """

    id: str
    waveform: Tensor
    text: str
    ids: list[int]
    duration: float
    index: int
    task: str
    lang: str | None = None
    normalised: bool = False
    frames: Tensor | None = None
    input_ids: tuple[int, ...] | None = None
    turn: int = 0
    source_lang: str | None = None
    source_text: str | None = None
    answers: tuple[str, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    then: "tuple[Sample, ...]" = ()
    teacher_ids: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Of what is read: samples, frames, or ids."""
        return len(self.input_ids or (self.waveform if self.frames is None else self.frames))


@dataclass(frozen=True)
class BadSample:
    """An utterance that cannot be used, and why; `too_long` marks sound audio beyond the length limit."""

    index: int
    id: str
    reason: str
    too_long: bool = False


@dataclass(frozen=True)
class Batch:
    """B usable utterances, and the unusable ones that were drawn with them; B may be 0.

    indices     B places in the data set, which tell utterances apart: ids may come twice
    waveforms   (B, S_max) float32, zero after each utterance's own S
    num_samples (B,) int64, S of each
    text_ids    (sum of L,) int64, the texts' ids one after another, no end of text
    text_lengths (B,) int64, L of each
    normalised  whether the waveforms have zero mean and unit variance
    frames      (B, F_max, D) the encoder's frames in the feature cache's type, zero after each utterance's own F; where
                they are given, the waveforms are (B, 0)
    frame_lengths (B,) int64, F of each
    prompt_ids  what each reads before the audio
    input_ids   what each reads in place of audio, None for audio; or None where all of them hear
    turns       of each its number in its conversation, from 1, and 0 in none; those above 1 go on in the sequence of
                the one before them. None where there is no conversation
    teacher_ids of each the prompt of the frozen language model, empty where it is no teacher; None where it is for none
    """

    indices: list[int]
    ids: list[str]
    tasks: list[str]
    langs: list[str | None]
    source_langs: list[str | None]
    source_texts: list[str | None]
    answers: list[tuple[str, ...]]
    prompt_ids: list[tuple[int, ...]]
    waveforms: Tensor
    num_samples: Tensor
    text_ids: Tensor
    text_lengths: Tensor
    texts: list[str]
    bad: list[BadSample]
    normalised: bool = False
    frames: Tensor | None = None
    frame_lengths: Tensor | None = None
    input_ids: list[tuple[int, ...] | None] | None = None
    turns: list[int] | None = None
    teacher_ids: list[tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """What there is to learn: the tokens of the texts, and the end of each."""
        return len(self.text_ids) + len(self)

    def samples(self) -> list[Sample]:
        """The B utterances one by one, each at its own length."""
        ids = self.text_ids.split(self.text_lengths.tolist())
        frames = [None] * len(self) if self.frames is None else self.frames
        lengths = self.num_samples if self.frame_lengths is None else self.frame_lengths
        read, turns = self.input_ids or [None] * len(self), self.turns or [0] * len(self)
        taught = self.teacher_ids or [()] * len(self)
        return [
            Sample(
                self.ids[i],
                self.waveforms[i, : int(self.num_samples[i])],
                self.texts[i],
                ids[i].tolist(),
                int(self.num_samples[i]) / SAMPLE_RATE,
                self.indices[i],
                self.tasks[i],
                self.langs[i],
                self.normalised,
                None if x is None else x[: int(lengths[i])],
                read[i],
                turns[i],
                self.source_langs[i],
                self.source_texts[i],
                self.answers[i],
                self.prompt_ids[i],
                teacher_ids=taught[i],
            )
            for i, x in enumerate(frames)
        ]

    def conversations(self) -> list[list[Sample]]:
        """The same, those of a conversation together; what is in none is alone."""
        found = list[list[Sample]]()
        for sample in self.samples():
            if sample.turn <= 1:
                found.append([])
            found[-1].append(sample)
        return found

    def to(self, device: torch.device | str) -> "Batch":
        """Copy audio and frames to a device; from pinned memory the copy runs beside what the device does.

        Lengths and text stay on the host, which plans with them.
        """
        return self._mapped(lambda x: x.to(device, non_blocking=True) if x.is_floating_point() else x)

    def pin_memory(self) -> "Batch":
        """Copy the tensors to page-locked memory; a loader with `pin_memory` calls this."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **changed)
