"""What WKV-6 and WKV-7 share around their forms: checks of arguments, bounds, the choice of a form."""

# B batch · T time · H heads · N head size · S sequences of a packed batch

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_speech.ops import chunks, native


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
    wanted = {name: (x, (H, N) if name == "u" else r.shape) for name, x in others.items()}
    _fits(op, r, wanted if state is None else {**wanted, "state": (state, (sequences, H, N, N))})
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state is None:
        return torch.zeros(sequences, H, N, N, dtype=dtype, device=r.device)
    return state.to(dtype)


def check_step(op: str, r: Tensor, others: Mapping[str, Tensor], state: Tensor) -> None:
    """Raises ValueError unless all fit r (B, H, N) and the state can be updated in place."""
    if r.dim() != 3:
        raise ValueError(f"{op}: r must be (B, H, N), found {tuple(r.shape)}")
    B, H, N = r.shape
    _fits(
        op, r, {**{n: (x, (H, N) if n == "u" else r.shape) for n, x in others.items()}, "state": (state, (B, H, N, N))}
    )
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state.dtype != dtype or not state.is_contiguous():
        raise ValueError(f"{op}: state must be dense {dtype}, found {state.dtype} with strides {state.stride()}")


def _fits(op: str, r: Tensor, wanted: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    device = r.device
    for name, (x, shape) in wanted.items():
        if x.shape != shape:
            raise ValueError(f"{op}: {name} must be {tuple(shape)} to fit r {tuple(r.shape)}, found {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(f"{op}: {name} must be on r's device {device}, found {x.device}")


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
