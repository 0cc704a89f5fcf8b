"""The public WKV-6 operator and its registration with PyTorch.

A native kernel plugs in here: `wkv6_forward.register_kernel("cuda")` and the same of `wkv6_backward` (or "cpu")
replace the portable form for that device; checks, gradients and fake tensors stay as they are.
"""

# B batch · T time · H heads · N head size · S sequences of a packed batch

import itertools
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.ops import wkv6_chunked


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-6's recurrence: y_t = (S + v_t (u k_t)^T) r_t, then S <- S diag(exp(-exp(w_t))) + v_t k_t^T.

    r, k, v, w (B, T, H, N), w the raw decay; u (H, N); state (B, H, N, N), axes [value, key], None for zeros.
    Returns y (B, T, H, N) in r's type and the last state in float32 (float64 for float64 inputs).
    Packed: with `cu_seqlens` (S + 1,), B = 1, state (S, H, N, N); sequence s is tokens cu_seqlens[s] to
    cu_seqlens[s + 1].
    Gradients reach all six tensors. Raises ValueError for shapes that do not fit. T may be 0.
    Source: Peng et al. 2024 (arXiv:2404.05892), equations 16 to 18.
    """
    _check(r, k, v, w, u, state, cu_seqlens)
    B, _, H, N = r.shape
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state is None:
        sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
        state = torch.zeros(sequences, H, N, N, dtype=dtype, device=r.device)
    y, last = wkv6_forward(r, k, v, w, u, state.to(dtype), cu_seqlens)
    return y, last


def _check(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if r.dim() != 4:
        raise ValueError(f"wkv6: r must be (B, T, H, N), found {tuple(r.shape)}")
    B, _, H, N = r.shape
    for name, x in (("k", k), ("v", v), ("w", w)):
        if x.shape != r.shape:
            raise ValueError(f"wkv6: {name} must have r's shape {tuple(r.shape)}, found {tuple(x.shape)}")
    if u.shape != (H, N):
        raise ValueError(f"wkv6: u must be (H, N) = {(H, N)}, found {tuple(u.shape)}")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point()):
        raise ValueError("wkv6: cu_seqlens must be a vector of integers, one more than there are sequences")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"wkv6: a packed batch has B = 1, found B = {B}")
    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    if state is not None and state.shape != (sequences, H, N, N):
        raise ValueError(f"wkv6: state must be {(sequences, H, N, N)}, found {tuple(state.shape)}")
    others = {"k": k, "v": v, "w": w, "u": u} | ({} if state is None else {"state": state})
    for name, x in others.items():
        if x.device != r.device:
            raise ValueError(f"wkv6: {name} must be on r's device {r.device}, found {x.device}")


def _plan(r: Tensor, cu_seqlens: Tensor | None) -> wkv6_chunked.Plan | None:
    """How the portable form walks over the tokens; None if there are none."""
    B, T = r.shape[:2]
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    if bounds is not None and (bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds)):
        raise ValueError(f"wkv6: cu_seqlens must rise from 0 to T = {T}, found {bounds}")
    if r.numel() == 0:
        return None
    if bounds is None:
        return wkv6_chunked.plan_dense(B, T)
    return wkv6_chunked.plan_packed(tuple(b - a for a, b in itertools.pairwise(bounds)), r.device)


@torch.library.custom_op("rwkv_speech::wkv6", mutates_args=())
def wkv6_forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Portable forward: chunks in PyTorch."""
    plan = _plan(r, cu_seqlens)
    if plan is None:
        return r.new_empty(r.shape), state.clone()
    return wkv6_chunked.forward(wkv6_chunked.Inputs(r, k, v, w, u, state), plan)


@wkv6_forward.register_fake
def _(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    return r.new_empty(r.shape), state.new_empty(state.shape)


@torch.library.custom_op("rwkv_speech::wkv6_backward", mutates_args=())
def wkv6_backward(
    dy: Tensor,
    dstate: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Portable backward: the gradients of r, k, v, w, u and state."""
    plan = _plan(r, cu_seqlens)
    if plan is None:
        return *(x.new_zeros(x.shape) for x in (r, k, v, w, u)), dstate.to(state.dtype, copy=True)  # type: ignore[return-value]
    return wkv6_chunked.backward(dy, dstate, wkv6_chunked.Inputs(r, k, v, w, u, state), plan)


@wkv6_backward.register_fake
def _(
    dy: Tensor,
    dstate: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (r, k, v, w, u, state))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    grads = wkv6_backward(dy, dstate, *ctx.saved_tensors)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None


wkv6_forward.register_autograd(_gradients, setup_context=_save)
