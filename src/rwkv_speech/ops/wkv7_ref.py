"""The definition of WKV-7, step by step: slow, readable, differentiable; all other forms answer to it."""

# B batch · T time · H heads · N head size

import itertools

import torch
from torch import Tensor


def wkv7_ref(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same signature and result as `wkv7`, computed in float32 (float64 for float64 inputs).

    Source: RWKV-7, Peng et al. 2025 (arXiv:2503.14456), section 3.
    """
    if cu_seqlens is not None:
        parts = []
        for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            now = slice(start, end)
            before = None if state is None else state[i : i + 1]
            parts.append(wkv7_ref(r[:, now], w[:, now], k[:, now], v[:, now], a[:, now], b[:, now], before))
        return torch.cat([y for y, _ in parts], 1), torch.cat([s for _, s in parts], 0)
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    B, _, H, N = r.shape
    rows = [x.to(dtype).unbind(1) for x in (r, w, k, v, a, b)]
    s = torch.zeros(B, H, N, N, dtype=dtype, device=r.device) if state is None else state.to(dtype).clone()
    y = []
    for r_t, w_t, k_t, v_t, a_t, b_t in zip(*rows, strict=True):
        removed = (s @ a_t[..., None]) * b_t[..., None, :]
        s = s * torch.exp(-torch.exp(w_t))[..., None, :] + removed + v_t[..., :, None] * k_t[..., None, :]
        y.append((s @ r_t[..., None])[..., 0])
    return (torch.stack(y, 1) if y else torch.zeros_like(r, dtype=dtype)).to(r.dtype), s
