"""Frozen matrices in 8 or 4 bits: packed once, made floats again a few rows at a time, for each pass in each direction.

int8: whole numbers of -127 to 127 and a scale of each output, which the products take: half of bfloat16's memory.
nf4: of each number the nearest of 16 quantiles of the normal distribution, two in a byte, times the largest of its
block of 64, which is kept in bfloat16: 4.25 bits a number. Source: Dettmers et al. 2023 (arXiv:2305.14314).

In PyTorch's operations, not through bitsandbytes or torchao: the same bits on every device, planned on "meta", and the
int8 form is the one that the CPU's decoding kernel reads.
"""

# M outputs · K inputs

import functools
import math
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Rows that a CPU makes floats at a time, more or fewer take longer.
_ROWS = 1024
_BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def pack(weight: Tensor, quant: str) -> tuple[Tensor, Tensor]:
    """W (M, K) -> how it is kept, int8 (M, K) or nf4's bytes (M, K / 2), and its scales (M,) or (M, K / block).

    Raises ValueError for nf4 with an odd K.
    """
    M, K = weight.shape
    if quant == "int8":
        stored, scale = _storage(M, K, torch.int8, weight), weight.new_empty(M, dtype=torch.float32)
    else:
        block = math.gcd(K, _BLOCK)
        if block == 1:
            raise ValueError(f"nf4: two numbers share a byte, found rows of {K}")
        stored = _storage(M, K // 2, torch.uint8, weight)
        scale = weight.new_empty(M, K // block, dtype=torch.bfloat16)
    fill, weight = _fill_int8 if quant == "int8" else _fill_nf4, weight.detach()
    if weight.is_meta:
        return stored, scale
    for rows in zip(*(x.split(_ROWS) for x in (weight, stored, scale)), strict=True):
        fill(*rows)
    return stored, scale


def unpack(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W (M, K) of what `pack` gave."""
    pieces = _pieces(stored, scale, dtype)
    return torch.cat([w if factors is None else (w * factors[:, None]).to(dtype) for w, factors in pieces])


def product(x: Tensor, stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., K) -> x W^T (..., M), W made of `dtype`; the backward pass, to x alone, makes it again."""
    return _Product.apply(x, stored, scale, dtype)


def _storage(M: int, K: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """On a CPU in memory that is read faster, where the system has pages of megabytes to give."""
    if like.device.type != "cpu":
        return like.new_empty(M, K, dtype=dtype)
    memory = mmap.mmap(-1, M * K, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(M, K)


def _fill_int8(weight: Tensor, stored: Tensor, scale: Tensor) -> None:
    floats = weight.float()
    scale.copy_(floats.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    stored.copy_((floats / scale[:, None]).round_())


def _fill_nf4(weight: Tensor, stored: Tensor, scale: Tensor) -> None:
    blocks = weight.float().unflatten(1, (scale.shape[1], -1))
    scale.copy_(blocks.abs().amax(-1)).clamp_(min=torch.finfo(torch.bfloat16).tiny)
    levels = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(blocks / scale.float()[..., None], (levels[1:] + levels[:-1]) / 2).flatten(1)
    stored.copy_(codes[:, ::2] * 16 + codes[:, 1::2])


def _pieces(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Some rows of W after others, and what their products are to be multiplied by, if by anything."""
    rows = _ROWS if stored.device.type == "cpu" else len(stored)
    pairs = None if stored.dtype == torch.int8 else _nf4_pairs(stored.device, dtype)
    for some, factors in zip(stored.split(rows), scale.split(rows), strict=True):
        if pairs is None:
            yield some.to(dtype), factors
        else:
            levels = F.embedding(some.int(), pairs).view(*factors.shape, -1)
            yield levels.mul_(factors.to(dtype)[..., None]).flatten(1), None


@functools.cache
def _nf4_pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two numbers of each byte, (256, 2); made once, for a CUDA graph cannot."""
    levels = torch.tensor(NF4, device=device, dtype=dtype)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)


class _Product(torch.autograd.Function):
    """Keeps nothing of x and nothing of W in floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.dtype = dtype
        parts = list[Tensor]()
        for w, factors in _pieces(stored, scale, dtype):
            part = F.linear(x, w)
            parts.append(part if factors is None else (part * factors).to(part.dtype))
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        stored, scale = ctx.saved_tensors
        first, total = 0, gradient.new_zeros(())
        for w, factors in _pieces(stored, scale, ctx.dtype):
            part = gradient[..., first : first + len(w)]
            part = (part if factors is None else (part * factors).to(part.dtype)) @ w.to(part.dtype)
            total = part if not first else total + part
            first += len(w)
        return total, None, None, None
