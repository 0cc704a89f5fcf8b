"""What a recurrent language model remembers, and where sequences lie in a packed batch."""

# L layers · B batch · C channels = H heads · N head size · S sequences of a packed batch

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """What the model remembers: per layer the recurrent matrices and the two previous tokens of the token shifts."""

    wkv: Tensor  # (L, B, H, N, N) float32, axes [value, key]
    att_shift: Tensor  # (L, B, C)
    ffn_shift: Tensor  # (L, B, C)

    def select(self, rows: Tensor) -> "State":
        """The state of some of the sequences, in the order of `rows`."""
        return State(*(x[:, rows] for x in self))

    @classmethod
    def joined(cls, states: "Sequence[State]") -> "State":
        """Those of some sequences, then those of others, copied."""
        return cls(*(torch.cat(parts, 1) for parts in zip(*states, strict=True)))


class Packing(NamedTuple):
    """Where sequences start and end in a packed batch of one row; empty sequences keep their state."""

    cu_seqlens: Tensor  # (S + 1,)
    filled: Tensor  # (S',) the sequences that are not empty
    starts: Tensor  # (S',) their first positions
    ends: Tensor  # (S',) their last positions

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> "Packing":
        """From the bounds (S + 1,) of the sequences."""
        filled = cu_seqlens.diff().nonzero()[:, 0]
        return cls(cu_seqlens, filled, cu_seqlens[filled], cu_seqlens[filled + 1] - 1)

    def to(self, device: torch.device) -> "Packing":
        """The same on a device, which is not waited for."""
        return Packing(*(x.to(device, non_blocking=True) for x in self))
