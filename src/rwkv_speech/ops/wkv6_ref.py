"""The definition of WKV-6, step by step: slow, readable, differentiable; all other forms answer to it."""

# B batch · T time · H heads · N head size

import itertools

import torch
from torch import Tensor


def wkv6_ref(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same signature and result as `wkv6`, computed in float32 (float64 for float64 inputs).

    Source: RWKV-6, Peng et al. 2024 (arXiv:2404.05892), equations 16 to 18.
    """
    if cu_seqlens is not None:
        return _packed_ref(r, k, v, w, u, state, cu_seqlens)
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    B, _, H, N = r.shape
    rows = [x.to(dtype).unbind(1) for x in (r, k, v, w)]
    bonus = u.to(dtype)
    s = torch.zeros(B, H, N, N, dtype=dtype, device=r.device) if state is None else state.to(dtype).clone()
    y = []
    for r_t, k_t, v_t, w_t in zip(*rows, strict=True):
        value_key = v_t[..., :, None] * k_t[..., None, :]
        y.append(((s + bonus[:, None, :] * value_key) @ r_t[..., None])[..., 0])
        s = s * torch.exp(-torch.exp(w_t))[..., None, :] + value_key
    return (torch.stack(y, 1) if y else torch.zeros_like(r, dtype=dtype)).to(r.dtype), s


def _packed_ref(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    bounds = cu_seqlens.tolist()
    parts = [
        wkv6_ref(r[:, a:b], k[:, a:b], v[:, a:b], w[:, a:b], u, None if state is None else state[i : i + 1])
        for i, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    return torch.cat([y for y, _ in parts], 1), torch.cat([s for _, s in parts], 0)
