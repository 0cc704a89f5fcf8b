// Second generation, forward: a block per sequence and head.

#pragma once

#include "wkv6_tiles.h"

namespace tiles {

template <class Decay>
struct ForwardShared {
    Stage<Decay> stages[2];
    Parts y;
    float u[N];
    float* last;  // kept here, for registers are scarce; all threads write the same
};

// The state's columns of the warp's keys: accumulators of values by keys, [16 values][half of the keys].
struct StateColumns {
    float c[N / 16][2][4];

    // Four neighbouring keys of one value at a time.
    template <class Move>
    DEVICE void each_four(float* matrix, Lane lane, Move move) {
#pragma unroll
        for (int part = 0; part < N / 16; part++) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                float(&low)[4] = c[part][0], (&high)[4] = c[part][1];
                float* at = matrix + (16 * part + lane.g + 4 * i) * N + lane.key();
                move(at, low[i], low[i + 1], high[i], high[i + 1]);
            }
        }
    }

    DEVICE void load(float* matrix, Lane lane) {
        each_four(matrix, lane, [](const float* at, float& a, float& b, float& c, float& d) {
            float four[4];
            load4(at, four);
            a = four[0], b = four[1], c = four[2], d = four[3];
        });
    }

    DEVICE void store(float* matrix, Lane lane) {
        each_four(matrix, lane, [](float* at, float a, float b, float c, float d) { store4(at, {a, b, c, d}); });
    }
};

// The warp's part of y, and the state after the tile: 16 values at a time.
DEVICE void pass_tile(const Rows<In>& v, const Own& r, const SplitA& scores, const Turned& k,
                      const float (&decay)[4], StateColumns& state, Parts& parts, Lane lane) {
#pragma unroll
    for (int part = 0; part < N / 16; part++) {
        uint32_t values[4];
        float y[2][4] = {};
        load_values<true, false>(v, part, values);
#pragma unroll
        for (int step = 0; step < 2; step++) {
            const float(&s)[4] = state.c[part][step];
            float a[4];
            own_a(r, step, a);
            matmul(y[0], a, to_tf32(s[0]), to_tf32(s[1]));
            matmul(y[1], a, to_tf32(s[2]), to_tf32(s[3]));
        }
#pragma unroll
        for (int eight = 0; eight < 2; eight++) {
            matmul(y[eight], scores.high, values[eight], values[eight + 2]);
            matmul(y[eight], scores.low, values[eight], values[eight + 2]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            parts.put(lane, 16 * part + 8 * half, y[half]);
            float(&s)[4] = state.c[part][half];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[i] *= decay[2 * half + i % 2];
            }
            matmul(s, values, k.high[half][0], k.high[half][1]);
            matmul(s, values, k.low[half][0], k.low[half][1]);
        }
    }
}

template <class Decay>
KERNEL(kThreads, kForwardBlocks)
forward(WkvProblem p) {
    auto& m = *reinterpret_cast<ForwardShared<Decay>*>(shared_memory());
    const Lane lane = lane_of_thread();
    const Sequence s = sequence_of_turn(p, block_index());
    const Sources<Decay> sources(p, s);
    const Target y(p.y, s);
    if (s.length > 0) {
        sources.fetch(0, s.length, m.stages[0]);
        commit_copies();
    }
    StateColumns state;
    state.load(matrix_of(p.state, s), lane);
    m.last = matrix_of(p.last, s);
    if (thread_index() < N) {
        m.u[thread_index()] = load_either<In>(p.u, s.head * N + thread_index(), p.bonus_type);
    }
#pragma unroll 1
    for (int tile = 0; tile * kTile < s.length; tile++) {
        const Stage<Decay>& stage = m.stages[tile % 2];
        wait_copies<0>();
        barrier();
        const int count = s.length - tile * kTile;
        sources.fetch(tile + 1, count - kTile, m.stages[(tile + 1) % 2]);  // zeros after the last tile
        commit_copies();
        Own r, k, rates, r_scaled, k_scaled;
        float u[4], bonus[2], scores[2][4] = {}, decay[4];
        load_own(stage.r, lane, r);
        load_own(stage.k, lane, k);
        load_rates(stage.w, count, lane, rates);
        load4(m.u + lane.key(), u);
        bonus_of(r, k, u, bonus);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Sums sums = sums_of_key(rates, i, lane);
            const float first = exp2_fast(-sums.first), second = exp2_fast(-sums.second);
            decay[i] = first * second;
#pragma unroll
            for (int token = 0; token < 2; token++) {
                const float scaled_r = r[token][i] * exp2_fast(-sums.before[token]);
                const float scaled_k = k[token][i] * exp2_fast(sums.before[token + 1]);
                r_scaled[token][i] = to_tf32(scaled_r);
                k_scaled[token][i] = to_tf32(scaled_k);
                r[token][i] = to_tf32(scaled_r * first);
                k[token][i] = scaled_k * second;
            }
        }
        pairs_of_own(r_scaled, k_scaled, scores);
        mask<true>(scores, bonus, lane);
        pass_tile(stage.v, r, split_accumulators(scores), turn(k), decay, state, m.y, lane);
        barrier();
        m.y.store_sum(p.y.data, y, tile, count);
    }
    wait_copies<0>();
    state.store(m.last, lane);
}

}  // namespace tiles
