"""Frozen matrices in 8 bits, for decoding on a CPU: half of bfloat16's memory, and of the time to read it."""

# M outputs · K inputs

import mmap

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rows that are made floats at a time, more or fewer take longer.
_ROWS = 1024


def _in_large_pages(M: int, K: int) -> Tensor:
    """An int8 matrix in memory that is read faster, where the system has pages of megabytes to give."""
    memory = mmap.mmap(-1, M * K, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int8).view(M, K)


class Int8Linear(nn.Module):
    """A linear layer x W^T whose W (M, K) is kept as whole numbers of -127 to 127, times a scale of each output.

    Activations stay what they are, so that only the weights are rounded, to 1/254 of the largest of their row at most.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        M, K = weight.shape
        self.register_buffer("weight", _in_large_pages(M, K))
        self.register_buffer("scale", torch.empty(M, dtype=torch.float32))
        for rows, whole, scale in zip(*(x.split(_ROWS) for x in (weight, self.weight, self.scale)), strict=True):
            floats = rows.float()
            scale.copy_(floats.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
            whole.copy_((floats / scale[:, None]).round_())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., M), in x's type."""
        parts = zip(self.weight.split(_ROWS), self.scale.split(_ROWS), strict=True)
        return torch.cat([F.linear(x, w.to(x.dtype)) * scale for w, scale in parts], -1).to(x.dtype)
