"""WKV-6 with plain PyTorch on any device: forward and backward, in chunks of a few tokens.

Token j reaches a later token i through the decays between them: y_i takes (r_i . d_{j+1} ... d_{i-1} k_j) v_j. Every such
pair is met once, where a span of 2h tokens is split in halves with j in the earlier one, i in the later one. The decays
factor at the middle, r_i's since the middle and k_j's up to the middle, so that the pairs of a span are matrix products.
The spans double from two tokens to the chunk; over whole chunks goes the state, S <- S diag(d_1 ... d_L) + V^T K.
All factors are products of decays, numbers from 0 to 1: nothing overflows or cancels, however strong the decay.
"""

# B batch · T time · H heads · N head size · S sequences · L chunk length · C chunks of all sequences, times heads
# P spans of 2h tokens

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_CHUNK = 32
_GROUP = 1 << 18  # elements of one tensor
# 2^-2000 is zero in every type: the bound turns the gradient of such a decay into 0, where 0 * inf would be NaN.
_MAX_RATE = 2000.0


class Plan(NamedTuple):
    """Where tokens go. Chunks stand in the order of the recurrence: the first one of every sequence, then the second ..."""

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
    """The heads in groups: on a CPU each group's tensors should stay in its caches."""
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
    """y (P, h, N) += scores (P, h, h) @ x (P, h, N); one or two terms are faster without the matrix product."""
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
    """Minus the base-2 logarithm of the decay exp(-exp(w)), in place; base 2 is three times faster on a CPU."""
    return w.mul_(math.log2(math.e)).add_(math.log2(math.log2(math.e))).exp2_()


def _start_states(
    v: Tensor, k: Tensor, total: Tensor, state: Tensor, active: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The states before each chunk (C, N, N) and those after the last chunks, from k decayed to the end of its chunk."""
    H, N = state.shape[1:3]
    starts = torch.empty(len(v), N, N, dtype=v.dtype, device=v.device)
    begin = 0
    for sequences in active:
        chunk = slice(begin, begin + sequences * H)
        now = state[:sequences].view(-1, N, N)
        starts[chunk] = now
        now.mul_(total[chunk]).baddbmm_(v[chunk].transpose(1, 2), k[chunk])
        begin = chunk.stop
    return starts, state


def forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, N) in r's type and the states after the last tokens (S, H, N, N) in `state`'s, the type of all sums."""
    if plan.length == 1 and not plan.packed:
        return _step(r, k, v, w, u, state)
    y, last = r.new_empty(r.shape), state.new_empty(state.shape)
    for g in _head_groups(r, plan):
        inputs = (x[:, :, g] for x in (r, k, v, w))
        _forward(y[:, :, g], last[:, g], *inputs, u[g], state[:, g], plan)
    return y, last


def _forward(
    y_out: Tensor,
    last_out: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    plan: Plan,
) -> None:
    dtype, (H, N), L = state.dtype, r.shape[2:], plan.length
    r, k, v = (_to_chunks(x, plan, dtype) for x in (r, k, v))
    total = _rate(_to_chunks(w, plan, dtype, -torch.inf)).neg_().exp2_()
    y = (r * k).view(-1, H, L, N).mul_(u.to(dtype)[:, None]).sum(-1).view(-1, L, 1) * v
    for h in _spans(L):
        (k_earlier, _), (_, r_later) = _halves(k, h), _halves(r, h)
        _add_mix(_halves(y, h)[1], _dots(r_later, k_earlier), _halves(v, h)[0])
        total = _widen(r_later, k_earlier, total)
    starts, last = _start_states(v, k, total.view(-1, 1, N), _in_order(state, plan), plan.active)
    _from_chunks(y.baddbmm_(r, starts.transpose(1, 2)), plan, y_out)
    _in_input_order(last, plan, last_out)


def _widen(r_later: Tensor, k_earlier: Tensor, total: Tensor) -> Tensor:
    """Turns decays as of the middle of each span into decays as of its ends, in place; the decay over the whole spans."""
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


def backward(
    dy: Tensor,
    dstate: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, k, v, w, u and the initial states, in the types of the inputs."""
    grads = tuple(x.new_empty(x.shape) for x in (r, k, v, w))
    g_u, g_state = u.new_empty(u.shape), state.new_empty(state.shape)
    for g in _head_groups(r, plan):
        inputs = (x[:, :, g] for x in (r, k, v, w))
        outputs = [x[:, :, g] for x in grads]
        g_y, g_last = dy[:, :, g], dstate[:, g]
        _backward(outputs, g_u[g], g_state[:, g], g_y, g_last, *inputs, u[g], state[:, g], plan)
    return *grads, g_u, g_state  # type: ignore[return-value]


def _backward(
    outputs: Sequence[Tensor],
    g_u_out: Tensor,
    g_state_out: Tensor,
    g_y: Tensor,
    g_last: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    plan: Plan,
) -> None:
    dtype, (H, N), L = state.dtype, r.shape[2:], plan.length
    r, k, v, g_y = (_to_chunks(x, plan, dtype) for x in (r, k, v, g_y))
    rate = _rate(_to_chunks(w, plan, dtype, -torch.inf))
    levels, r_start, k_end, total = _climb(r, k, torch.exp2(-rate))
    starts, _ = _start_states(v, k_end, total, _in_order(state, plan), plan.active)
    g_after, g_state = _end_gradients(g_y, r_start, total, _in_order(g_last.to(dtype), plan), plan.active)
    _in_input_order(g_state, plan, g_state_out)

    g_r, g_k, g_v = torch.bmm(g_y, starts), torch.bmm(v, g_after), torch.bmm(k_end, g_after.transpose(1, 2))
    # What passes through the whole chunk; then what the levels add, from the widest to the narrowest.
    g_log = (g_after.mul_(starts).sum(1, keepdim=True) * total).repeat(1, L, 1)
    for level in reversed(levels):
        _descend(level, g_y, v, g_r, g_k, g_v, g_log)
    g_u_out.copy_(_add_bonus_gradients(r, k, v, u.to(dtype), g_y, g_r, g_k, g_v))

    # d = exp(-exp(w)): the derivative of log d by w is minus the rate, which is kept in base 2.
    g_w = g_log.mul_(rate.clamp_(max=_MAX_RATE).mul_(-math.log(2)))
    for gradient, out in zip((g_r, g_k, g_v, g_w), outputs, strict=True):
        _from_chunks(gradient, plan, out)


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
    """All levels, narrowest first; r decayed since its chunk's start, k up to its end; the decay over whole chunks."""
    levels, r, k, total = [], r.clone(), k.clone(), decay
    for h in _spans(r.shape[1]):
        (k_earlier, _), (_, r_later) = _halves(k, h), _halves(r, h)
        total_earlier, total_later = _halves(total, 1)
        levels.append(_Level(r_later.contiguous(), k_earlier.contiguous(), total_earlier, total_later))
        total = _widen(r_later, k_earlier, total)
    return levels, r, k, total.view(-1, 1, r.shape[-1])


def _descend(
    level: _Level, g_y: Tensor, v: Tensor, g_r: Tensor, g_k: Tensor, g_v: Tensor, g_log: Tensor
) -> None:
    """From the gradients of r and k as decayed at a span's ends to those as decayed at its middle, in place.

    g_log, the gradient of the log decay, gets from each pair of tokens exactly when all of the decays between them are ones
    of a half that the pair spans: no term is added that another must cancel.
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


def _end_gradients(
    g_y: Tensor, r: Tensor, total: Tensor, g_state: Tensor, active: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each chunk (C, N, N) and of the initial ones, from r decayed since its chunk's start."""
    H, N = g_state.shape[1:3]
    g_after = torch.empty(len(r), N, N, dtype=r.dtype, device=r.device)
    stop = len(r)
    for sequences in reversed(active):
        chunk = slice(stop - sequences * H, stop)
        now = g_state[:sequences].view(-1, N, N)
        g_after[chunk] = now
        now.mul_(total[chunk]).baddbmm_(g_y[chunk].transpose(1, 2), r[chunk])
        stop = chunk.start
    return g_after, g_state
