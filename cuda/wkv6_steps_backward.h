// First generation, backward: from the last tile to the first, in float32.
//
// The gradient G of the state (dstate's own memory holds it from tile to tile) passes a tile in two ways.
// By columns: threads 4 c + p own key c. With the state S before the tile, everything that the key needs are the
// projections a_i = S^T dy_i and f_j = G^T v_j, and P_ij = dy_i . v_j. Then, one product of decays at a time,
//     dr_i = a_i as it stands at i,           a_i <- a_i d_t + k_t P_it  for t < i
//     dk_j = f_j D(j+1 .. end) + sum over i > j of P_ij q_i(j),          q_i(t) = r_i D(t+1 .. i-1)
//     dlog d_t = d_t (sum over i > t of a_i(t) q_i(t) + (S_t . G) D(t+1 .. end))
// which are sums of products of decays: no difference of large numbers, whatever the decays are.
// By rows: threads 4 i + p own value i, step back through the tile, give dv and the next G.

#pragma once

#include "wkv6_steps.h"

namespace steps {

template <int N>
struct BackwardShared {
    static constexpr int kPitch = N + 4;
    float r[kTile][kPitch], k[kTile][kPitch], v[kTile][kPitch], dy[kTile][kPitch], rate[kTile][kPitch],
        d[kTile][kPitch];
    float P[kTile][kTile];
    float u[N], du[N], bonus[kTile];
};

// Tokens past the end are such that they change nothing: no receptance, no key, no decay.
template <int N, class In>
DEVICE void load_tile(const WkvProblem& p, const Sequence& s, int start, BackwardShared<N>& m) {
    for (int i = thread_index(); i < kTile * N; i += Shape<N>::kThreads) {
        const int t = i / N, c = i % N;
        const bool valid = start + t < s.length;
        m.r[t][c] = valid ? to_float(row_of<In>(p.r, s, start + t)[c]) : 0.0f;
        m.k[t][c] = valid ? to_float(row_of<In>(p.k, s, start + t)[c]) : 0.0f;
        m.v[t][c] = valid ? to_float(row_of<In>(p.v, s, start + t)[c]) : 0.0f;
        m.dy[t][c] = valid ? to_float(row_of<In>(p.dy, s, start + t)[c]) : 0.0f;
        float rate = 0;
        if (valid) {
            rate = exp_accurate(load_either<In>(p.w.data, offset_of(p.w, s, start + t) + c, p.decay_type));
            rate = rate < kMaxRate ? rate : kMaxRate;
        }
        m.rate[t][c] = rate;
        m.d[t][c] = exp_accurate(-rate);
    }
}

// P and the bonus r . (u k) of every token.
template <int N>
DEVICE void products(BackwardShared<N>& m) {
    for (int pair = thread_index(); pair < kTile * kTile + kTile; pair += Shape<N>::kThreads) {
        const int i = pair / kTile, j = pair % kTile;
        float sum = 0;
        for (int c = 0; c < N; c++) {
            sum += i < kTile ? m.dy[i][c] * m.v[j][c] : m.r[j][c] * m.u[c] * m.k[j][c];
        }
        (i < kTile ? m.P[i][j] : m.bonus[j]) = sum;
    }
}

struct Column {
    float a[kOwn];       // S^T dy_i of the own tokens, then dr without the bonus
    float f[kTile];      // G^T v_j, then dk without the bonus
    float dlog[kTile];   // the gradient of the log decay
};

// What passes a token from the state before the tile, or an earlier key, to the gradient after the tile.
template <int N>
DEVICE void pass_whole_tile(const BackwardShared<N>& m, int key, int part, float overlap, Column& x) {
    float reach = 1;  // D(t+1 .. end)
#pragma unroll
    for (int t = 0; t < kTile; t++) {
        x.dlog[t] = overlap;  // S_t . G
        overlap = overlap * m.d[t][key] + m.k[t][key] * x.f[t];
    }
#pragma unroll
    for (int t = kTile - 1; t >= 0; t--) {
        // The four threads' sums are added up later: only one of them starts with this.
        x.dlog[t] = part == 0 ? x.dlog[t] * reach : 0.0f;
        x.f[t] = part == 0 ? x.f[t] * reach : 0.0f;
        reach *= m.d[t][key];
    }
}

// What passes a token on its way to a later token of the tile; each thread takes its own tokens as targets.
template <int N>
DEVICE void pass_to_targets(const BackwardShared<N>& m, int key, int part, Column& x) {
#pragma unroll
    for (int own = 0; own < kOwn; own++) {
        const int i = kParts * own + part;
        float at[kTile], a = x.a[own], q = m.r[i][key];
#pragma unroll
        for (int t = 0; t < kParts * own + kParts - 1; t++) {
            at[t] = t < i ? a : 0.0f;
            a = t < i ? a * m.d[t][key] + m.k[t][key] * m.P[i][t] : a;
        }
        x.a[own] = a;
#pragma unroll
        for (int t = kParts * own + kParts - 2; t >= 0; t--) {
            x.dlog[t] += at[t] * q;
            x.f[t] += t < i ? m.P[i][t] * q : 0.0f;
            q = t < i ? q * m.d[t][key] : q;
        }
    }
#pragma unroll
    for (int t = 0; t < kTile; t++) {
        x.dlog[t] = over_parts(x.dlog[t]) * m.d[t][key];
        x.f[t] = over_parts(x.f[t]);
    }
}

// dr, dk and dw of one key in the tile; adds to its du.
template <int N, class In>
DEVICE void column(const WkvProblem& p, const Sequence& s, int start, const float* S, const float* G, int key,
                   BackwardShared<N>& m) {
    const int part = thread_index() % kParts;
    Column x;
    float sums[kTile], overlap = 0, none = 0;
    project<N>(S, m.dy, key, part, nullptr, none, sums);
#pragma unroll
    for (int own = 0; own < kOwn; own++) {
        x.a[own] = pick(sums + kParts * own, part);
    }
    project<N>(G, m.v, key, part, S, overlap, x.f);
    pass_whole_tile<N>(m, key, part, over_parts(overlap), x);
    pass_to_targets<N>(m, key, part, x);
    float du = 0;
#pragma unroll
    for (int own = 0; own < kOwn; own++) {
        const int t = kParts * own + part;
        const float dk = pick(x.f + kParts * own, part), dlog = pick(x.dlog + kParts * own, part);
        if (start + t < s.length) {
            const float r = m.r[t][key], k = m.k[t][key], bonus = m.P[t][t] * m.u[key];
            du += m.P[t][t] * r * k;
            from_float(row_of<In>(p.dr, s, start + t)[key], x.a[own] + bonus * k);
            from_float(row_of<In>(p.dk, s, start + t)[key], dk + bonus * r);
            store_either<In>(p.dw.data, offset_of(p.dw, s, start + t) + key, p.decay_type, -dlog * m.rate[t][key]);
        }
    }
    du = over_parts(du);
    if (part == 0) {
        m.du[key] += du;
    }
}

// dv of one value in the tile, and its row of G <- the gradient before the tile.
template <int N, class In>
DEVICE void row(const WkvProblem& p, const Sequence& s, int start, float* G, int row, const BackwardShared<N>& m) {
    const int part = thread_index() % kParts;
    float g[N / kParts];
    read_row<N>(G + row * N, part, g);
    for (int t = kTile - 1; t >= 0; t--) {
        const float dy = m.dy[t][row];
        float sum = 0;
#pragma unroll
        for (int i = 0; i < N / kParts; i++) {
            const int key = key_of(part, i);
            sum += g[i] * m.k[t][key];
            g[i] = g[i] * m.d[t][key] + dy * m.r[t][key];
        }
        const float dv = over_parts(sum) + m.bonus[t] * dy;
        if (part == 0 && start + t < s.length) {
            from_float(row_of<In>(p.dv, s, start + t)[row], dv);
        }
    }
    write_row<N>(g, part, G + row * N);
}

// Needs the states before every tile in `scratch`, (tiles, heads, N, N) float32.
template <int N, class In>
KERNEL(Shape<N>::kThreads, 1)
backward(WkvProblem p) {
    auto& m = *reinterpret_cast<BackwardShared<N>*>(shared_memory());
    const int thread = thread_index();
    const Sequence s = sequence_of_turn(p, block_index());
    float* G = matrix_of(p.dstate, s);
    const float* last = matrix_of(p.dlast, s);
    for (int i = thread; i < N * N; i += Shape<N>::kThreads) {
        G[i] = last[i];
    }
    for (int c = thread; c < N; c += Shape<N>::kThreads) {
        m.u[c] = load_either<In>(p.u, s.head * N + c, p.bonus_type);
        m.du[c] = 0;
    }
    for (int tile = (s.length + kTile - 1) / kTile - 1; tile >= 0; tile--) {
        const int start = tile * kTile;
        const float* S =
            static_cast<const float*>(p.scratch) + ((first_kept(p, s, kTile) + tile) * p.heads + s.head) * N * N;
        load_tile<N, In>(p, s, start, m);
        barrier();
        products<N>(m);
        barrier();
#pragma unroll 1
        for (int key = thread / kParts; key < N; key += Shape<N>::kRows) {
            column<N, In>(p, s, start, S, G, key, m);
        }
        barrier();
#pragma unroll 1
        for (int i = thread / kParts; i < N; i += Shape<N>::kRows) {
            row<N, In>(p, s, start, G, i, m);
        }
        barrier();
    }
    for (int c = thread; p.need_du && c < N; c += Shape<N>::kThreads) {
        p.du[(s.index * p.heads + s.head) * N + c] = m.du[c];
    }
}

}  // namespace steps
