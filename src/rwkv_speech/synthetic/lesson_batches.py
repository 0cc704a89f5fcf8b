"""Packed batches of lessons: what goes into the language model, and what must come out."""

# A prompt positions · T positions of a batch

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rwkv_speech.models import splice
from rwkv_speech.synthetic.lessons import SEPARATOR, Lesson, Lessons
from rwkv_speech.synthetic.phone_prompts import Speaker
from rwkv_speech.synthetic.phones import PHONES
from rwkv_speech.tokenizer import EOS_ID, WorldTokenizer

# What may stand between two turns: nothing, the end of text that was predicted, an empty line.
_BETWEEN = ("", None, "\n\n")
_LONGEST_READ = 60  # words that a lesson gives as text


class Batch(NamedTuple):
    """The blends of all prompts (sum of A, phones), and the layout with the labels."""

    blends: Tensor
    spliced: splice.Spliced
    noise: float  # of the blends' embeddings, relative to their own spread


class LessonBatches(Dataset[Batch]):
    """Batch number `step` of about `positions` positions; the same for the same number and seed.

    Lessons grow from easy to hard over the first `ramp` batches. With `held_out`, batches to score.
    """

    def __init__(
        self, lessons: Lessons, tokenizer: WorldTokenizer, positions: int, ramp: int, seed: int, held_out: bool = False
    ) -> None:
        self._lessons, self._tokenizer, self._positions = lessons, tokenizer, positions
        self._ramp, self._seed, self._held_out = ramp, seed, held_out
        self._speaker: Speaker | None = None

    def __getitem__(self, step: int) -> Batch:
        self._speaker = self._speaker or Speaker()  # here, and so in the data worker
        rng = random.Random(f"{self._seed}/{step}/{self._held_out}")
        difficulty = 1.0 if self._held_out else min(1.0, (step + 1) / self._ramp)
        prompts, layout, size = list[Tensor](), list[list[splice.Segment]](), 0
        while size < self._positions:
            lesson = self._lessons.draw(rng, self._held_out)
            # One word is heard before twelve.
            heard = sum(len(turn.said.split()) for turn in lesson.turns if turn.heard)
            read = sum(len(turn.said.split()) for turn in lesson.turns if not turn.heard)
            if heard > 1 + 20 * difficulty or read > _LONGEST_READ:
                continue
            segments = list(self._segments(lesson, self._speaker, prompts, rng, difficulty))
            layout.append(segments)
            size += sum(x.length if isinstance(x, splice.Audio) else len(x.ids) for x in segments)
        blends = torch.cat(prompts) if prompts else torch.zeros(0, len(PHONES))
        return Batch(blends, splice.splice(layout, EOS_ID), 0.3 * difficulty * rng.random())

    def _segments(
        self, lesson: Lesson, speaker: Speaker, prompts: list[Tensor], rng: random.Random, difficulty: float
    ) -> Iterator[splice.Segment]:
        encode = self._tokenizer.encode
        if not lesson.turns[0].said:
            yield splice.Prompt([EOS_ID])
            return (yield splice.Text(encode(lesson.turns[0].text)))
        if lesson.instruction:
            yield splice.Prompt(encode(lesson.instruction))
        between = rng.choice(_BETWEEN)
        for number, turn in enumerate(lesson.turns):
            if number:
                yield splice.Prompt([EOS_ID] if between is None else encode(between))
            if turn.heard:
                prompts.append(torch.from_numpy(speaker.prompt(turn.said, turn.lang, rng, difficulty)))
                yield splice.Audio(len(prompts[-1]))
            else:
                yield splice.Prompt(encode(turn.said))
            yield splice.Prompt(encode(SEPARATOR))
            yield splice.Text(encode(turn.text))

    def loader(self, first: int, last: int) -> "DataLoader[Any]":
        """The batches from `first` to `last`, made by a process of their own."""
        return DataLoader(self, batch_size=None, sampler=range(first, last), num_workers=1, prefetch_factor=8)
