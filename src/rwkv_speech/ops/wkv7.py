"""The public WKV-7 operator and its registration with PyTorch.

Native kernels (native.py) serve float32, bfloat16 and float16 on CPUs and GPUs, the chunked PyTorch form the rest.
"""

# B batch · T time · H heads · N head size · S sequences of a packed batch

from typing import Any

import torch
from torch import Tensor

from rwkv_speech.ops import recurrence, wkv7_chunked
from rwkv_speech.ops.wkv7_chunked import Inputs


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-7's recurrence: S <- S diag(exp(-exp(w_t))) + (S a_t) b_t^T + v_t k_t^T, then y_t = S r_t.

    r, w, k, v, a, b (B, T, H, N), w the raw decay; in RWKV-7 a = -kk, b = kk * rate. Everything else is as `wkv6`:
    state (B, H, N, N), axes [value, key]; y in r's type, the last state in float32; packing; `form`; what is raised.
    Gradients reach all seven tensors. Source: Peng et al. 2025 (arXiv:2503.14456), section 3.
    """
    state = recurrence.check("wkv7", r, {"w": w, "k": k, "v": v, "a": a, "b": b}, state, cu_seqlens)
    y, last = _wkv7(r, w, k, v, a, b, state, cu_seqlens, form)
    return y, last


def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    """The operator on checked arguments; `state` is the type of all sums."""
    x = Inputs(r, w, k, v, a, b, state)
    if kernels := recurrence.native_kernels(r, cu_seqlens, form):
        return kernels.forward(x, cu_seqlens)
    plan = recurrence.plan(r, cu_seqlens)
    return wkv7_chunked.forward(x, plan) if plan else (r.new_empty(r.shape), state.clone())


@torch.library.custom_op("rwkv_speech::wkv7_backward", mutates_args=())
def wkv7_backward(
    dy: Tensor,
    dstate: Tensor,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of r, w, k, v, a, b and state."""
    x = Inputs(r, w, k, v, a, b, state)
    if kernels := recurrence.native_kernels(r, cu_seqlens, form):
        return Inputs(**kernels.backward(dy, dstate, x, cu_seqlens))
    if plan := recurrence.plan(r, cu_seqlens):
        return wkv7_chunked.backward(dy, dstate, x, plan)
    return Inputs(*map(torch.zeros_like, x))._replace(state=dstate.to(state.dtype, copy=True))


wkv7_backward.register_fake(
    lambda dy, dstate, r, w, k, v, a, b, state, cu_seqlens, form: tuple(
        x.new_empty(x.shape) for x in (r, w, k, v, a, b, state)
    )
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.form = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    grads = wkv7_backward(dy, dstate, *ctx.saved_tensors, ctx.form)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None


wkv7_forward, _wkv7 = recurrence.define(
    "wkv7",
    _forward,
    lambda r, w, k, v, a, b, state, cu_seqlens, form: (r.new_empty(r.shape), state.new_empty(state.shape)),
    _save,
    _gradients,
)


def wkv7_step(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, form: str = "auto"
) -> Tensor:
    """One token of each of B slots, for decoding: y (B, H, N); `state` (B, H, N, N) float32 is updated in place.

    r, w, k, v, a, b (B, H, N). No gradients. Raises ValueError as `wkv6_step`.
    """
    recurrence.check_step("wkv7_step", r, {"w": w, "k": k, "v": v, "a": a, "b": b}, state)
    y: Tensor = _wkv7_step(r, w, k, v, a, b, state, form)
    return y


def _step(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, form: str) -> Tensor:
    """The operator on checked arguments."""
    return recurrence.step(Inputs(r, w, k, v, a, b, state), form, wkv7_chunked.forward)


_, _wkv7_step = recurrence.define("wkv7_step", _step, lambda r, *_: r.new_empty(r.shape), changes=("state",))
