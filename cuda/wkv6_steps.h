// First generation, forward: a block goes from token to token with up to 64 rows of a head's state, in float32.

#pragma once

#include "steps.h"

namespace steps {

template <int N>
struct ForwardShared {
    float r[kTile][N], k[kTile][N], v[kTile][N], d[kTile][N], y[kTile][Shape<N>::kRows];
    float u[N], bonus[kTile];
};

template <int N, class In>
DEVICE void load_tile(const WkvProblem& p, const Sequence& s, int start, int count, bool with_r,
                             ForwardShared<N>& m) {
    for (int i = thread_index(); i < count * N; i += Shape<N>::kThreads) {
        const int t = i / N, c = i % N;
        m.k[t][c] = to_float(row_of<In>(p.k, s, start + t)[c]);
        m.v[t][c] = to_float(row_of<In>(p.v, s, start + t)[c]);
        m.d[t][c] = decay_of(load_either<In>(p.w.data, offset_of(p.w, s, start + t) + c, p.decay_type));
        if (with_r) {
            m.r[t][c] = to_float(row_of<In>(p.r, s, start + t)[c]);
        }
    }
}

// bonus[t] = sum over keys of r u k, a warp per token.
template <int N>
DEVICE void add_up_bonus(int count, ForwardShared<N>& m) {
    const int lane = thread_index() % kWarp;
    for (int t = thread_index() / kWarp; t < count; t += Shape<N>::kThreads / kWarp) {
        float sum = 0;
        for (int c = lane; c < N; c += kWarp) {
            sum += m.r[t][c] * m.u[c] * m.k[t][c];
        }
        for (int mask = kWarp / 2; mask > 0; mask /= 2) {
            sum += shuffle_xor(sum, mask);
        }
        m.bonus[t] = sum;
    }
}

// One step of one thread's share of a row: its part of S r, then S <- S d + v k.
template <int N>
DEVICE float step(float (&S)[N / kParts], const float* r, const float* k, const float* d, float v, int part) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N / kParts; i++) {
        const int key = key_of(part, i);
        sum += S[i] * r[key];
        S[i] = S[i] * d[key] + v * k[key];
    }
    return sum;
}

// kStates: instead of y and the last state, writes the state before every tile to `scratch`, for the backward pass.
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
    for (int c = thread; c < N; c += Shape<N>::kThreads) {
        m.u[c] = load_either<In>(p.u, s.head * N + c, p.bonus_type);
    }
    for (int start = 0; start < s.length; start += kTile) {
        const int count = s.length - start < kTile ? s.length - start : kTile;
        if (kStates) {
            const int64_t tile = first_kept(p, s, kTile) + start / kTile;
            write_row<N>(S, part, static_cast<float*>(p.scratch) + ((tile * p.heads + s.head) * N + row) * N);
        }
        load_tile<N, In>(p, s, start, count, !kStates, m);
        barrier();
        if (!kStates) {
            add_up_bonus<N>(count, m);
            barrier();
        }
#pragma unroll 1
        for (int t = 0; t < count; t++) {
            const float v = m.v[t][row];
            const float* r = kStates ? m.k[t] : m.r[t];
            const float sum = step<N>(S, r, m.k[t], m.d[t], v, part);
            if (!kStates) {
                const float y = over_parts(sum) + m.bonus[t] * v;
                if (part == 0) {
                    m.y[t][row - first_row] = y;
                }
            }
        }
        barrier();
        for (int i = thread; !kStates && i < count * kRows; i += Shape<N>::kThreads) {
            from_float(row_of<In>(p.y, s, start + i / kRows)[first_row + i % kRows], m.y[i / kRows][i % kRows]);
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
    for (int c = thread; c < N; c += Shape<N>::kThreads) {
        m.u[c] = load_either<In>(p.u, s.head * N + c, p.bonus_type);
    }
    load_tile<N, In>(p, s, 0, 1, true, m);
    float S[N / kParts];
    float* state = matrix_of(p.state, s) + row * N;
    read_row<N>(state, part, S);
    barrier();
    add_up_bonus<N>(1, m);
    barrier();
    const float v = m.v[0][row];
    const float y = over_parts(step<N>(S, m.r[0], m.k[0], m.d[0], v, part)) + m.bonus[0] * v;
    write_row<N>(S, part, state);
    if (part == 0) {
        from_float(row_of<In>(p.y, s, 0)[row], y);
    }
}

}  // namespace steps
