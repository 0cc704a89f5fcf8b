// Second generation, backward: what its way forwards and its way back over a tile are made of.
//
// Both need r~ and k~ of wkv6_tiles.h, products over the values with the state or its gradient, and the pairs P of
// tokens; wkv6_tiles_backward.h says what for.

#pragma once

#include "wkv6_tiles_states.h"

namespace tiles {

// 16 x 16 numbers of a warp, to be transposed: rows lie 18 apart, where few lanes meet in a bank.
using Square = float[16][18];

// Lane 4 g + t lays down columns 2g and 2g + 1 of rows 4t to 4t + 3.
DEVICE void lay_down(const Own& x, Square& square, Lane lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        *reinterpret_cast<Float2*>(&square[4 * lane.t + i][2 * lane.g]) = {{x[0][i], x[1][i]}};
    }
}

// After a warp_barrier: columns 4t to 4t + 3 of rows 4 (g / 2) + g % 2 and two further: tokens of a key.
DEVICE void pick_up(const Square& square, Lane lane, Own& y) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const float* from = &square[StateRows::key(lane) % 16 + 2 * (i / 4)][4 * lane.t + i % 4];
        const Float2 two = *reinterpret_cast<const Float2*>(from);
        y[i / 4][i % 4] = two.x[0];
        y[i / 4][i % 4 + 1] = two.x[1];
    }
}

// What a lane owns as operand a: its tokens by its keys.
DEVICE SplitA split_own(const Own& x) {
    SplitA a;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a.set(i, x[i % 2][2 * (i / 2)], x[i % 2][2 * (i / 2) + 1]);
    }
    return a;
}

// What the way forwards over a tile leaves for the way back.
struct Left {
    float r_dr[2][kThreads][4];    // of each thread's own tokens and keys
    float before[kThreads][4];     // of each thread's own keys: Sums::before[0]
    float factors[kWarps][16][2];  // of each key: exp(m), exp(c_16 - m)
};

template <class Decay>
struct BackwardStage : Stage<Decay> {
    Rows<In> dy;
};

// What both directions make of a lane's own tokens and keys.
struct Scaled {
    Own r, k, rates;            // r~, k~
    Own r_factor, k_factor;     // from r to r~, and from k to k~
    float first[4], second[4];  // exp(m), exp(c_16 - m)

    template <class Decay>
    DEVICE void load(const BackwardStage<Decay>& stage, int count, Lane lane) {
        load_own(stage.r, lane, r);
        load_own(stage.k, lane, k);
        load_rates(stage.w, count, lane, rates);
    }

    // `before` and `factors` are as in Left.
    DEVICE void scale(const float (&before)[4], const float (&factors)[2][4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            first[i] = factors[i / 2][i % 2 * 2];
            second[i] = factors[i / 2][i % 2 * 2 + 1];
            float at = before[i];
#pragma unroll
            for (int token = 0; token < 2; token++) {
                r_factor[token][i] = exp2_fast(-at);
                at += rates[token][i];
                k_factor[token][i] = exp2_fast(at);
                r[token][i] = to_tf32(r[token][i] * r_factor[token][i]);
                k[token][i] = to_tf32(k[token][i] * k_factor[token][i]);
            }
        }
    }

    template <class Decay>
    DEVICE void set(const BackwardStage<Decay>& stage, int count, Lane lane, Left& left) {
        load(stage, count, lane);
        float before[4], factors[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Sums sums = sums_of_key(rates, i, lane);
            before[i] = sums.before[0];
            factors[i / 2][i % 2 * 2] = exp2_fast(-sums.first);
            factors[i / 2][i % 2 * 2 + 1] = exp2_fast(-sums.second);
        }
        store4(left.before[thread_index()], before);
        store4(left.factors[lane.warp][4 * lane.t], factors[0]);  // the same in all lanes of this t
        store4(left.factors[lane.warp][4 * lane.t + 2], factors[1]);
        scale(before, factors);
    }

    template <class Decay>
    DEVICE void set_again(const BackwardStage<Decay>& stage, int count, Lane lane, const Left& left) {
        load(stage, count, lane);
        float before[4], factors[2][4];
        load4(left.before[thread_index()], before);
        load4(left.factors[lane.warp][4 * lane.t], factors[0]);
        load4(left.factors[lane.warp][4 * lane.t + 2], factors[1]);
        scale(before, factors);
    }
};

// The decays over the tile of the keys of a lane's rows of the state.
DEVICE void decay_of_rows(const float (*factors)[2], Lane lane, float (&decay)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const Float2 both = *reinterpret_cast<const Float2*>(factors[StateRows::key(lane) % 16 + 2 * i]);
        decay[i] = both.x[0] * both.x[1];
    }
}

// x scaled by a number of each key.
DEVICE void times(const Own& x, const float (&factors)[4], Own& y) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        y[i / 4][i % 4] = x[i / 4][i % 4] * factors[i % 4];
    }
}

// 16 values of a state, or its gradient, as operand b with values inside: [half of the keys][eight values].
struct SplitValues {
    uint32_t high[2][2], low[2][2];

    DEVICE SplitValues(const StateRows& state, int part) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* c = state.c[2 * part + i % 2] + 2 * (i / 2);
            const Split pair = split(c[0], c[1]);
            high[i / 2][i % 2] = pair.high;
            low[i / 2][i % 2] = pair.low;
        }
    }
};

// Over 16 values: adds rows . columns (tokens by tokens) to pairs, rows . state (tokens by keys) to from_state.
DEVICE void products_over_values(const Rows<In>& rows, const Rows<In>& columns, const SplitValues& state, int part,
                                 float (&pairs)[2][4], float (&from_state)[2][4]) {
    uint32_t a[4], b[4];
    load_values<false, true>(rows, part, a);
    load_values<false, false>(columns, part, b);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        matmul(pairs[half], a, b[2 * half], b[2 * half + 1]);
        matmul(from_state[half], a, state.high[half][0], state.high[half][1]);
        matmul(from_state[half], a, state.low[half][0], state.low[half][1]);
    }
}

// The pairs of the lane's own tokens with themselves.
DEVICE void diagonal_of(const float (&pairs)[2][4], Lane lane, float (&diagonal)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float mine = lane.g % 2 ? pairs[i][2 * i + 1] : pairs[i][2 * i];
        diagonal[i] = shuffle(mine, 4 * lane.g + lane.g / 2);
    }
}

// Tokens by the warp's keys <- itself times a number of each key, plus pairs times x (tokens by keys, transposed).
DEVICE void add_pairs(const float (&factors)[4], const float (&pairs)[2][4], const Own& x, float (&c)[2][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            c[half][i] *= factors[2 * half + i % 2];
        }
#pragma unroll
        for (int step = 0; step < 2; step++) {
            // Not rounded: the tensor cores cut them off, in both directions alike.
            const float a[4] = {pairs[0][step], pairs[0][step + 2], pairs[1][step], pairs[1][step + 2]};
            matmul(c[half], a, x[half][2 * step], x[half][2 * step + 1]);
        }
    }
}

// Accumulators of tokens by keys are the lane's own.
DEVICE float& of_own(float (&c)[2][4], int token, int i) { return c[i / 2][2 * token + i % 2]; }

}  // namespace tiles
