"""What WKV-6 and WKV-7 share around their forms: checks of arguments, bounds, the choice of a form."""

# B batch · T time · H heads · N head size · S sequences of a packed batch

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rwkv_speech.ops import chunks, native
from rwkv_speech.ops.native import Inputs

_PLAIN = {Tensor, nn.Parameter, type(None), str}  # a subclass, as a fake tensor, means that somebody looks on


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
    save: Callable[..., None] | None = None,
    gradients: Callable[..., Any] | None = None,
    changes: tuple[str, ...] = (),
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator `op` of a function, and a call that takes it only where somebody looks on.

    `fake` gives results of the right shapes, `save` and `gradients` are what `register_autograd` takes, `changes` names
    the tensors that the function writes to. The operator is what autograd, compilers and modes see; where none of them
    is there the call is the function itself, which spares ten microseconds, as much as a step's Python needs.
    """
    name = f"rwkv_speech::{op}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=changes))
    torch.library.impl(name, "default")(function)
    torch.library.register_fake(name)(fake)
    if gradients:
        torch.library.register_autograd(name, gradients, setup_context=save)
    operator: Callable[..., Any] = getattr(torch.ops.rwkv_speech, op).default

    def call(*arguments: Any) -> Any:
        return (operator if _observed(arguments) else function)(*arguments)

    return operator, call


def _observed(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd, a compiler or a mode must see what is done with these tensors, or they have no values."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or arguments[0].is_meta:
        return True
    if not _PLAIN.issuperset(map(type, arguments)):
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def step(x: Inputs, form: str, portable: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """One token of each slot on checked arguments; `portable` is the chunked form's forward pass."""
    if kernels := native.kernels_for(x.r, form):
        return kernels.step(x)
    tokens: Inputs = type(x)(*(part[:, None] if part.dim() == 3 else part for part in x))
    y, last = portable(tokens, chunks.plan_dense(len(x.r), 1))
    x.state.copy_(last)
    return y[:, 0]


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
