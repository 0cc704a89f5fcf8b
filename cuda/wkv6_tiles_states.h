// Second generation, the state by rows: the accumulators of the backward pass, and the pass before it, which keeps the
// state before every 64 tokens.

#pragma once

#include "wkv6_tiles.h"

namespace tiles {

constexpr int kTilesOfState = 4, kKeptEvery = kTilesOfState * kTile;

// A state between the passes, in the order of its accumulators.
struct KeptState {
    float x[kWarps][N / 8][kWarp][4];
};

// What a lane owns, turned, as operand a: its warp's keys by the tokens.
DEVICE SplitA turned_a(const Own& x) {
    const Turned y = turn(x);
    return {{y.high[0][0], y.high[1][0], y.high[0][1], y.high[1][1]},
            {y.low[0][0], y.low[1][0], y.low[0][1], y.low[1][1]}};
}

// The rows of the state, or of its gradient, of the warp's keys: accumulators of keys by values, [8 values]. Rows g and
// g + 8 are keys 4 (g / 2) + g % 2 and two further.
struct StateRows {
    float c[N / 8][4];

    DEVICE static int key(Lane lane) { return 16 * lane.warp + 4 * (lane.g / 2) + lane.g % 2; }

    DEVICE void load(const float* matrix, Lane lane) {
#pragma unroll
        for (int i = 0; i < 4 * N / 8; i++) {
            c[i / 4][i % 4] = matrix[(8 * (i / 4) + 2 * lane.t + i % 2) * N + key(lane) + 2 * (i % 4 / 2)];
        }
    }

    DEVICE void store(float* matrix, Lane lane) const {
#pragma unroll
        for (int i = 0; i < 4 * N / 8; i++) {
            matrix[(8 * (i / 4) + 2 * lane.t + i % 2) * N + key(lane) + 2 * (i % 4 / 2)] = c[i / 4][i % 4];
        }
    }

    DEVICE void load(const KeptState& kept, Lane lane) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            load4(kept.x[lane.warp][n][4 * lane.g + lane.t], c[n]);
        }
    }

    DEVICE void store(KeptState& kept, Lane lane) const {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            store4(kept.x[lane.warp][n][4 * lane.g + lane.t], c[n]);
        }
    }

    // Values 8 n to 8 n + 7 <- themselves times the keys' decays, plus x^T (keys by tokens) times those of the tile's
    // rows.
    DEVICE void pass_tile(int n, const float (&decay)[2], const SplitA& x, uint32_t rows_0, uint32_t rows_1) {
        c[n][0] *= decay[0];
        c[n][1] *= decay[0];
        c[n][2] *= decay[1];
        c[n][3] *= decay[1];
        matmul(c[n], x.high, rows_0, rows_1);
        matmul(c[n], x.low, rows_0, rows_1);
    }

    DEVICE void pass_tile(const float (&decay)[2], const SplitA& x, const Rows<In>& rows) {
#pragma unroll
        for (int part = 0; part < N / 16; part++) {
            uint32_t values[4];
            load_values<true, true>(rows, part, values);
            pass_tile(2 * part, decay, x, values[0], values[1]);
            pass_tile(2 * part + 1, decay, x, values[2], values[3]);
        }
    }

    // Of the lane's own keys, the sums over values of the products with `other`.
    DEVICE void overlap(const StateRows& other, Lane lane, float (&sums)[4]) const {
        float rows[2] = {};
#pragma unroll
        for (int i = 0; i < 4 * N / 8; i++) {
            rows[i % 4 / 2] += c[i / 4][i % 4] * other.c[i / 4][i % 4];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            rows[i] += shuffle_xor(rows[i], 1);
            rows[i] += shuffle_xor(rows[i], 2);
            sums[2 * i] = shuffle(rows[i], 8 * lane.t);
            sums[2 * i + 1] = shuffle(rows[i], 8 * lane.t + 4);
        }
    }
};

template <class Decay>
struct StatesShared {
    Rows<In> k[2], v[2];
    Rows<Decay> w[2];
    float decay[kWarps][16];
};

// Keeps the state before every 64 tokens in p.scratch.
template <class Decay>
KERNEL(kThreads, kForwardBlocks)
states(WkvProblem p) {
    auto& m = *reinterpret_cast<StatesShared<Decay>*>(shared_memory());
    const Lane lane = lane_of_thread();
    const Sequence s = sequence_of_turn(p, block_index());
    const Source<In> source_k(p.k, s), source_v(p.v, s);
    const Source<Decay> source_w(p.w, s);
    KeptState* kept = static_cast<KeptState*>(p.scratch) + first_kept(p, s, kKeptEvery) * p.heads + s.head;
    const auto fetch = [&](int tile) {  // zeros after the last tile
        const int count = s.length - tile * kTile;
        source_k.fetch(tile, count, m.k[tile % 2]);
        source_v.fetch(tile, count, m.v[tile % 2]);
        source_w.fetch(tile, count, m.w[tile % 2]);
        commit_copies();
    };
    fetch(0);
    StateRows state;
    state.load(matrix_of(p.state, s), lane);
    float* decay = m.decay[lane.warp];
#pragma unroll 1
    for (int tile = 0; tile * kTile < s.length; tile++) {
        wait_copies<0>();
        barrier();
        fetch(tile + 1);
        if (tile % kTilesOfState == 0) {
            state.store(kept[tile / kTilesOfState * p.heads], lane);
        }
        Own k, rates;
        load_own(m.k[tile % 2], lane, k);
        load_rates(m.w[tile % 2], s.length - tile * kTile, lane, rates);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float all;
            const float after = sum_after(rates[0][i] + rates[1][i], 0.0f, lane, all);
            k[0][i] *= exp2_fast(-after - rates[1][i]);
            k[1][i] *= exp2_fast(-after);
            decay[4 * lane.t + i] = exp2_fast(-all);  // the same in all lanes of this t
        }
        const SplitA turned = turned_a(k);
        warp_barrier();
        state.pass_tile({decay[state.key(lane) % 16], decay[state.key(lane) % 16 + 2]}, turned, m.v[tile % 2]);
    }
    wait_copies<0>();
}

}  // namespace tiles
