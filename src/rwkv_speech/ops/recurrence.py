"""What WKV-6 and WKV-7 share around their forms: checks of arguments, bounds, the choice of a form."""

# B batch · T time · H heads · N head size · S sequences of a packed batch

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from rwkv_speech.ops import chunks, native
from rwkv_speech.ops.native import Inputs


def check(op: str, r: Tensor, others: Mapping[str, Tensor], state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The state in the type of all sums, zeros for None; raises ValueError for tensors that do not fit r (B, T, H, N).

    The others are of r's shape, but for the bonus u (H, N); the state is (B or S, H, N, N).
    """
    if r.dim() != 4:
        raise ValueError(f"{op}: r must be (B, T, H, N), found {tuple(r.shape)}")
    B, _, H, N = r.shape
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point()):
        raise ValueError(f"{op}: cu_seqlens must be a vector of integers, one more than there are sequences")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"{op}: a packed batch has B = 1, found B = {B}")
    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state is None:
        state = torch.zeros(sequences, H, N, N, dtype=dtype, device=r.device)
    _fits(op, r, others, state, sequences)
    return state if state.dtype == dtype else state.to(dtype)


def check_step(op: str, r: Tensor, others: Mapping[str, Tensor], state: Tensor) -> None:
    """Raises ValueError unless all fit r (B, H, N) and the state can be updated in place."""
    if r.dim() != 3:
        raise ValueError(f"{op}: r must be (B, H, N), found {tuple(r.shape)}")
    _fits(op, r, others, state, r.size(0))
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state.dtype != dtype or not state.is_contiguous():
        raise ValueError(f"{op}: state must be dense {dtype}, found {state.dtype} with strides {state.stride()}")


def _fits(op: str, r: Tensor, others: Mapping[str, Tensor], state: Tensor, sequences: int) -> None:
    shape, device = r.shape, r.device
    H, N = shape[-2:]
    for name, x in others.items():
        if x.shape != (shape if name != "u" else (H, N)) or x.device != device:
            _refuse(op, name, x, shape if name != "u" else (H, N), r)
    if state.shape != (sequences, H, N, N) or state.device != device:
        _refuse(op, "state", state, (sequences, H, N, N), r)


def _refuse(op: str, name: str, x: Tensor, shape: tuple[int, ...], r: Tensor) -> NoReturn:
    if x.shape != shape:
        raise ValueError(f"{op}: {name} must be {tuple(shape)} to fit r {tuple(r.shape)}, found {tuple(x.shape)}")
    raise ValueError(f"{op}: {name} must be on r's device {r.device}, found {x.device}")


def define(
    op: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    gradients: Callable[..., Any],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator `op` of a function whose results are new tensors, and the same without gradients.

    `fake` gives results of the right shapes, `save` and `gradients` are what `register_autograd` takes. Less is done
    around such an operator than by `custom_op`, and less again without autograd: each spares a call 14 microseconds,
    more than its Python needs beside.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    for name in (f"rwkv_speech::{op}", f"rwkv_speech::{op}.untracked"):
        torch.library.define(name, schema)
        torch.library.impl(name, "default")(function)
        torch.library.register_fake(name)(fake)
    torch.library.register_autograd(f"rwkv_speech::{op}", gradients, setup_context=save)
    overloads = getattr(torch.ops.rwkv_speech, op)
    return overloads.default, overloads.untracked


def tracked(*tensors: Tensor) -> bool:
    """Whether autograd is to give any of them a gradient."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def define_step(op: str, inputs: type[Inputs], portable: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """An operator of one token of each slot on checked arguments, those of `inputs` and the kernel's form.

    `portable` is the chunked form's forward pass. Less is done around an operator that is defined this way than by
    `custom_op`: a tenth of the time of a call.
    """
    name = f"rwkv_speech::{op}"
    tensors = ", ".join(f"Tensor{'(a!)' if field == 'state' else ''} {field}" for field in inputs._fields)
    torch.library.define(name, f"({tensors}, str form) -> Tensor")

    @torch.library.impl(name, "default")
    def step(*arguments: Any) -> Tensor:
        x = inputs._make(arguments[:-1])
        if kernels := native.kernels_for(x.r, arguments[-1]):
            return kernels.step(x)
        tokens = inputs(*(part[:, None] if part.dim() == 3 else part for part in x))
        y, last = portable(tokens, chunks.plan_dense(len(x.r), 1))
        x.state.copy_(last)
        return y[:, 0]

    torch.library.register_fake(name)(lambda r, *_: r.new_empty(r.shape))
    operator: Callable[..., Tensor] = getattr(torch.ops.rwkv_speech, op).default
    return operator


def native_kernels(r: Tensor, cu_seqlens: Tensor | None, form: str) -> native.Kernels | None:
    """The kernels that serve; raises ValueError for bounds that do not rise from 0 to T, which are read on a CPU."""
    kernels = native.kernels_for(r, form)
    if kernels is not None and r.device.type == "cpu":
        _bounds(r, cu_seqlens)
    return kernels


def plan(r: Tensor, cu_seqlens: Tensor | None) -> chunks.Plan | None:
    """How the portable form walks over the tokens; None if there are none. Raises ValueError as `native_kernels`."""
    bounds = _bounds(r, cu_seqlens)
    if r.numel() == 0:
        return None
    if bounds is None:
        return chunks.plan_dense(*r.shape[:2])
    return chunks.plan_packed(tuple(b - a for a, b in itertools.pairwise(bounds)), r.device)


def _bounds(r: Tensor, cu_seqlens: Tensor | None) -> list[int] | None:
    if cu_seqlens is None:
        return None
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != r.shape[1] or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {r.shape[1]}, found {bounds}")
    return bounds
