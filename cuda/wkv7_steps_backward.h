// WKV-7, backward: from the last tile to the first, in float32.
//
// The gradient G of the state (dstate's own memory holds it from tile to tile) passes a tile in two ways.
// By rows: threads 4 i + p own value i and step back through the tile: G += dy r, dv = G k, h = G b, G <- G d + h a,
// where h is the gradient of u = S a; this before the columns, for h, and behind them, for G.
// By columns: threads 4 c + p own key c. With u and h known a token has two values, u and v, under the keys b and k, and
// two gradients, dy and h, of what r takes of the state after it and a of the state before it. As in WKV-6, everything
// that the key needs are projections of S before the tile, of G after it, and products of gradients and values:
//     dr_i = dy_i^T S as it stands after i,  da_i = h_i^T S as it stands before i,
//     where a projection x^T S passes a token by  z <- z d_t + b_t (x . u_t) + k_t (x . v_t);
//     db_j, dk_j = (u_j^T G, v_j^T G) D(j+1 .. end) + the same products times q_i(j) for all later targets, and
//     dlog d_t likewise, with q the r or a of the target, decayed back to t.
// These are sums of products of decays: no difference of large numbers, whatever the decays are.

#pragma once

#include "wkv7_steps.h"

namespace steps7 {

template <int N>
struct BackwardShared {
    static constexpr int kPitch = N + 4;
    float r[kTile][kPitch], k[kTile][kPitch], v[kTile][kPitch], a[kTile][kPitch], b[kTile][kPitch];
    float dy[kTile][kPitch], rate[kTile][kPitch], d[kTile][kPitch], u[kTile][kPitch], h[kTile][kPitch];
    float yu[kTile][kTile], yv[kTile][kTile], hu[kTile][kTile], hv[kTile][kTile];  // [gradient's token][value's]
    Sequence sequence;  // read again where it is needed, or addresses made of it once for all would fill the registers
};

// Tokens past the end are such that they change nothing: all zeros, no decay.
template <int N, class In>
DEVICE void load_tile(const WkvProblem& p, const Sequence& s, int start, const Kept<N>& kept, BackwardShared<N>& m) {
    for (int i = thread_index(); i < kTile * N; i += Shape<N>::kThreads) {
        const int t = i / N, c = i % N, token = start + t;
        const bool valid = token < s.length;
        m.r[t][c] = valid ? to_float(row_of<In>(p.r, s, token)[c]) : 0.0f;
        m.k[t][c] = valid ? to_float(row_of<In>(p.k, s, token)[c]) : 0.0f;
        m.v[t][c] = valid ? to_float(row_of<In>(p.v, s, token)[c]) : 0.0f;
        m.a[t][c] = valid ? to_float(row_of<In>(p.a, s, token)[c]) : 0.0f;
        m.b[t][c] = valid ? to_float(row_of<In>(p.b, s, token)[c]) : 0.0f;
        m.dy[t][c] = valid ? to_float(row_of<In>(p.dy, s, token)[c]) : 0.0f;
        m.u[t][c] = valid ? kept.u[i] : 0.0f;
        float rate = 0;
        if (valid) {
            rate = exp_accurate(load_either<In>(p.w.data, offset_of(p.w, s, token) + c, p.decay_type));
            rate = rate < kMaxRate ? rate : kMaxRate;
        }
        m.rate[t][c] = rate;
        m.d[t][c] = exp_accurate(-rate);
    }
}

// dv and h of one value in the tile, from its row of G.
template <int N, class In>
DEVICE void row(const WkvProblem& p, const Sequence& s, int start, const float* G, int row, BackwardShared<N>& m) {
    const int part = thread_index() % kParts;
    float g[N / kParts];
    read_row<N>(G + row * N, part, g);
#pragma unroll 1
    for (int t = kTile - 1; t >= 0; t--) {
        const float dy = m.dy[t][row];
        float dv = 0, h = 0;
#pragma unroll
        for (int i = 0; i < N / kParts; i++) {
            const int key = key_of(part, i);
            g[i] += dy * m.r[t][key];
            dv += g[i] * m.k[t][key];
            h += g[i] * m.b[t][key];
        }
        dv = over_parts(dv), h = over_parts(h);
#pragma unroll
        for (int i = 0; i < N / kParts; i++) {
            const int key = key_of(part, i);
            g[i] = g[i] * m.d[t][key] + h * m.a[t][key];
        }
        if (part == 0) {
            m.h[t][row] = h;
            if (start + t < s.length) {
                from_float(row_of<In>(p.dv, s, start + t)[row], dv);
            }
        }
    }
}

// The row of G of one value <- the gradient before the tile: again, since so many registers are not kept.
template <int N>
DEVICE void step_back(float* G, int row, const BackwardShared<N>& m) {
    const int part = thread_index() % kParts;
    float g[N / kParts];
    read_row<N>(G + row * N, part, g);
#pragma unroll 1
    for (int t = kTile - 1; t >= 0; t--) {
        const float dy = m.dy[t][row], h = m.h[t][row];
#pragma unroll
        for (int i = 0; i < N / kParts; i++) {
            const int key = key_of(part, i);
            g[i] = (g[i] + dy * m.r[t][key]) * m.d[t][key] + h * m.a[t][key];
        }
    }
    write_row<N>(g, part, G + row * N);
}

template <int N>
DEVICE void products(BackwardShared<N>& m) {
    for (int pair = thread_index(); pair < kTile * kTile; pair += Shape<N>::kThreads) {
        const int i = pair / kTile, j = pair % kTile;
        float yu = 0, yv = 0, hu = 0, hv = 0;
        for (int c = 0; c < N; c++) {
            yu += m.dy[i][c] * m.u[j][c];
            yv += m.dy[i][c] * m.v[j][c];
            hu += m.h[i][c] * m.u[j][c];
            hv += m.h[i][c] * m.v[j][c];
        }
        m.yu[i][j] = yu, m.yv[i][j] = yv, m.hu[i][j] = hu, m.hv[i][j] = hv;
    }
}

struct Column {
    float b[kTile], k[kTile];  // G^T u_j and G^T v_j, then db and dk
    float dlog[kTile];         // the gradient of the log decay
};

// What passes a token from the state before the tile, or an earlier key, to the gradient after the tile.
template <int N>
DEVICE void pass_whole_tile(const BackwardShared<N>& m, int key, int part, float overlap, Column& x) {
    float reach = 1;  // D(t+1 .. end)
#pragma unroll
    for (int t = 0; t < kTile; t++) {
        x.dlog[t] = overlap;  // S_t . G
        overlap = overlap * m.d[t][key] + m.b[t][key] * x.b[t] + m.k[t][key] * x.k[t];
    }
#pragma unroll
    for (int t = kTile - 1; t >= 0; t--) {
        // The four threads' sums are added up later: only one of them starts with this.
        x.dlog[t] = part == 0 ? x.dlog[t] * reach : 0.0f;
        x.b[t] = part == 0 ? x.b[t] * reach : 0.0f;
        x.k[t] = part == 0 ? x.k[t] * reach : 0.0f;
        reach *= m.d[t][key];
    }
}

// What passes a token on its way to a target, which sees the first `count` tokens of the tile, at most `bound`; returns
// `projection` of the state before the tile as that of the state that the target sees.
template <int N>
DEVICE float pass_to_target(const BackwardShared<N>& m, int key, int bound, int count, const float* of_u,
                            const float* of_v, float q, float projection, Column& x) {
    float at[kTile];
#pragma unroll
    for (int t = 0; t < bound; t++) {
        at[t] = t < count ? projection : 0.0f;
        const float next = projection * m.d[t][key] + m.b[t][key] * of_u[t] + m.k[t][key] * of_v[t];
        projection = t < count ? next : projection;
    }
#pragma unroll
    for (int t = bound - 1; t >= 0; t--) {
        x.dlog[t] += at[t] * q;
        x.b[t] += t < count ? of_u[t] * q : 0.0f;
        x.k[t] += t < count ? of_v[t] * q : 0.0f;
        q = t < count ? q * m.d[t][key] : q;
    }
    return projection;
}

// dr, or da if `of_a`, of one key in the tile, and what passes on the way to them; each thread takes its own tokens.
template <int N, class In>
DEVICE void pass_to_targets(const WkvProblem& p, const Sequence& s, int start, const float* S, int key, bool of_a,
                            const BackwardShared<N>& m, Column& x) {
    const int part = thread_index() % kParts;
    float sums[kTile], none = 0;
    project<N>(S, of_a ? m.h : m.dy, key, part, nullptr, none, sums);
#pragma unroll
    for (int own = 0; own < kOwn; own++) {
        const int i = kParts * own + part, token = start + i;
        const float found = pass_to_target<N>(m, key, kParts * (own + 1), of_a ? i : i + 1, of_a ? m.hu[i] : m.yu[i],
                                              of_a ? m.hv[i] : m.yv[i], of_a ? m.a[i][key] : m.r[i][key],
                                              pick(sums + kParts * own, part), x);
        if (token < s.length) {
            from_float((of_a ? row_of<In>(p.da, s, token) : row_of<In>(p.dr, s, token))[key], found);
        }
    }
}

// dr, dk, da, db and dw of one key in the tile.
template <int N, class In>
DEVICE void column(const WkvProblem& p, const Sequence& s, int start, const float* S, const float* G, int key,
                   const BackwardShared<N>& m) {
    const int part = thread_index() % kParts;
    Column x;
    float overlap = 0, none = 0;
    project<N>(G, m.u, key, part, S, overlap, x.b);
    project<N>(G, m.v, key, part, nullptr, none, x.k);
    pass_whole_tile<N>(m, key, part, over_parts(overlap), x);
    // Not both at once: registers are scarce.
#pragma unroll 1
    for (int of_a = 0; of_a < 2; of_a++) {
        pass_to_targets<N, In>(p, s, start, S, key, of_a, m, x);
    }
#pragma unroll
    for (int t = 0; t < kTile; t++) {
        x.dlog[t] = over_parts(x.dlog[t]) * m.d[t][key];
        x.b[t] = over_parts(x.b[t]);
        x.k[t] = over_parts(x.k[t]);
    }
#pragma unroll
    for (int own = 0; own < kOwn; own++) {
        const int t = kParts * own + part, token = start + t;
        const float db = pick(x.b + kParts * own, part), dk = pick(x.k + kParts * own, part);
        const float dlog = pick(x.dlog + kParts * own, part);
        if (token < s.length) {
            from_float(row_of<In>(p.db, s, token)[key], db);
            from_float(row_of<In>(p.dk, s, token)[key], dk);
            store_either<In>(p.dw.data, offset_of(p.dw, s, token) + key, p.decay_type, -dlog * m.rate[t][key]);
        }
    }
}

// Needs what the forward pass keeps of every tile.
template <int N, class In>
KERNEL(Shape<N>::kThreads, 1)
backward(WkvProblem p) {
    auto& m = *reinterpret_cast<BackwardShared<N>*>(shared_memory());
    const int thread = thread_index(), first = thread / kParts;
    const Sequence found = sequence_of_turn(p, block_index());
    if (thread == 0) {
        m.sequence = found;
    }
    barrier();
    const Sequence& s = m.sequence;
    float* G = matrix_of(p.dstate, s);
    const float* last = matrix_of(p.dlast, s);
    for (int i = thread; i < N * N; i += Shape<N>::kThreads) {
        G[i] = last[i];
    }
    for (int tile = (s.length + kTile - 1) / kTile - 1; tile >= 0; tile--) {
        const int start = tile * kTile;
        const Kept<N>& kept = kept_of<N>(p, s, tile);
        load_tile<N, In>(p, s, start, kept, m);
        barrier();
#pragma unroll 1
        for (int i = first; i < N; i += Shape<N>::kRows) {
            row<N, In>(p, s, start, G, i, m);
        }
        barrier();
        products<N>(m);
        barrier();
#pragma unroll 1
        for (int key = first; key < N; key += Shape<N>::kRows) {
            column<N, In>(p, s, start, kept.state, G, key, m);
        }
        barrier();
#pragma unroll 1
        for (int i = first; i < N; i += Shape<N>::kRows) {
            step_back<N>(G, i, m);
        }
        barrier();
    }
}

}  // namespace steps7
