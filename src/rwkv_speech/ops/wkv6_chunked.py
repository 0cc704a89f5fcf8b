"""WKV-6 with plain PyTorch on any device: forward and backward, in chunks of a few tokens.

Token j reaches a later token i through the decays between them: y_i takes (r_i . d_{j+1} ... d_{i-1} k_j) v_j, summed
over all pairs of a chunk as chunks.py says. From chunk to chunk goes the state, S <- S diag(d_1 ... d_L) + V^T K.
"""

# B batch · T time · H heads · N head size · S sequences · L chunk length
# C chunks of all sequences and heads

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_speech.ops.chunks import (
    LOG2_E,
    MAX_RATE,
    Plan,
    add_mix,
    carry,
    climb,
    decay_rate,
    descend,
    dots,
    from_chunks,
    halves,
    head_groups,
    in_input_order,
    in_order,
    spans,
    steps,
    to_chunks,
    widen,
)


class Inputs(NamedTuple):
    """The tensors of the operator, or their gradients."""

    r: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    u: Tensor
    state: Tensor

    def heads(self, group: slice) -> "Inputs":
        """Some of the heads, as views."""
        r, k, v, w = (x[:, :, group] for x in self[:4])
        return Inputs(r, k, v, w, self.u[group], self.state[:, group])


def forward(x: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """y (B, T, H, N) in r's type and the last states (S, H, N, N) in `state`'s, the type of all sums."""
    if plan.length == 1 and not plan.packed:
        return _step(*x)
    y, last = x.r.new_empty(x.r.shape), x.state.new_empty(x.state.shape)
    for group in head_groups(x.r, plan):
        _forward(x.heads(group), plan, y[:, :, group], last[:, group])
    return y, last


def _forward(x: Inputs, plan: Plan, y_out: Tensor, last_out: Tensor) -> None:
    dtype, H, L, N = x.state.dtype, x.r.shape[2], plan.length, x.r.shape[3]
    r, k, v = (to_chunks(part, plan, dtype) for part in (x.r, x.k, x.v))
    total = decay_rate(to_chunks(x.w, plan, dtype, -torch.inf)).mul_(-LOG2_E).exp2_()
    y = r * k
    bonus = y.view(-1, H, L, N).mul_(x.u.to(dtype)[:, None]).sum(-1).view(-1, L, 1)
    torch.mul(bonus, v, out=y)
    for h in spans(L):
        (k_earlier, _), (_, r_later) = halves(k, h), halves(r, h)
        add_mix(halves(y, h)[1], dots(r_later, k_earlier), halves(v, h)[0])
        total = widen(r_later, k_earlier, total)
    total, last = total.view(-1, 1, N), in_order(x.state, plan)
    for chunks, before in carry(v, k, total, last, steps(plan, H)):
        y[chunks].baddbmm_(r[chunks], before.transpose(1, 2))
    from_chunks(y, plan, y_out)
    in_input_order(last, plan, last_out)


def _step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`forward` for one token in each sequence."""
    r_t, k_t, v_t, w_t = (x[:, 0].to(state.dtype) for x in (r, k, v, w))
    y = (state @ r_t[..., None])[..., 0] + (r_t * u.to(state.dtype) * k_t).sum(-1, keepdim=True) * v_t
    last = (state * torch.exp(-torch.exp(w_t))[..., None, :]).addcmul_(v_t[..., :, None], k_t[..., None, :])
    return y.to(r.dtype)[:, None], last


def backward(dy: Tensor, dstate: Tensor, x: Inputs, plan: Plan) -> Inputs:
    """The gradients, in the types of the inputs."""
    gradients = Inputs(*(part.new_empty(part.shape) for part in x))
    for group in head_groups(x.r, plan):
        _backward(dy[:, :, group], dstate[:, group], x.heads(group), plan, gradients.heads(group))
    return gradients


def _backward(dy: Tensor, dstate: Tensor, x: Inputs, plan: Plan, out: Inputs) -> None:
    dtype, H = x.state.dtype, x.r.shape[2]
    r, k, v, g_y = (to_chunks(part, plan, dtype) for part in (x.r, x.k, x.v, dy))
    rate = decay_rate(to_chunks(x.w, plan, dtype, -torch.inf))
    levels, r_start, k_end, total = climb(r, k, torch.mul(rate, -LOG2_E).exp2_())
    starts = r.new_empty(len(r), *x.state.shape[2:])
    for chunks, before in carry(v, k_end, total, in_order(x.state, plan), steps(plan, H)):
        starts[chunks] = before

    g_r = torch.bmm(g_y, starts)
    g_k, g_v, g_log = (torch.empty_like(part) for part in (k, v, r))
    g_state = in_order(dstate.to(dtype), plan)
    for chunks, g_after in carry(g_y, r_start, total, g_state, reversed(steps(plan, H))):
        torch.bmm(v[chunks], g_after, out=g_k[chunks])
        torch.bmm(k_end[chunks], g_after.transpose(1, 2), out=g_v[chunks])
        # The state passes through the whole chunk; what else the decays carry, each level adds.
        g_log[chunks] = (starts[chunks] * g_after).sum(1, keepdim=True) * total[chunks]
    in_input_order(g_state, plan, out.state)
    for level in reversed(levels):
        descend(level, g_y, v, g_r, g_k, g_v, g_log)
    out.u.copy_(_add_bonus_gradients(r, k, v, x.u.to(dtype), g_y, g_r, g_k, g_v))

    # log d = -exp(w) is its own derivative by w.
    g_w = g_log.mul_(rate.clamp_(max=MAX_RATE).neg_())
    for gradient, part in zip((g_r, g_k, g_v, g_w), out, strict=False):
        from_chunks(gradient, plan, part)


def _add_bonus_gradients(
    r: Tensor, k: Tensor, v: Tensor, u: Tensor, g_y: Tensor, g_r: Tensor, g_k: Tensor, g_v: Tensor
) -> Tensor:
    """Adds what (r . u k) v gives to the gradients of r, k and v; returns that of u."""
    H, N = u.shape
    by_head = (-1, H, r.shape[1], N)
    rk = r * k
    g_bonus = (g_y * v).sum(-1, keepdim=True)
    g_v.addcmul_((rk.view(by_head) * u[:, None]).sum(-1).view(*r.shape[:2], 1), g_y)
    g_u = rk.mul_(g_bonus).view(by_head).sum((0, 2))
    g_rk = (g_bonus.view(-1, H, r.shape[1], 1) * u[:, None]).view(r.shape)
    g_r.addcmul_(g_rk, k)
    g_k.addcmul_(g_rk, r)
    return g_u
