"""Sounds for random weights."""

import torch
from torch import Tensor

from rwkv_speech.batch import Sample


def sounds(lengths: list[int]) -> list[Tensor]:
    """Noise of a different colour each, so that utterances differ to the encoder."""
    draw = torch.Generator().manual_seed(6)
    noises = [torch.randn(length + 1, generator=draw) for length in lengths]
    return [0.1 * (noise[1:] + (i % 3 - 1) * noise[:-1]) for i, noise in enumerate(noises)]


def samples(waves: list[Tensor]) -> list[Sample]:
    return [Sample(f"u{i}", x, f"ref {i}", [], len(x) / 16_000, 10 + i, "asr", "de") for i, x in enumerate(waves)]
