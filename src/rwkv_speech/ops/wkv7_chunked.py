"""WKV-7 with plain PyTorch on any device: forward and backward, in chunks of a few tokens.

With u_t = S_{t-1} a_t the state is a sum of u_j b_j^T and v_j k_j^T over the tokens before, as in WKV-6. So a token has
two keys, b and k, two values, u and v, and two queries of the state before it, a and r' = d r; what r takes from its
own token is added apart. The products of queries and keys, with the decays between them (chunks.py), are A_ab and A_ak,
where the key is of an earlier token, and A_rb and A_rk, where it may be of the same. With a and r' as decayed since the
chunk's start, b and k up to its end, and D the whole chunk's decay,
    (1 - A_ab) U = A_ak V + a S^T                  solved once a chunk for both terms of the right side
    Y = A_rb U + A_rk V + r' S^T
    S <- S diag(D) + U^T b + V^T k
Backwards the same happens the other way round: the gradient of the right side, h, obeys (1 - A_ab)^T h = gradient of U.
"""

# B batch · T time · H heads · N head size · S sequences · L chunk length
# C chunks of all sequences and heads

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_speech.ops.chunks import (
    LOG2_E,
    MAX_RATE,
    Level,
    Plan,
    carry,
    climb,
    decay_rate,
    descend,
    dots,
    from_chunks,
    head_groups,
    in_input_order,
    in_order,
    steps,
    to_chunks,
)


class Inputs(NamedTuple):
    """The tensors of the operator, or their gradients."""

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    state: Tensor

    def heads(self, group: slice) -> "Inputs":
        """Some of the heads, as views."""
        r, w, k, v, a, b = (x[:, :, group] for x in self[:6])
        return Inputs(r, w, k, v, a, b, self.state[:, group])


class _Chunks(NamedTuple):
    """The tokens of all chunks; of two rows a token the first belongs to a or b, the second to r' or k."""

    r: Tensor  # (C, L, N)
    v: Tensor
    rate: Tensor  # exp(w)
    decay: Tensor
    queries: Tensor  # (C, 2L, N)
    keys: Tensor
    start: Tensor  # (C, 2L, N) queries as decayed since their chunk's start
    end: Tensor  # (C, 2L, N) keys as decayed up to its end
    total: Tensor  # (C, 1, N)
    levels: list[Level]
    products: Tensor  # (C, 2L, 2L) of queries and keys


def forward(x: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """y (B, T, H, N) in r's type and the last states (S, H, N, N) in `state`'s, the type of all sums."""
    if plan.length == 1 and not plan.packed:
        return _step(*x)
    y, last = x.r.new_empty(x.r.shape), x.state.new_empty(x.state.shape)
    for group in head_groups(x.r, plan):
        _forward(x.heads(group), plan, y[:, :, group], last[:, group])
    return y, last


def _step(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`forward` for one token in each sequence."""
    r_t, w_t, k_t, v_t, a_t, b_t = (x[:, 0].to(state.dtype) for x in (r, w, k, v, a, b))
    last = state * torch.exp(-torch.exp(w_t))[..., None, :]
    last.addcmul_(state @ a_t[..., None], b_t[..., None, :]).addcmul_(v_t[..., :, None], k_t[..., None, :])
    return (last @ r_t[..., None])[..., 0].to(r.dtype)[:, None], last


def _interleaved(first: Tensor, second: Tensor) -> Tensor:
    """Two (C, L, N) -> (C, 2L, N), token by token."""
    return torch.stack((first, second), 2).flatten(1, 2)


def _of_first(rows: Tensor) -> Tensor:
    return rows[:, 0::2]


def _of_second(rows: Tensor) -> Tensor:
    return rows[:, 1::2]


def _chunks(x: Inputs, plan: Plan) -> _Chunks:
    dtype = x.state.dtype
    r, k, v, a, b = (to_chunks(part, plan, dtype) for part in (x.r, x.k, x.v, x.a, x.b))
    rate = decay_rate(to_chunks(x.w, plan, dtype, -torch.inf))
    decay = torch.mul(rate, -LOG2_E).exp2_()
    queries, keys = _interleaved(a, r * decay), _interleaved(b, k)
    levels, start, end, total = climb(queries, keys, decay)
    products = _products(levels, queries)
    own = torch.stack(((r * b).sum(-1), (r * k).sum(-1)), -1)  # (C, L, 2)
    products.unflatten(2, (-1, 2))[:, 1::2].diagonal(dim1=1, dim2=2).copy_(own.transpose(1, 2))
    return _Chunks(r, v, rate, decay, queries, keys, start, end, total, levels, products)


def _products(levels: list[Level], queries: Tensor) -> Tensor:
    """Those of all pairs of queries and keys of different tokens, (C, 2L, 2L), zero where the key is not earlier."""
    C, rows, _ = queries.shape
    products = queries.new_zeros(C, rows, rows)
    for level in levels:
        h = level.r_later.shape[1]
        count = rows // (2 * h)
        pairs = products.view(C, count, 2, h, count, 2, h)[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3)
        pairs.copy_(dots(level.r_later, level.k_earlier).view(C, count, h, h).permute(0, 2, 3, 1))
    return products


def _solve(products: Tensor, right: Tensor, transposed: bool = False) -> Tensor:
    """X (C, L, M) of (1 - A_ab) X = right, or with the transposed matrix."""
    matrix = -_of_first(products)[..., 0::2]
    if transposed:
        return torch.linalg.solve_triangular(matrix.mT, right, upper=True, unitriangular=True)
    return torch.linalg.solve_triangular(matrix, right, upper=False, unitriangular=True)


def _values(c: _Chunks) -> tuple[Tensor, Tensor]:
    """Both values of each token (C, 2L, N), u without what the state before the chunk gives it, and that state's factor
    (C, L, N): u += factor S^T.
    """
    N = c.v.shape[-1]
    right = torch.cat((torch.bmm(_of_first(c.products)[..., 1::2], c.v), _of_first(c.start)), -1)
    inside, factor = _solve(c.products, right).split(N, -1)
    return _interleaved(inside, c.v), factor


def _forward(x: Inputs, plan: Plan, y_out: Tensor, last_out: Tensor) -> None:
    c, H = _chunks(x, plan), x.r.shape[2]
    values, factor = _values(c)
    u, r_start, last = _of_first(values), _of_second(c.start), in_order(x.state, plan)
    y = torch.empty_like(c.v)
    for chunks, before in carry(values, c.end, c.total, last, steps(plan, H)):
        u[chunks] += torch.bmm(factor[chunks], before.mT)
        torch.bmm(r_start[chunks], before.mT, out=y[chunks])
    y.baddbmm_(_of_second(c.products), values)
    from_chunks(y, plan, y_out)
    in_input_order(last, plan, last_out)


def backward(dy: Tensor, dstate: Tensor, x: Inputs, plan: Plan) -> Inputs:
    """The gradients, in the types of the inputs."""
    gradients = Inputs(*(part.new_empty(part.shape) for part in x))
    for group in head_groups(x.r, plan):
        _backward(dy[:, :, group], dstate[:, group], x.heads(group), plan, gradients.heads(group))
    return gradients


def _backward(dy: Tensor, dstate: Tensor, x: Inputs, plan: Plan, out: Inputs) -> None:
    c, H, dtype = _chunks(x, plan), x.r.shape[2], x.state.dtype
    values, factor = _values(c)
    u = _of_first(values)
    starts = u.new_empty(len(u), *x.state.shape[2:])
    for chunks, before in carry(values, c.end, c.total, in_order(x.state, plan), steps(plan, H)):
        starts[chunks] = before
        u[chunks] += torch.bmm(factor[chunks], before.mT)

    g_y = to_chunks(dy, plan, dtype)
    right = torch.cat((torch.bmm(_of_second(c.products)[..., 0::2].mT, g_y), _of_first(c.end)), -1)
    inside, factor = _solve(c.products, right, transposed=True).split(g_y.shape[-1], -1)
    g_out = _interleaved(inside, g_y)  # of what each query gives: the right sides h, and y
    g_right, g_state = _of_first(g_out), in_order(dstate.to(dtype), plan)
    g_keys, g_values, g_log = (torch.empty_like(part) for part in (c.keys, values, c.decay))
    for chunks, g_after in carry(g_out, c.start, c.total, g_state, reversed(steps(plan, H))):
        g_right[chunks] += torch.bmm(factor[chunks], g_after.mT)
        torch.bmm(values[chunks], g_after, out=g_keys[chunks])
        torch.bmm(c.end[chunks], g_after.mT, out=g_values[chunks])
        # The state passes through the whole chunk; what else the decays carry, each level adds.
        g_log[chunks] = (starts[chunks] * g_after).sum(1, keepdim=True) * c.total[chunks]
    in_input_order(g_state, plan, out.state)
    g_queries = torch.bmm(g_out, starts)
    for level in reversed(c.levels):
        descend(level, g_out, values, g_queries, g_keys, g_values, g_log)
    g_r = _add_own_gradients(c, values, g_y, g_queries, g_keys, g_values, g_log)

    # log d = -exp(w) is its own derivative by w.
    g_w = g_log.mul_(c.rate.clamp_(max=MAX_RATE).neg_())
    g_k, g_v, g_a, g_b = _of_second(g_keys), _of_second(g_values), _of_first(g_queries), _of_first(g_keys)
    for gradient, part in zip((g_r, g_w, g_k, g_v, g_a, g_b), out, strict=False):
        from_chunks(gradient, plan, part)


def _add_own_gradients(
    c: _Chunks, values: Tensor, g_y: Tensor, g_queries: Tensor, g_keys: Tensor, g_values: Tensor, g_log: Tensor
) -> Tensor:
    """Adds what (r . b) u + (r . k) v and r' = d r give; returns the gradient of r."""
    g_scaled = _of_second(g_queries)
    g_log += g_scaled * _of_second(c.queries)
    g_r = g_scaled * c.decay
    for of, value in ((_of_first, _of_first(values)), (_of_second, c.v)):
        g_own = (g_y * value).sum(-1, keepdim=True)
        g_r.addcmul_(g_own, of(c.keys))
        of(g_keys).addcmul_(g_own, c.r)
    own = _of_second(c.products).unflatten(2, (-1, 2))[..., 1].diagonal(dim1=1, dim2=2)
    _of_second(g_values).addcmul_(own[..., None], g_y)
    return g_r
