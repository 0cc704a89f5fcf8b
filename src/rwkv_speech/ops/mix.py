"""RWKV-6's elementwise parts behind explicit backward passes, for frozen weights: they keep less and compute it again.

Autograd alone would keep the five mixes of every token, and the gate twice: a quarter of what a layer keeps. The
arithmetic stands in plain functions; with `fuse`, torch.compile fuses them: fewer launches, compiled once.
"""

# B batch · T positions · C channels · R mix rank

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def mixes(
    x: Tensor, xx: Tensor, maa_x: Tensor, w1: Tensor, w2: Tensor, base: Tensor, fuse: bool = False
) -> tuple[Tensor, ...]:
    """Five data-dependent blends of each token x with its difference xx to the one before, (B, T, C) each.

    out[f] = x + xx * (base[f] + tanh((x + xx * maa_x) @ w1)[f] @ w2[f]) with maa_x (C,), w1 (C, 5 R), w2 (5, R, C) and
    base (5, C); in the type of the matrix products, which autocast may set. Source: Eagle and Finch, arXiv 2404.05892.
    """
    weights = (maa_x, w1, w2, base)
    if torch.is_grad_enabled() and not any(weight.requires_grad for weight in weights):
        return _Mixes.apply(fuse, x, xx, *weights)
    return _mix(fuse, x, xx, *weights)[1]


def gated(y: Tensor, gate: Tensor, fuse: bool = False) -> Tensor:
    """y * silu(gate), in the gate's type."""
    return _Gated.apply(fuse, y, gate) if torch.is_grad_enabled() else _gate(fuse, y, gate)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2; overwrites x, which must be of no further use."""
    return _SquaredReLU.apply(x) if torch.is_grad_enabled() else x.relu_().square()


def _fusable(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def call(fuse: bool, *tensors: Tensor) -> Any:
        return compiled()(*tensors) if fuse else function(*tensors)

    return call


@_fusable
def _mix(
    x: Tensor, xx: Tensor, maa_x: Tensor, w1: Tensor, w2: Tensor, base: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The low-rank activations (B, T, 5 R) and the five mixes."""
    low = torch.tanh(torch.addcmul(x, xx, maa_x) @ w1)
    rows = low.flatten(0, -2).unflatten(-1, (5, -1)).transpose(0, 1)
    scales = torch.bmm(rows, w2.to(low.dtype)).add_(base[:, None])
    return low, tuple(torch.addcmul(x, xx, scale.view_as(x)).to(low.dtype) for scale in scales)


@_fusable
def _mix_gradients(
    xx: Tensor, low: Tensor, maa_x: Tensor, w1: Tensor, w2: Tensor, base: Tensor, *gradients: Tensor
) -> tuple[Tensor, Tensor]:
    """Of x and xx, from those of the five mixes."""
    dx, dxx, dlow = torch.zeros_like(xx), torch.zeros_like(xx), []
    for gradient, rows, up, start in zip(gradients, low.unflatten(-1, (5, -1)).unbind(-2), w2, base, strict=True):
        up = up.to(low.dtype)
        dx += gradient
        dxx.addcmul_(gradient, rows @ up + start.to(low.dtype))
        dlow.append((gradient * xx).to(low.dtype) @ up.T)
    inner = torch.ops.aten.tanh_backward(torch.cat(dlow, -1), low) @ w1.T.to(low.dtype)
    return dx.add_(inner), dxx.addcmul_(inner, maa_x)


@_fusable
def _gate(y: Tensor, gate: Tensor) -> Tensor:
    return (y * F.silu(gate)).to(gate.dtype)


@_fusable
def _gate_gradients(y: Tensor, gate: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return (gradient * F.silu(gate)).to(y.dtype), torch.ops.aten.silu_backward((gradient * y).to(gate.dtype), gate)


class _Mixes(torch.autograd.Function):
    """Keeps xx and the low-rank activations; the weights get no gradient."""

    @staticmethod
    def forward(ctx: Any, fuse: bool, x: Tensor, xx: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.fuse = fuse
        low, mixed = _mix(fuse, x, xx, *weights)
        ctx.save_for_backward(xx, low, *weights)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_mix_gradients(ctx.fuse, *ctx.saved_tensors, *gradients), None, None, None, None


class _Gated(torch.autograd.Function):
    """Keeps its two inputs alone."""

    @staticmethod
    def forward(ctx: Any, fuse: bool, y: Tensor, gate: Tensor) -> Tensor:
        ctx.fuse = fuse
        ctx.save_for_backward(y, gate)
        return _gate(fuse, y, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, *_gate_gradients(ctx.fuse, *ctx.saved_tensors, gradient)


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
