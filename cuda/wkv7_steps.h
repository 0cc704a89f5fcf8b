// WKV-7, forward: a block goes from token to token with up to 64 rows of a head's state, in float32.
//
// No row of a state meets another: u = S a and y = S r are sums over the four threads of a row.

#pragma once

#include "steps.h"

namespace steps7 {

using namespace steps;

template <int N>
struct ForwardShared {
    float r[kTile][N], k[kTile][N], v[kTile][N], d[kTile][N], a[kTile][N], b[kTile][N];
    float out[kTile][Shape<N>::kRows];  // y or u
};

// What the backward pass needs of a tile: the state before it, and its tokens' u.
template <int N>
struct Kept {
    float state[N * N], u[kTile * N];
};

template <int N>
DEVICE Kept<N>& kept_of(const WkvProblem& p, const Sequence& s, int tile) {
    return static_cast<Kept<N>*>(p.scratch)[(first_kept(p, s, kTile) + tile) * p.heads + s.head];
}

template <int N, class In>
DEVICE void load_tile(const WkvProblem& p, const Sequence& s, int start, int count, bool with_r, ForwardShared<N>& m) {
    for (int i = thread_index(); i < count * N; i += Shape<N>::kThreads) {
        const int t = i / N, c = i % N;
        m.k[t][c] = to_float(row_of<In>(p.k, s, start + t)[c]);
        m.v[t][c] = to_float(row_of<In>(p.v, s, start + t)[c]);
        m.a[t][c] = to_float(row_of<In>(p.a, s, start + t)[c]);
        m.b[t][c] = to_float(row_of<In>(p.b, s, start + t)[c]);
        m.d[t][c] = decay_of(load_either<In>(p.w.data, offset_of(p.w, s, start + t) + c, p.decay_type));
        if (with_r) {
            m.r[t][c] = to_float(row_of<In>(p.r, s, start + t)[c]);
        }
    }
}

struct Products {
    float u, y;
};

// One step of one thread's share of a row: S <- S d + u b + v k; the row's u, and y if `with_r`.
template <int N>
DEVICE Products step(float (&S)[N / kParts], const ForwardShared<N>& m, int t, int row, int part, bool with_r) {
    float u = 0, y = 0;
#pragma unroll
    for (int i = 0; i < N / kParts; i++) {
        u += S[i] * m.a[t][key_of(part, i)];
    }
    u = over_parts(u);
    const float v = m.v[t][row];
#pragma unroll
    for (int i = 0; i < N / kParts; i++) {
        const int key = key_of(part, i);
        S[i] = S[i] * m.d[t][key] + u * m.b[t][key] + v * m.k[t][key];
        y += with_r ? S[i] * m.r[t][key] : 0.0f;
    }
    return {u, with_r ? over_parts(y) : 0.0f};
}

// kStates: instead of y and the last state, writes what is kept of every tile to `scratch`, for the backward pass.
template <int N, class In, bool kStates>
KERNEL(Shape<N>::kThreads, 1)
forward(WkvProblem p) {
    constexpr int kRows = Shape<N>::kRows;
    auto& m = *reinterpret_cast<ForwardShared<N>*>(shared_memory());
    const int thread = thread_index(), part = thread % kParts;
    const int first_row = kRows * static_cast<int>(block_index() % Shape<N>::kBlocks), row = first_row + thread / kParts;
    const Sequence s = sequence_of_turn(p, block_index() / Shape<N>::kBlocks);
    float S[N / kParts];
    read_row<N>(matrix_of(p.state, s) + row * N, part, S);
    for (int start = 0; start < s.length; start += kTile) {
        const int count = s.length - start < kTile ? s.length - start : kTile;
        if (kStates) {
            write_row<N>(S, part, kept_of<N>(p, s, start / kTile).state + row * N);
        }
        load_tile<N, In>(p, s, start, count, !kStates, m);
        barrier();
#pragma unroll 1
        for (int t = 0; t < count; t++) {
            const Products products = step<N>(S, m, t, row, part, !kStates);
            if (part == 0) {
                m.out[t][row - first_row] = kStates ? products.u : products.y;
            }
        }
        barrier();
        for (int i = thread; i < count * kRows; i += Shape<N>::kThreads) {
            const int t = i / kRows, value = first_row + i % kRows;
            if (kStates) {
                kept_of<N>(p, s, start / kTile).u[t * N + value] = m.out[t][value - first_row];
            } else {
                from_float(row_of<In>(p.y, s, start + t)[value], m.out[t][value - first_row]);
            }
        }
    }
    if (!kStates) {
        write_row<N>(S, part, matrix_of(p.last, s) + row * N);
    }
}

// One token of every slot; the state is updated in place.
template <int N, class In>
KERNEL(Shape<N>::kThreads, 1)
decode(WkvProblem p) {
    auto& m = *reinterpret_cast<ForwardShared<N>*>(shared_memory());
    const int thread = thread_index(), part = thread % kParts;
    const int64_t turn = block_index() / Shape<N>::kBlocks;
    const int row = Shape<N>::kRows * static_cast<int>(block_index() % Shape<N>::kBlocks) + thread / kParts;
    const int slot = static_cast<int>(turn / p.heads), head = static_cast<int>(turn % p.heads);
    const Sequence s = {slot, slot, 0, 1, head};
    load_tile<N, In>(p, s, 0, 1, true, m);
    float S[N / kParts];
    float* state = matrix_of(p.state, s) + row * N;
    read_row<N>(state, part, S);
    barrier();
    const float y = step<N>(S, m, 0, row, part, true).y;
    write_row<N>(S, part, state);
    if (part == 0) {
        from_float(row_of<In>(p.y, s, 0)[row], y);
    }
}

}  // namespace steps7
