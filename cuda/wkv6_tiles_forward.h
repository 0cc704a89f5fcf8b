// Second generation, forward: 4 warps (or 2, for half of the values) per sequence and head; tiles arrive by
// asynchronous copies two ahead. Each warp keeps 16 rows (values) of the state in its accumulators.

#pragma once

#include "wkv6_tiles.h"

namespace tiles {

template <class In>
struct ForwardStage {
    RawRow<In> r[kTile], k[kTile], v[kTile];
    RawDecay w[kTile];
};

constexpr int kForwardStages = 3;

template <class In>
struct ForwardShared {
    ForwardStage<In> stages[kForwardStages];
    Scaled scaled;
    float u[N], bonus[kTile];
    int slot;
};

template <class In>
DEVICE void fetch_stage(const WkvProblem& p, const Sequence& s, int start, bool with_r,
                               ForwardStage<In>& stage, int threads) {
    if (start < s.length) {
        if (with_r) {
            fetch(p.r, s, start, stage.r, threads);
        }
        fetch(p.k, s, start, stage.k, threads);
        fetch(p.v, s, start, stage.v, threads);
        fetch_decay(p, s, start, stage.w, threads);
    }
    commit_copies();  // also if empty, so that the number of groups in flight stays the same
}

// scores[n] (rows g and g + 8, columns 8 n + (2t, 2t + 1)): keep pairs of a later with an earlier token, the bonus on
// the diagonal, nothing else. Selection, since what is dropped may be infinite.
DEVICE void mask(float (&scores)[2][4], const float* bonus, Lane lane) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane.g + 8 * (i / 2), column = 8 * n + 2 * lane.t + i % 2;
            const float score = to_tf32(scores[n][i]);
            scores[n][i] = column < row ? score : column == row ? to_tf32(bonus[row]) : 0.0f;
        }
    }
}

// y of the warp's 16 values: pairs within the tile and what the state (already scaled by exp(m)) gives.
template <class In>
DEVICE void outputs(const WkvProblem& p, const Sequence& s, int start, const ForwardStage<In>& stage,
                           const ForwardShared<In>& m, const StateRows& state, int first_value, Lane lane) {
    float y[2][4] = {}, scores[2][4] = {};
    add_from_state(y, m.scaled.r, state, lane);
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
        float a[4];
        load_a(m.scaled.r, step, lane, a);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float* k = &m.scaled.k[8 * n + lane.g][8 * step + 2 * lane.t];
            matmul(scores[n], a, k[0], k[1]);
        }
    }
    mask(scores, m.bonus, lane);
#pragma unroll
    for (int step = 0; step < 2; step++) {
        const float a[4] = {scores[step][0], scores[step][2], scores[step][1], scores[step][3]};
        const int token = 8 * step + 2 * lane.t;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int value = first_value + 8 * n + lane.g;
            matmul(y[n], a, to_float(stage.v[token].x[value]), to_float(stage.v[token + 1].x[value]));
        }
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        store_pairs<In>(p.y, s, start, first_value + 8 * n + 2 * lane.t, y[n], lane);
    }
}

DEVICE void keep(const StateRows& state, KeptState& kept, Lane lane) {
    float largest = 0;
#pragma unroll
    for (int n = 0; n < kSteps; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            largest = fmaxf(largest, fabsf(state.c[n][i]));
        }
    }
    for (int step = 1; step < kWarp; step *= 2) {
        largest = fmaxf(largest, shuffle_xor(largest, step));
    }
    // 2^(e - 14) for the largest number's exponent e, and its inverse, from the bits of the exponents.
    const uint32_t exponent = bits_of_float(largest) >> 23, safe = exponent < 27 ? 27 : exponent;
    const float unit = float_of_bits((safe - 14) << 23), inverse = float_of_bits((254 - (safe - 14)) << 23);
    if (lane.g == 0 && lane.t == 0) {
        kept.unit[lane.warp] = unit;
    }
#pragma unroll
    for (int n = 0; n < kSteps; n++) {
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            Float16* at = &kept.rows[16 * lane.warp + lane.g + 8 * upper][8 * n + 2 * lane.t];
            *reinterpret_cast<uint32_t*>(at) =
                pack<Float16>(state.c[n][2 * upper] * inverse, state.c[n][2 * upper + 1] * inverse);
        }
    }
}

// kStates: instead of y and the last state, keeps the state before every tile in `scratch`, for the backward pass.
template <class In, int kWarps, bool kStates>
KERNEL(32 * kWarps, 12 / kWarps)
forward(WkvProblem p) {
    constexpr int kThreads = 32 * kWarps, kSplits = 4 / kWarps;
    auto& m = *reinterpret_cast<ForwardShared<In>*>(shared_memory());
    const Lane lane = lane_of_thread();
    const Sequence s = sequence_of_turn(p, block_index() / kSplits, kThreads, &m.slot);
    const int first_value = 16 * (static_cast<int>(block_index() % kSplits) * kWarps + lane.warp);
    StateRows state;
    state.load(matrix_of(p.state, s), first_value, lane);
    if (!kStates && thread_index() < N) {
        m.u[thread_index()] = load_either<In>(p.u, s.head * N + thread_index(), p.bonus_type);
    }
    for (int i = 0; i < kForwardStages - 1; i++) {
        fetch_stage(p, s, i * kTile, !kStates, m.stages[i], kThreads);
    }
    for (int tile = 0; tile * kTile < s.length; tile++) {
        const int start = tile * kTile, ahead = tile + kForwardStages - 1;
        const ForwardStage<In>& stage = m.stages[tile % kForwardStages];
        wait_copies<kForwardStages - 2>();
        barrier();
        fetch_stage(p, s, ahead * kTile, !kStates, m.stages[ahead % kForwardStages], kThreads);
        scale(kStates ? nullptr : stage.r, stage.k, stage.w, p.decay_type, s.length - start, m.scaled, nullptr,
              kThreads);
        for (int row = thread_index() / 8; !kStates && row < kTile; row += kThreads / 8) {
            const float bonus = dot_of_row(stage.r[row], stage.k[row], m.u);
            if (thread_index() % 8 == 0) {
                m.bonus[row] = bonus;
            }
        }
        if (kStates) {
            auto* kept = static_cast<KeptState*>(p.scratch) + int64_t{s.first_tile + tile} * p.heads + s.head;
            keep(state, *kept, lane);
        }
        barrier();
        state.scale_keys(m.scaled.half[0], lane);
        if (!kStates) {
            outputs(p, s, start, stage, m, state, first_value, lane);
        }
        state.add_outer(stage.v, m.scaled.k, first_value, lane);
        state.scale_keys(m.scaled.half[1], lane);
    }
    if (!kStates) {
        state.store(matrix_of(p.last, s), first_value, lane);
    }
}

}  // namespace tiles
