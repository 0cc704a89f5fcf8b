"""WKV-6 with plain PyTorch on any device: forward and backward, in chunks of a few tokens.

Token j reaches a later token i through the decays between them: y_i takes (r_i . d_{j+1} ... d_{i-1} k_j) v_j.
Every such pair is met once, where a span of 2h tokens is split in halves with j in the earlier one, i in the
later one. The decays factor at the middle, r_i's since the middle and k_j's up to the middle, so that all pairs
of a span are matrix products. The spans double from two tokens to the chunk; from chunk to chunk goes the
state, S <- S diag(d_1 ... d_L) + V^T K. All factors are products of decays, numbers from 0 to 1: nothing
overflows or cancels, however strong the decay.
"""

# B batch · T time · H heads · N head size · S sequences · L chunk length
# C chunks of all sequences and heads · P spans of 2h tokens

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_CHUNK = 16
_GROUP = 1 << 20  # elements of a tensor: a few such tensors fit the caches of common CPUs
# e^-1000 is zero in every type: the bound makes the gradient of such a decay 0, where 0 * inf would be NaN.
_MAX_RATE = 1000.0
_LOG2_E = math.log2(math.e)


class Plan(NamedTuple):
    """Where tokens go. Chunks stand in the recurrence's order: every sequence's first, then the second ones ..."""

    length: int  # L
    active: list[int]  # how many sequences have a first chunk, a second chunk ...
    packed: "Packed | None"


class Packed(NamedTuple):
    """For sequences of different lengths, which are then taken longest first."""

    order: Tensor  # (S,) sequences, longest first
    tokens: Tensor  # the token in each slot of each chunk
    padding: Tensor  # the slots without a token
    slots: Tensor  # (T,) the slot of each token


@functools.lru_cache(maxsize=8)  # every layer of a model asks for the same plan, forwards and backwards
def plan_packed(lengths: tuple[int, ...], device: torch.device) -> Plan:
    """For a packed batch whose sequences have these lengths."""
    L = _chunk_length(max(lengths))
    active = [sum(n > start for n in lengths) for start in range(0, max(lengths), L)]
    n = torch.tensor(lengths)
    order = n.argsort(descending=True, stable=True)
    rank = order.argsort().repeat_interleave(n)
    token = torch.arange(sum(lengths))
    place = token - (n.cumsum(0) - n).repeat_interleave(n)
    first_chunk = torch.tensor([0, *active]).cumsum(0)
    slots = (first_chunk[place // L] + rank) * L + place % L
    tokens = torch.full((int(first_chunk[-1]) * L,), -1).index_copy(0, slots, token)
    padding = (tokens < 0).nonzero()[:, 0]
    return Plan(L, active, Packed(*(x.to(device) for x in (order, tokens.clamp(min=0), padding, slots))))


def plan_dense(B: int, T: int) -> Plan:
    """For B sequences of T tokens."""
    L = _chunk_length(T)
    return Plan(L, [B] * -(-T // L), None)


def _chunk_length(longest: int) -> int:
    return min(MAX_CHUNK, 1 << (longest - 1).bit_length())


def _to_chunks(x: Tensor, plan: Plan, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """(B, T, H, N) -> (C, L, N), `fill` in the slots without a token."""
    B, T, H, N = x.shape
    L, packed = plan.length, plan.packed
    chunks = torch.empty(sum(plan.active), H, L, N, dtype=dtype, device=x.device)
    if packed:
        x = x.reshape(T, H, N).index_select(0, packed.tokens).index_fill_(0, packed.padding, fill)
        chunks.copy_(x.view(-1, L, H, N).transpose(1, 2))
    else:
        whole, rest = divmod(T, L)
        by_step = chunks.view(-1, B, H, L, N)
        by_step[:whole] = x[:, : whole * L].unflatten(1, (whole, L)).permute(1, 0, 3, 2, 4)
        if rest:
            by_step[-1, :, :, :rest] = x[:, whole * L :].transpose(1, 2)
            by_step[-1, :, :, rest:] = fill
    return chunks.view(-1, L, N)


def _from_chunks(chunks: Tensor, plan: Plan, out: Tensor) -> None:
    """(C, L, N) -> `out` (B, T, H, N)."""
    B, T, H, N = out.shape
    L, packed = plan.length, plan.packed
    if packed:
        by_slot = chunks.view(-1, H, L, N).transpose(1, 2).reshape(-1, H, N)
        out[0] = by_slot.index_select(0, packed.slots)
        return
    whole, rest = divmod(T, L)
    by_step = chunks.view(-1, B, H, L, N)
    out[:, : whole * L].unflatten(1, (whole, L)).copy_(by_step[:whole].permute(1, 0, 3, 2, 4))
    if rest:
        out[:, whole * L :] = by_step[-1, :, :, :rest].transpose(1, 2)


def _in_order(state: Tensor, plan: Plan) -> Tensor:
    """A copy of the states, in the order of the chunks."""
    return state[plan.packed.order] if plan.packed else state.clone(memory_format=torch.contiguous_format)


def _in_input_order(state: Tensor, plan: Plan, out: Tensor) -> None:
    if plan.packed:
        out[plan.packed.order] = state
    else:
        out.copy_(state)


def _head_groups(r: Tensor, plan: Plan) -> list[slice]:
    """The heads in groups; on a CPU one group's tensors should stay in its caches."""
    H, N = r.shape[2:]
    size = H if r.is_cuda else max(1, _GROUP // (sum(plan.active) * plan.length * N))
    return [slice(i, min(i + size, H)) for i in range(0, H, size)]


def _halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """The earlier and the later half of all spans of 2h tokens, each (P, h, N)."""
    earlier, later = x.view(-1, 2, h, x.shape[-1]).unbind(1)
    return earlier, later


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """a (P, h, N) @ b (P, h, N)^T; a few tokens are faster without the matrix product."""
    return torch.bmm(a, b.transpose(1, 2)) if a.shape[1] > 2 else (a[:, :, None] * b[:, None]).sum(-1)


def _add_mix(y: Tensor, scores: Tensor, x: Tensor) -> None:
    """y (P, h, N) += scores (P, h, h) @ x (P, h, N); a few tokens are faster without the matrix product."""
    h = x.shape[1]
    if h > 2:
        y.add_(torch.bmm(scores, x))
        return
    for j in range(h):
        y.addcmul_(scores[:, :, j : j + 1], x[:, j : j + 1])


def _spans(length: int) -> list[int]:
    """1, 2, 4 ... up to half the chunk."""
    return [1 << i for i in range(length.bit_length() - 1)]


def _rate(w: Tensor) -> Tensor:
    """exp(w), in place; on a CPU exp2 beats exp threefold."""
    return w.mul_(_LOG2_E).exp2_()


def _steps(plan: Plan, H: int) -> list[tuple[slice, int]]:
    """The chunks of each step of the recurrence and how many sequences they belong to."""
    ends = list(itertools.accumulate(plan.active))
    return [(slice((end - n) * H, end * H), n) for end, n in zip(ends, plan.active, strict=True)]


def _carry(
    a: Tensor, b: Tensor, total: Tensor, state: Tensor, steps: Iterable[tuple[slice, int]]
) -> Iterator[tuple[slice, Tensor]]:
    """Each step's chunks and the states before them; then, in place, state <- state diag(total) + a^T b."""
    N = state.shape[-1]
    for chunks, sequences in steps:
        now = state[:sequences].view(-1, N, N)
        yield chunks, now
        now.mul_(total[chunks]).baddbmm_(a[chunks].transpose(1, 2), b[chunks])


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
    for group in _head_groups(x.r, plan):
        _forward(x.heads(group), plan, y[:, :, group], last[:, group])
    return y, last


def _forward(x: Inputs, plan: Plan, y_out: Tensor, last_out: Tensor) -> None:
    dtype, H, L, N = x.state.dtype, x.r.shape[2], plan.length, x.r.shape[3]
    r, k, v = (_to_chunks(part, plan, dtype) for part in (x.r, x.k, x.v))
    total = _rate(_to_chunks(x.w, plan, dtype, -torch.inf)).mul_(-_LOG2_E).exp2_()
    y = r * k
    bonus = y.view(-1, H, L, N).mul_(x.u.to(dtype)[:, None]).sum(-1).view(-1, L, 1)
    torch.mul(bonus, v, out=y)
    for h in _spans(L):
        (k_earlier, _), (_, r_later) = _halves(k, h), _halves(r, h)
        _add_mix(_halves(y, h)[1], _dots(r_later, k_earlier), _halves(v, h)[0])
        total = _widen(r_later, k_earlier, total)
    total, last = total.view(-1, 1, N), _in_order(x.state, plan)
    for chunks, before in _carry(v, k, total, last, _steps(plan, H)):
        y[chunks].baddbmm_(r[chunks], before.transpose(1, 2))
    _from_chunks(y, plan, y_out)
    _in_input_order(last, plan, last_out)


def _widen(r_later: Tensor, k_earlier: Tensor, total: Tensor) -> Tensor:
    """From decays as of each span's middle to decays as of its ends, in place; returns the whole spans'."""
    total_earlier, total_later = _halves(total, 1)
    r_later *= total_earlier
    k_earlier *= total_later
    return total_earlier * total_later


def _step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`forward` for one token in each sequence."""
    r_t, k_t, v_t, w_t = (x[:, 0].to(state.dtype) for x in (r, k, v, w))
    y = (state @ r_t[..., None])[..., 0] + (r_t * u.to(state.dtype) * k_t).sum(-1, keepdim=True) * v_t
    last = (state * torch.exp(-torch.exp(w_t))[..., None, :]).addcmul_(v_t[..., :, None], k_t[..., None, :])
    return y.to(r.dtype)[:, None], last


def backward(dy: Tensor, dstate: Tensor, x: Inputs, plan: Plan) -> Inputs:
    """The gradients, in the types of the inputs."""
    gradients = Inputs(*(part.new_empty(part.shape) for part in x))
    for group in _head_groups(x.r, plan):
        _backward(dy[:, :, group], dstate[:, group], x.heads(group), plan, gradients.heads(group))
    return gradients


def _backward(dy: Tensor, dstate: Tensor, x: Inputs, plan: Plan, out: Inputs) -> None:
    dtype, H = x.state.dtype, x.r.shape[2]
    r, k, v, g_y = (_to_chunks(part, plan, dtype) for part in (x.r, x.k, x.v, dy))
    rate = _rate(_to_chunks(x.w, plan, dtype, -torch.inf))
    levels, r_start, k_end, total = _climb(r, k, torch.mul(rate, -_LOG2_E).exp2_())
    starts = r.new_empty(len(r), *x.state.shape[2:])
    for chunks, before in _carry(v, k_end, total, _in_order(x.state, plan), _steps(plan, H)):
        starts[chunks] = before

    g_r = torch.bmm(g_y, starts)
    g_k, g_v, g_log = (torch.empty_like(part) for part in (k, v, r))
    g_state = _in_order(dstate.to(dtype), plan)
    for chunks, g_after in _carry(g_y, r_start, total, g_state, reversed(_steps(plan, H))):
        torch.bmm(v[chunks], g_after, out=g_k[chunks])
        torch.bmm(k_end[chunks], g_after.transpose(1, 2), out=g_v[chunks])
        # The state passes through the whole chunk; what else the decays carry, each level adds.
        g_log[chunks] = (starts[chunks] * g_after).sum(1, keepdim=True) * total[chunks]
    _in_input_order(g_state, plan, out.state)
    for level in reversed(levels):
        _descend(level, g_y, v, g_r, g_k, g_v, g_log)
    out.u.copy_(_add_bonus_gradients(r, k, v, x.u.to(dtype), g_y, g_r, g_k, g_v))

    # log d = -exp(w) is its own derivative by w.
    g_w = g_log.mul_(rate.clamp_(max=_MAX_RATE).neg_())
    for gradient, part in zip((g_r, g_k, g_v, g_w), out, strict=False):
        _from_chunks(gradient, plan, part)


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


class _Level(NamedTuple):
    """The two halves of all spans of 2h tokens."""

    r_later: Tensor  # (P, h, N) decayed since the middle
    k_earlier: Tensor  # (P, h, N) decayed up to the middle
    total_earlier: Tensor  # (P, 1, N) the decay over the earlier half
    total_later: Tensor  # (P, 1, N)


def _climb(r: Tensor, k: Tensor, decay: Tensor) -> tuple[list[_Level], Tensor, Tensor, Tensor]:
    """All levels, narrowest first; r decayed since its chunk's start, k up to its end; the whole chunk's decay."""
    levels, r, k, total = [], r.clone(), k.clone(), decay
    for h in _spans(r.shape[1]):
        (k_earlier, _), (_, r_later) = _halves(k, h), _halves(r, h)
        total_earlier, total_later = _halves(total, 1)
        levels.append(_Level(r_later.clone(), k_earlier.clone(), total_earlier, total_later))
        total = _widen(r_later, k_earlier, total)
    return levels, r, k, total.view(-1, 1, r.shape[-1])


def _descend(level: _Level, g_y: Tensor, v: Tensor, g_r: Tensor, g_k: Tensor, g_v: Tensor, g_log: Tensor) -> None:
    """From the gradients of r and k as decayed at a span's ends to those as decayed at its middle, in place.

    The gradient of a log decay sums what passes through that token. What g_r and g_k hold before this level
    belongs to pairs with a token outside the span: it passes through the whole other half, so that g_log only
    gains such terms, and none has to cancel another.
    """
    h = level.r_later.shape[1]
    (_, g_r_later), (g_k_earlier, _) = _halves(g_r, h), _halves(g_k, h)
    (_, g_y_later), (v_earlier, _), (g_v_earlier, _) = _halves(g_y, h), _halves(v, h), _halves(g_v, h)
    g_log_earlier, g_log_later = _halves(g_log, h)
    g_r_later *= level.total_earlier
    g_k_earlier *= level.total_later
    g_log_earlier += (level.r_later * g_r_later).sum(1, keepdim=True)
    g_log_later += (level.k_earlier * g_k_earlier).sum(1, keepdim=True)
    g_scores = _dots(g_y_later, v_earlier)
    scores = _dots(level.r_later, level.k_earlier)
    _add_mix(g_r_later, g_scores, level.k_earlier)
    _add_mix(g_k_earlier, g_scores.transpose(1, 2), level.r_later)
    _add_mix(g_v_earlier, scores.transpose(1, 2), g_y_later)
