"""Audio tokens and text -> one packed sequence for the language model, and the labels to learn.

    audio 0     audio 1     #           text 0      text 1
    -100        -100        text 0      text 1      end of text

Each column is a position: what goes in, above what must come out. A sequence is made of segments: audio, prompts (such
as the #) and texts; several turns follow each other. Layouts are for the host: lengths decide sizes, and a device asked
for these would keep it waiting.
"""

# U sequences · A audio tokens · T all positions of the packed batch · C channels

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Audio:
    """So many audio tokens; nothing is predicted there."""

    length: int


@dataclass(frozen=True)
class Prompt:
    """Tokens that are given; nothing of them is predicted."""

    ids: Sequence[int]


@dataclass(frozen=True)
class Text:
    """Tokens that are learned, each predicted at the position before it, the end of text at the last."""

    ids: Sequence[int]


Segment = Audio | Prompt | Text


class Spliced(NamedTuple):
    """Where everything is in the packed batch."""

    cu_seqlens: Tensor  # (U + 1,) bounds of the sequences
    audio_positions: Tensor  # (sum of A,)
    token_positions: Tensor  # (n,) of prompts and texts
    token_ids: Tensor  # (n,) what stands there
    labels: Tensor  # (T,) the token to predict at each position, IGNORE where none

    def to(self, device: torch.device) -> "Spliced":
        """The same on a device, which is not waited for."""
        return Spliced(*(x.to(device, non_blocking=True) for x in self))


def splice(sequences: Sequence[Sequence[Segment]], eos: int) -> Spliced:
    """The layout of U sequences, one after another; raises ValueError for a text with nothing before it."""
    bounds, labels = [0], list[int]()
    audio, positions, ids = list[int](), list[int](), list[int]()
    for segments in sequences:
        for segment in segments:
            here = len(labels)
            if isinstance(segment, Audio):
                audio += range(here, here + segment.length)
                labels += [IGNORE] * segment.length
                continue
            positions += range(here, here + len(segment.ids))
            ids += segment.ids
            if isinstance(segment, Prompt):
                labels += [IGNORE] * len(segment.ids)
                continue
            if here == bounds[-1]:
                raise ValueError("a text at the start of a sequence has no position that could predict it")
            labels[-1:] = [*segment.ids, eos]
        bounds.append(len(labels))
    return Spliced(*(torch.tensor(x, dtype=torch.int64) for x in (bounds, audio, positions, ids, labels)))


def fill(spliced: Spliced, audio_tokens: Tensor, token_embeddings: Tensor) -> Tensor:
    """audio_tokens (sum of A, C), embeddings of `token_ids` (n, C) -> inputs_embeds (1, T, C)."""
    inputs = token_embeddings.new_empty(len(spliced.labels), token_embeddings.shape[-1])
    inputs = inputs.index_copy(0, spliced.token_positions, token_embeddings)
    return inputs.index_copy(0, spliced.audio_positions, audio_tokens.to(inputs.dtype))[None]
