"""The public WKV-6 operator and its registration with PyTorch.

Native kernels (native.py) serve float32, bfloat16 and float16 on CPUs and GPUs, the chunked PyTorch form the rest.
"""

# B batch · T time · H heads · N head size · S sequences of a packed batch

from typing import Any

import torch
from torch import Tensor

from rwkv_speech.ops import recurrence, wkv6_chunked
from rwkv_speech.ops.wkv6_chunked import Inputs


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-6's recurrence: y_t = (S + v_t (u k_t)^T) r_t, then S <- S diag(exp(-exp(w_t))) + v_t k_t^T.

    r, k, v, w (B, T, H, N), w the raw decay; u (H, N); state (B, H, N, N), axes [value, key], None for zeros.
    Returns y (B, T, H, N) in r's type and the last state in float32 (float64 for float64 inputs).
    Packed: with `cu_seqlens` (S + 1,), B = 1, state (S, H, N, N); sequence s is tokens cu_seqlens[s] to
    cu_seqlens[s + 1]. `form` is the kernel's, one of config.KERNEL_FORMS.
    Gradients reach all six tensors. Raises ValueError for shapes that do not fit. T may be 0. The values in
    `cu_seqlens` are checked on a CPU; on a GPU, where that would wait for the device, wrong ones give wrong numbers.
    Source: Peng et al. 2024 (arXiv:2404.05892), equations 16 to 18.
    """
    state = recurrence.check("wkv6", r, {"k": k, "v": v, "w": w, "u": u}, state, cu_seqlens)
    y, last = _wkv6(r, k, v, w, u, state, cu_seqlens, form)
    return y, last


def _forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, cu_seqlens: Tensor | None, form: str
) -> tuple[Tensor, Tensor]:
    """The operator on checked arguments; `state` is the type of all sums."""
    x = Inputs(r, k, v, w, u, state)
    if kernels := recurrence.native_kernels(r, cu_seqlens, form):
        return kernels.forward(x, cu_seqlens)
    plan = recurrence.plan(r, cu_seqlens)
    return wkv6_chunked.forward(x, plan) if plan else (r.new_empty(r.shape), state.clone())


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
    need_du: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of r, k, v, w, u (empty unless needed: it is a sum over all tokens) and state."""
    x = Inputs(r, k, v, w, u, state)
    if kernels := recurrence.native_kernels(r, cu_seqlens, form):
        return Inputs(**kernels.backward(dy, dstate, x, cu_seqlens, need_du))
    if plan := recurrence.plan(r, cu_seqlens):
        gradients = wkv6_chunked.backward(dy, dstate, x, plan)
    else:
        gradients = Inputs(*map(torch.zeros_like, x))._replace(state=dstate.to(state.dtype, copy=True))
    return gradients if need_du else gradients._replace(u=u.new_empty(0))


wkv6_backward.register_fake(
    lambda dy, dstate, r, k, v, w, u, state, cu_seqlens, need_du, form: (
        *(x.new_empty(x.shape) for x in (r, k, v, w)),
        u.new_empty(u.shape if need_du else (0,)),
        state.new_empty(state.shape),
    )
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.form = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    grads = wkv6_backward(dy, dstate, *ctx.saved_tensors, ctx.needs_input_grad[4], ctx.form)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None


wkv6_forward, _wkv6 = recurrence.define(
    "wkv6",
    _forward,
    lambda r, k, v, w, u, state, cu_seqlens, form: (r.new_empty(r.shape), state.new_empty(state.shape)),
    _save,
    _gradients,
)


def wkv6_step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, form: str = "auto") -> Tensor:
    """One token of each of B slots, for decoding: y (B, H, N); `state` (B, H, N, N) float32 is updated in place.

    r, k, v, w (B, H, N), u (H, N). No gradients. Raises ValueError for shapes that do not fit, and for a state that
    is not dense float32 (float64 for float64 inputs).
    """
    recurrence.check_step("wkv6_step", r, {"k": k, "v": v, "w": w, "u": u}, state)
    y: Tensor = _wkv6_step(r, k, v, w, u, state, form)
    return y


def _step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, form: str) -> Tensor:
    """The operator on checked arguments."""
    return recurrence.step(Inputs(r, k, v, w, u, state), form, wkv6_chunked.forward)


_, _wkv6_step = recurrence.define("wkv6_step", _step, lambda r, *_: r.new_empty(r.shape), changes=("state",))
