"""RWKV-6's elementwise parts behind explicit backward passes, for frozen weights: they keep less and compute it again.

Autograd alone would keep the five mixes of every token, and the gate twice: a quarter of what a layer keeps.
"""

# B batch · T positions · C channels · R mix rank

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def mixes(x: Tensor, xx: Tensor, maa_x: Tensor, w1: Tensor, w2: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    """Five data-dependent blends of each token x with its difference xx to the one before, (B, T, C) each.

    out[f] = x + xx * (base[f] + tanh((x + xx * maa_x) @ w1)[f] @ w2[f]) with maa_x (C,), w1 (C, 5 R), w2 (5, R, C) and
    base (5, C); in the type of the matrix products, which autocast may set. Source: Eagle and Finch, arXiv 2404.05892.
    """
    weights = (maa_x, w1, w2, base)
    if torch.is_grad_enabled() and not any(weight.requires_grad for weight in weights):
        return _Mixes.apply(x, xx, *weights)
    return _mix(x, xx, *weights)[1]


def gated(y: Tensor, gate: Tensor) -> Tensor:
    """y * silu(gate), in the gate's type."""
    return _Gated.apply(y, gate) if torch.is_grad_enabled() else _gate(y, gate)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2; overwrites x, which must be of no further use."""
    return _SquaredReLU.apply(x) if torch.is_grad_enabled() else x.relu_().square()


def _gate(y: Tensor, gate: Tensor) -> Tensor:
    return (y * F.silu(gate)).to(gate.dtype)


def _scales(low: Tensor, w2: Tensor, base: Tensor) -> Tensor:
    """What each of the five multiplies xx by, (5, B T, C)."""
    rows = low.flatten(0, -2).unflatten(-1, (5, -1)).transpose(0, 1)
    return torch.bmm(rows, w2.to(low.dtype)).add_(base[:, None])


def _mix(
    x: Tensor, xx: Tensor, maa_x: Tensor, w1: Tensor, w2: Tensor, base: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    low = torch.tanh(torch.addcmul(x, xx, maa_x) @ w1)
    scales = _scales(low, w2, base)
    return low, tuple(torch.addcmul(x, xx, scale.view_as(x)).to(low.dtype) for scale in scales)


class _Mixes(torch.autograd.Function):
    """Keeps xx and the low-rank activations; the weights get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, xx: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        low, mixed = _mix(x, xx, *weights)
        ctx.save_for_backward(xx, low, *weights)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        xx, low, maa_x, w1, w2, base = ctx.saved_tensors
        dx, dxx, dlow = torch.zeros_like(xx), torch.zeros_like(xx), []
        for gradient, rows, up, start in zip(gradients, low.unflatten(-1, (5, -1)).unbind(-2), w2, base, strict=True):
            up = up.to(low.dtype)
            dx += gradient
            dxx.addcmul_(gradient, rows @ up + start.to(low.dtype))
            dlow.append((gradient * xx).to(low.dtype) @ up.T)
        dlow_all = torch.ops.aten.tanh_backward(torch.cat(dlow, -1), low)
        inner = dlow_all @ w1.T.to(low.dtype)
        dx += inner
        dxx.addcmul_(inner, maa_x)
        return dx, dxx, None, None, None, None


class _Gated(torch.autograd.Function):
    """Keeps its two inputs alone."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, gate)
        return _gate(y, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        y, gate = ctx.saved_tensors
        return (gradient * F.silu(gate)).to(y.dtype), torch.ops.aten.silu_backward((gradient * y).to(gate.dtype), gate)


class _SquaredReLU(torch.autograd.Function):
    """Keeps relu(x), whose product with the gradient is zero where the ReLU's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu_()
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient * ctx.saved_tensors[0]).mul_(2)
