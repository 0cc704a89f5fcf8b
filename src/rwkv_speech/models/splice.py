"""Audio tokens and text -> one packed sequence for the language model, and the labels to learn.

    audio 0     audio 1     #           text 0      text 1
    -100        -100        text 0      text 1      end of text

Each column is a position: what goes in, above what must come out. Free functions of tensors; no model here. They are
for the host: lengths decide sizes, and a device asked for these would keep it waiting.
"""

# U utterances · A audio tokens · L text tokens · T all positions of the packed batch · C channels

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class Spliced(NamedTuple):
    """Where everything is in the packed batch."""

    cu_seqlens: Tensor  # (U + 1,) bounds of the utterances
    audio_positions: Tensor  # (sum of A,)
    token_positions: Tensor  # (sum of L + U,) of the separators and the text
    token_ids: Tensor  # (sum of L + U,) what stands there
    labels: Tensor  # (T,) the token to predict at each position, IGNORE where none

    def to(self, device: torch.device) -> "Spliced":
        """The same on a device, which is not waited for."""
        return Spliced(*(x.to(device, non_blocking=True) for x in self))


def bounds(lengths: Tensor) -> Tensor:
    """Lengths (U,) -> where each starts and the last ends, (U + 1,)."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _positions(starts: Tensor, lengths: Tensor) -> Tensor:
    """The positions of runs of `lengths` that begin at `starts`, one run after another."""
    within = torch.arange(int(lengths.sum()), device=lengths.device)
    return within + torch.repeat_interleave(starts - bounds(lengths)[:-1], lengths)


def splice(audio_lengths: Tensor, text_ids: Tensor, text_lengths: Tensor, separator: int, eos: int) -> Spliced:
    """audio_lengths (U,), text_ids (sum of L,), text_lengths (U,) -> the layout for training.

    Nothing is predicted at audio positions; the separator predicts the first text token, the last one `eos`.
    """
    cu_seqlens = bounds(audio_lengths + 1 + text_lengths)
    separators = cu_seqlens[:-1] + audio_lengths
    text_positions = _positions(separators + 1, text_lengths)
    labels = torch.full((int(cu_seqlens[-1]),), IGNORE, dtype=torch.int64, device=text_ids.device)
    labels[cu_seqlens[1:] - 1] = eos
    labels[text_positions - 1] = text_ids
    return Spliced(
        cu_seqlens,
        _positions(cu_seqlens[:-1], audio_lengths),
        torch.cat((separators, text_positions)),
        torch.cat((torch.full_like(separators, separator), text_ids)),
        labels,
    )


def splice_prompt(audio_lengths: Tensor, separator: int) -> Spliced:
    """The layout for decoding: audio and separator, no text; its one label per utterance is not used."""
    none = torch.zeros_like(audio_lengths)
    return splice(audio_lengths, none[:0], none, separator, IGNORE)


def fill(spliced: Spliced, audio_tokens: Tensor, token_embeddings: Tensor) -> Tensor:
    """audio_tokens (sum of A, C), embeddings of `token_ids` (n, C) -> inputs_embeds (1, T, C)."""
    inputs = token_embeddings.new_empty(len(spliced.labels), token_embeddings.shape[-1])
    inputs = inputs.index_copy(0, spliced.token_positions, token_embeddings)
    return inputs.index_copy(0, spliced.audio_positions, audio_tokens.to(inputs.dtype))[None]
