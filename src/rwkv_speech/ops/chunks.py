"""What the chunked PyTorch forms share: where tokens go, decays that factor, states from chunk to chunk.

Every pair of tokens j < i of a chunk is met once, where a span of 2h tokens is split in halves with j in the earlier
one, i in the later one. The decays between them, d_{j+1} ... d_{i-1}, factor at the middle, i's since the middle and
j's up to the middle, so that all pairs of a span are matrix products. The spans double from two tokens to the chunk.
All factors are products of decays, numbers from 0 to 1: nothing overflows or cancels, however strong the decay. A token
may have several queries and keys: rows that follow each other and share its decays.
"""

# B batch · T time · H heads · N head size · S sequences · L chunk length
# C chunks of all sequences and heads · P spans of 2h tokens, or of their rows

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
MAX_RATE = 1000.0
LOG2_E = math.log2(math.e)


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


def to_chunks(x: Tensor, plan: Plan, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
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


def from_chunks(chunks: Tensor, plan: Plan, out: Tensor) -> None:
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


def in_order(state: Tensor, plan: Plan) -> Tensor:
    """A copy of the states, in the order of the chunks."""
    return state[plan.packed.order] if plan.packed else state.clone(memory_format=torch.contiguous_format)


def in_input_order(state: Tensor, plan: Plan, out: Tensor) -> None:
    if plan.packed:
        out[plan.packed.order] = state
    else:
        out.copy_(state)


def head_groups(r: Tensor, plan: Plan) -> list[slice]:
    """The heads in groups; on a CPU one group's tensors should stay in its caches."""
    H, N = r.shape[2:]
    size = H if r.is_cuda else max(1, _GROUP // (sum(plan.active) * plan.length * N))
    return [slice(i, min(i + size, H)) for i in range(0, H, size)]


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """The earlier and the later half of all spans of 2h tokens, each (P, h, N)."""
    earlier, later = x.view(-1, 2, h, x.shape[-1]).unbind(1)
    return earlier, later


def dots(a: Tensor, b: Tensor) -> Tensor:
    """a (P, h, N) @ b (P, h, N)^T; a few tokens are faster without the matrix product."""
    return torch.bmm(a, b.transpose(1, 2)) if a.shape[1] > 2 else (a[:, :, None] * b[:, None]).sum(-1)


def add_mix(y: Tensor, scores: Tensor, x: Tensor) -> None:
    """y (P, h, N) += scores (P, h, h) @ x (P, h, N); a few tokens are faster without the matrix product."""
    h = x.shape[1]
    if h > 2:
        y.add_(torch.bmm(scores, x))
        return
    for j in range(h):
        y.addcmul_(scores[:, :, j : j + 1], x[:, j : j + 1])


def spans(length: int, rows: int = 1) -> list[int]:
    """1, 2, 4 ... up to half the chunk, each times the rows of a token."""
    return [rows << i for i in range(length.bit_length() - 1)]


def decay_rate(w: Tensor) -> Tensor:
    """exp(w), in place; on a CPU exp2 beats exp threefold."""
    return w.mul_(LOG2_E).exp2_()


def steps(plan: Plan, H: int) -> list[tuple[slice, int]]:
    """The chunks of each step of the recurrence and how many sequences they belong to."""
    ends = list(itertools.accumulate(plan.active))
    return [(slice((end - n) * H, end * H), n) for end, n in zip(ends, plan.active, strict=True)]


def carry(
    a: Tensor, b: Tensor, total: Tensor, state: Tensor, steps: Iterable[tuple[slice, int]]
) -> Iterator[tuple[slice, Tensor]]:
    """Each step's chunks and the states before them; then, in place, state <- state diag(total) + a^T b."""
    N = state.shape[-1]
    for chunks, sequences in steps:
        now = state[:sequences].view(-1, N, N)
        yield chunks, now
        now.mul_(total[chunks]).baddbmm_(a[chunks].transpose(1, 2), b[chunks])


def widen(r_later: Tensor, k_earlier: Tensor, total: Tensor) -> Tensor:
    """From decays as of each span's middle to decays as of its ends, in place; returns the whole spans'."""
    total_earlier, total_later = halves(total, 1)
    r_later *= total_earlier
    k_earlier *= total_later
    return total_earlier * total_later


class Level(NamedTuple):
    """The two halves of all spans of 2h tokens, with one row or several a token."""

    r_later: Tensor  # (P, h, N) decayed since the middle
    k_earlier: Tensor  # (P, h, N) decayed up to the middle
    total_earlier: Tensor  # (P, 1, N) the decay over the earlier half
    total_later: Tensor  # (P, 1, N)


def climb(r: Tensor, k: Tensor, decay: Tensor) -> tuple[list[Level], Tensor, Tensor, Tensor]:
    """All levels, narrowest first; r decayed since its chunk's start, k up to its end; the whole chunk's decay.

    decay (C, L, N); r and k the same, or with several rows a token, those of one token following each other.
    """
    levels, r, k, total = [], r.clone(), k.clone(), decay
    for h in spans(decay.shape[1], r.shape[1] // decay.shape[1]):
        (k_earlier, _), (_, r_later) = halves(k, h), halves(r, h)
        total_earlier, total_later = halves(total, 1)
        levels.append(Level(r_later.clone(), k_earlier.clone(), total_earlier, total_later))
        total = widen(r_later, k_earlier, total)
    return levels, r, k, total.view(-1, 1, r.shape[-1])


def descend(level: Level, g_y: Tensor, v: Tensor, g_r: Tensor, g_k: Tensor, g_v: Tensor, g_log: Tensor) -> None:
    """From the gradients of r and k as decayed at a span's ends to those as decayed at its middle, in place.

    The gradient of a log decay sums what passes through that token. What g_r and g_k hold before this level
    belongs to pairs with a token outside the span: it passes through the whole other half, so that g_log only
    gains such terms, and none has to cancel another.
    """
    h = level.r_later.shape[1]
    (_, g_r_later), (g_k_earlier, _) = halves(g_r, h), halves(g_k, h)
    (_, g_y_later), (v_earlier, _), (g_v_earlier, _) = halves(g_y, h), halves(v, h), halves(g_v, h)
    g_log_earlier, g_log_later = halves(g_log, h * g_log.shape[1] // g_r.shape[1])
    g_r_later *= level.total_earlier
    g_k_earlier *= level.total_later
    g_log_earlier += (level.r_later * g_r_later).sum(1, keepdim=True)
    g_log_later += (level.k_earlier * g_k_earlier).sum(1, keepdim=True)
    g_scores = dots(g_y_later, v_earlier)
    scores = dots(level.r_later, level.k_earlier)
    add_mix(g_r_later, g_scores, level.k_earlier)
    add_mix(g_k_earlier, g_scores.transpose(1, 2), level.r_later)
    add_mix(g_v_earlier, scores.transpose(1, 2), g_y_later)
