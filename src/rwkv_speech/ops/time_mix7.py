"""What RWKV-7's time mix makes of its projections, around WKV-7; with frozen weights it keeps them alone.

Autograd alone would keep some fifteen vectors of each token here. They are made of three, r, k and v, and a few
low-rank activations: the backward pass makes them again, all but WKV-7's own forward pass.
"""

# B batch · T time · C channels = H heads · N head size · S sequences of a packed batch

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rwkv_speech.ops.wkv7 import wkv7, wkv7_backward


class Projections(NamedTuple):
    """Of each token: r, k, v (B, T, C), the low-rank activations of decay, rate and value mix (B, T, rank), and the
    first layer's values (B, T, C); the last two are None in that layer.
    """

    r: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    rate: Tensor
    value: Tensor | None
    first: Tensor | None


class Weights(NamedTuple):
    """The block's parameters of these names; v0 and v2 are None in the first layer."""

    w0: Tensor
    w2: Tensor
    a0: Tensor
    a2: Tensor
    v0: Tensor | None
    v2: Tensor | None
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor


class Tokens(NamedTuple):
    """What wkv7 takes of each token, (B, T, H, N)."""

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


def tokens(x: Projections, by: Weights) -> tuple[Tokens, Tensor]:
    """What wkv7 takes, and what each token adds to its own output, (B, T, H, N).

    Source: Peng et al. 2025 (arXiv:2503.14456), section 4.
    """
    shape = *x.r.shape[:2], *by.r_k.shape
    # The decay is exp(-exp(w)) with exp(w) = e^-0.5 sigmoid(...): in float32 from here to the kernel.
    w = F.logsigmoid(by.w0.float() + (x.decay @ by.w2.to(x.decay.dtype)).float()) - 0.5
    rate = torch.sigmoid(by.a0 + x.rate @ by.a2.to(x.rate.dtype))
    v = x.v
    if x.first is not None and x.value is not None and by.v0 is not None and by.v2 is not None:
        v = v + (x.first - v) * torch.sigmoid(by.v0 + x.value @ by.v2.to(x.value.dtype))
    removed = F.normalize((x.k * by.k_k).view(shape).float(), dim=-1).to(x.k.dtype)
    k = x.k * (1 + (rate - 1) * by.k_a)
    r, w, k, v, rate = (part.view(shape) for part in (x.r, w, k, v, rate))
    bonus = (r * k * by.r_k).sum(-1, keepdim=True) * v
    return Tokens(r, w, k, v, -removed, removed * rate), bonus


def attend(
    x: Projections, by: Weights, state: Tensor, cu_seqlens: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """WKV-7's y (B, T, H, N) and last state, and the bonus; state (B or S, H, N, N), packing and form as in wkv7."""
    if torch.is_grad_enabled() and not any(weight is not None and weight.requires_grad for weight in by):
        state = state.to(torch.promote_types(torch.float32, x.r.dtype))
        y, last, bonus = _Attend.apply(form, cu_seqlens, state, *x, *by)
        return y, last, bonus
    made, bonus = tokens(x, by)
    y, last = wkv7(*made, state, cu_seqlens, form)
    return y, last, bonus


class _Attend(torch.autograd.Function):
    """Keeps its inputs alone; the weights get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, form: str, cu_seqlens: Tensor | None, state: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.form = form
        ctx.save_for_backward(cu_seqlens, state, *inputs)
        made, bonus = tokens(*_parted(inputs))
        return *wkv7(*made, state, cu_seqlens, form), bonus

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor, dbonus: Tensor) -> tuple[Tensor | None, ...]:
        cu_seqlens, state, *saved = ctx.saved_tensors
        x, by = _parted(saved)
        leaves: Any = (None if part is None else part.detach().requires_grad_() for part in x)
        x = Projections(*leaves)
        with torch.enable_grad():
            made, bonus = tokens(x, by)
        *of_made, dstate = wkv7_backward(dy, dlast, *(part.detach() for part in made), state, cu_seqlens, ctx.form)
        given = [part for part in x if part is not None]
        found = iter(torch.autograd.grad([*made, bonus], given, [*of_made, dbonus]))
        return None, None, dstate, *(None if part is None else next(found) for part in x), *(None for _ in by)


def _parted(inputs: Any) -> tuple[Projections, Weights]:
    count = len(Projections._fields)
    return Projections(*inputs[:count]), Weights(*inputs[count:])
