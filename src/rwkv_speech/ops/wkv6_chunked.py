"""WKV-6 in chunks of a few tokens, with plain PyTorch on any device: forward and backward.

Inside a chunk, c_i is the sum of the log decays before token i. Then, with S the state at the chunk's start,

    y_i = S (r_i e^{c_i}) + sum_{j<i} (r_i . k_j e^{c_i - c_{j+1}}) v_j + (r_i . u k_i) v_i
    S'  = S diag(e^{c_L}) + sum_j v_j (k_j e^{c_L - c_{j+1}})^T

so that a chunk costs matrix products, and only the states at the chunks' starts are computed one after another.
"""

# B batch · T time · H heads · N head size · L chunk length · G chunks (one after another)

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 8
# Both factors of e^{c_i - c_{j+1}} are taken around the middle of the chunk and must stay inside float32's range:
# 8 tokens of at most 16 leave e^{+-64}. e^-16 is float32's epsilon, so the bound changes no result.
MAX_LOG_DECAY = 16.0


class _Chunks(NamedTuple):
    """The inputs in chunks, (B, H, G, L, N), and the decays between their tokens."""

    r: Tensor
    k: Tensor
    v: Tensor
    from_start: Tensor  # e^{c_i}
    to_end: Tensor  # e^{c_L - c_{j+1}}
    total: Tensor  # e^{c_L}, (B, H, G, N)
    r_mid: Tensor  # e^{c_i - middle}
    k_mid: Tensor  # e^{middle - c_{j+1}}


def _to_chunks(x: Tensor, dtype: torch.dtype) -> Tensor:
    B, T, H, N = x.shape
    G = -(-T // CHUNK)
    x = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, 0, 0, G * CHUNK - T))
    return x.view(B, G, CHUNK, H, N).permute(0, 3, 1, 2, 4).contiguous()


def _from_chunks(x: Tensor, T: int) -> Tensor:
    B, H, G, L, N = x.shape
    return x.permute(0, 2, 3, 1, 4).reshape(B, G * L, H, N)[:, :T]


def _prepare(r: Tensor, k: Tensor, v: Tensor, w: Tensor, dtype: torch.dtype) -> _Chunks:
    log_decay = -torch.exp(w.to(dtype)).clamp(max=MAX_LOG_DECAY)
    # Zero log decay in the padding keeps the state as it is.
    log_decay = _to_chunks(log_decay, dtype)
    after = log_decay.cumsum(-2)
    before = after - log_decay
    middle, end = before[..., CHUNK // 2, :].unsqueeze(-2), after[..., -1, :].unsqueeze(-2)
    return _Chunks(
        *(_to_chunks(x, dtype) for x in (r, k, v)),
        from_start=before.exp(),
        to_end=(end - after).exp(),
        total=end.squeeze(-2).exp(),
        r_mid=(before - middle).exp(),
        k_mid=(middle - after).exp(),
    )


def _scores(c: _Chunks, bonus: Tensor, causal: Tensor) -> Tensor:
    """(B, H, G, L, L): strictly below the diagonal the decayed r . k, on it r . u k."""
    scores = (c.r * c.r_mid) @ (c.k * c.k_mid).transpose(-1, -2)
    # Selected, not multiplied: above the diagonal the product may overflow.
    scores = torch.where(causal, scores, 0.0)
    return scores + torch.diag_embed((c.r * bonus * c.k).sum(-1))


def _start_states(c: _Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk, (B, H, G, N, N), and the state after the last."""
    added = c.v.transpose(-1, -2) @ (c.k * c.to_end)
    starts = torch.empty_like(added)
    state = state.clone()
    for g in range(added.shape[2]):
        starts[:, :, g] = state
        state = torch.addcmul(added[:, :, g], state, c.total[:, :, g, None, :])
    return starts, state


def _causal(device: torch.device) -> Tensor:
    return torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=device).tril(-1)


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, T, H, N) in r's type and the state after the last token (B, H, N, N) in `state`'s."""
    c = _prepare(r, k, v, w, state.dtype)
    scores = _scores(c, u.to(state.dtype)[None, :, None, None, :], _causal(r.device))
    starts, last = _start_states(c, state)
    y = scores @ c.v + (c.r * c.from_start) @ starts.transpose(-1, -2)
    return _from_chunks(y, r.shape[1]).to(r.dtype).contiguous(), last


def backward(
    dy: Tensor, dstate: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, k, v, w, u and the initial state, in the types of the inputs."""
    dtype = state.dtype
    T = r.shape[1]
    c = _prepare(r, k, v, w, dtype)
    bonus, causal = u.to(dtype)[None, :, None, None, :], _causal(r.device)
    starts, last = _start_states(c, state)
    g_y = _to_chunks(dy, dtype)

    # Backwards over the chunks: the gradient of the state after each, ending with that of the initial state.
    added = g_y.transpose(-1, -2) @ (c.r * c.from_start)
    g_after = torch.empty_like(starts)
    g_state = dstate.to(dtype, copy=True)
    for g in range(starts.shape[2] - 1, -1, -1):
        g_after[:, :, g] = g_state
        g_state = torch.addcmul(added[:, :, g], g_state, c.total[:, :, g, None, :])

    g_scores = g_y @ c.v.transpose(-1, -2)
    g_diagonal = torch.diagonal(g_scores, dim1=-2, dim2=-1).unsqueeze(-1)
    g_scores = torch.where(causal, g_scores, 0.0)
    g_r = c.r_mid * (g_scores @ (c.k * c.k_mid)) + c.from_start * (g_y @ starts)
    g_k = c.k_mid * (g_scores.transpose(-1, -2) @ (c.r * c.r_mid)) + c.to_end * (c.v @ g_after)
    g_v = _scores(c, bonus, causal).transpose(-1, -2) @ g_y + (c.k * c.to_end) @ g_after.transpose(-1, -2)

    # Log decay of token t: everything that is read after t, less what was written after t, plus what leaves the
    # chunk in its state. Sums restart at every chunk, so they cannot cancel over a long sequence.
    after = torch.cat((starts[:, :, 1:], last[:, :, None]), 2)
    leaving = (g_after * after).sum(-2, keepdim=True)
    read, written = c.r * g_r, c.k * g_k
    g_log_decay = _suffix_sum(read) - read - _suffix_sum(written) + leaving

    g_u = (g_diagonal * c.r * c.k).sum((0, 2, 3))
    g_r, g_k = g_r + g_diagonal * bonus * c.k, g_k + g_diagonal * bonus * c.r
    rate = torch.exp(w.to(dtype))
    g_w = torch.where(rate < MAX_LOG_DECAY, -rate * _from_chunks(g_log_decay, T), 0.0)
    g_r, g_k, g_v = (_from_chunks(g, T) for g in (g_r, g_k, g_v))
    return g_r.to(r.dtype), g_k.to(k.dtype), g_v.to(v.dtype), g_w.to(w.dtype), g_u.to(u.dtype), g_state


def _suffix_sum(x: Tensor) -> Tensor:
    """Sum over the chunk's tokens from each token to the last, (B, H, G, L, N)."""
    return x.flip(-2).cumsum(-2).flip(-2)
