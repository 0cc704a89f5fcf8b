// Second generation, backward: 4 warps per sequence and head, from the last tile to the first.
//
// Each warp keeps 16 rows (values) of the state's gradient G in its accumulators and gives dv of those values; dr, dk
// and dw it gives for its 16 keys, for which G also lies in shared memory beside the state S before the tile. In the
// scaled quantities of wkv6_tiles.h, with S' = S exp(m), G' = G exp(c_16 - m) and P_ij = dy_i . v_j for i > j,
//     dr~ = dy S' + P k~        dk~ = v G' + P^T r~
// and the gradient of log decay t sums r~ dr~ of the later tokens less k~ dk~ of those from t on, starting from
// S' . G' plus what v G' gave: every tile starts from exact terms, and both sums use the same rounded r~, k~ and P,
// so that what cancels does so exactly.

#pragma once

#include "wkv6_tiles.h"

namespace tiles {

constexpr int kThreads = 128;
constexpr int kGradientPitch = N + 4;  // rows 2t and columns g fall into different banks
constexpr int kPairPitch = kTile + 4;
constexpr int kBackwardStages = 2;

template <class In>
struct BackwardStage {
    RawRow<In> r[kTile], k[kTile], v[kTile], dy[kTile];
    RawDecay w[kTile];
    RawRow<Float16> state[N];
    float unit[4];
};

template <class In>
struct BackwardShared {
    BackwardStage<In> stages[kBackwardStages];
    Scaled scaled;
    float c[kTile + 1][kPitch];
    float gradient[N][kGradientPitch];  // G' in TF32
    float scores[kTile][kPairPitch];    // r~_i . k~_j, the bonus on the diagonal
    float pairs[kTile][kPairPitch];     // P
    float u[N], bonus[kTile], bonus_pair[kTile];  // u, r . (u k), dy . v
    int slot;
};

template <class In>
DEVICE void fetch_stage(const WkvProblem& p, const Sequence& s, int tile, BackwardStage<In>& stage) {
    if (tile >= 0) {
        const int start = tile * kTile;
        fetch(p.r, s, start, stage.r, kThreads);
        fetch(p.k, s, start, stage.k, kThreads);
        fetch(p.v, s, start, stage.v, kThreads);
        fetch(p.dy, s, start, stage.dy, kThreads);
        fetch_decay(p, s, start, stage.w, kThreads);
        const auto& kept = static_cast<const KeptState*>(p.scratch)[int64_t{s.first_tile + tile} * p.heads + s.head];
        for (int i = thread_index(); i < N * 8; i += kThreads) {
            copy_async(&stage.state[i / 8].x[8 * (i % 8)], &kept.rows[i / 8][8 * (i % 8)], true);
        }
        if (thread_index() == 0) {
            copy_async(stage.unit, kept.unit, true);
        }
    }
    commit_copies();
}

// Warps 0 and 1: scores, warps 2 and 3: P; each 16 x 8.
template <class In>
DEVICE void pair_products(const BackwardStage<In>& stage, BackwardShared<In>& m, Lane lane) {
    float c[4] = {};
    const int n = lane.warp % 2, column = 8 * n + lane.g;
    const bool scores = lane.warp < 2;
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
        float a[4], b0, b1;
        if (scores) {
            load_a(m.scaled.r, step, lane, a);
            b0 = m.scaled.k[column][8 * step + 2 * lane.t];
            b1 = m.scaled.k[column][8 * step + 2 * lane.t + 1];
        } else {
            load_a(stage.dy, step, lane, a);
            unpack<In>(*reinterpret_cast<const uint32_t*>(&stage.v[column].x[8 * step + 2 * lane.t]), b0, b1);
        }
        matmul(c, a, b0, b1);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = lane.g + 8 * (i / 2), of = 8 * n + 2 * lane.t + i % 2;
        const float diagonal = scores ? m.bonus[row] : 0.0f;
        (scores ? m.scores : m.pairs)[row][of] = of < row ? to_tf32(c[i]) : of == row ? to_tf32(diagonal) : 0.0f;
    }
}

// dv of the warp's 16 values.
template <class In>
DEVICE void value_gradients(const WkvProblem& p, const Sequence& s, int start,
                                   const BackwardStage<In>& stage, const BackwardShared<In>& m,
                                   const StateRows& gradient, Lane lane) {
    float dv[2][4] = {};
    add_from_state(dv, m.scaled.k, gradient, lane);
#pragma unroll
    for (int step = 0; step < 2; step++) {
        const int i = 8 * step + lane.t;
        const float a[4] = {m.scores[i][lane.g], m.scores[i][lane.g + 8], m.scores[i + 4][lane.g],
                            m.scores[i + 4][lane.g + 8]};
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int value = 16 * lane.warp + 8 * n + lane.g;
            matmul(dv[n], a, to_float(stage.dy[i].x[value]), to_float(stage.dy[i + 4].x[value]));
        }
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        store_pairs<In>(p.dv, s, start, 16 * lane.warp + 8 * n + 2 * lane.t, dv[n], lane);
    }
}

// For eight keys: dr~ (rows g, g + 8; keys 2t, 2t + 1), dk~ from G' and from pairs, and S' . G' of those two keys.
struct KeyGradients {
    float r[4], k_state[4], k_pairs[4], overlap[2];
};

template <class In>
DEVICE KeyGradients key_gradients(const BackwardStage<In>& stage, const BackwardShared<In>& m, int first_key,
                                         Lane lane) {
    KeyGradients d = {};
    const int key = first_key + lane.g;
    const float middle = m.scaled.half[0][key];
    float overlap = 0;
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
        const int value = 8 * step + 2 * lane.t;
        const float unit = stage.unit[step / 2] * middle;
        float dy[4], v[4];
        load_a(stage.dy, step, lane, dy);
        load_a(stage.v, step, lane, v);
        const float s0 = to_tf32(to_float(stage.state[value].x[key]) * unit);
        const float s1 = to_tf32(to_float(stage.state[value + 1].x[key]) * unit);
        const float g0 = m.gradient[value][key], g1 = m.gradient[value + 1][key];
        matmul(d.r, dy, s0, s1);
        matmul(d.k_state, v, g0, g1);
        overlap += s0 * g0 + s1 * g1;
    }
    overlap += shuffle_xor(overlap, 1);
    overlap += shuffle_xor(overlap, 2);
    // Lane 4 g + t knows the sum of key g; it needs those of keys 2t and 2t + 1.
    d.overlap[0] = shuffle(overlap, 8 * lane.t);
    d.overlap[1] = shuffle(overlap, 8 * lane.t + 4);
#pragma unroll
    for (int step = 0; step < 2; step++) {
        const int i = 8 * step + lane.t;
        const float rows[4] = {m.pairs[lane.g][i], m.pairs[lane.g + 8][i], m.pairs[lane.g][i + 4],
                               m.pairs[lane.g + 8][i + 4]};
        const float columns[4] = {m.pairs[i][lane.g], m.pairs[i][lane.g + 8], m.pairs[i + 4][lane.g],
                                  m.pairs[i + 4][lane.g + 8]};
        matmul(d.r, rows, m.scaled.k[i][key], m.scaled.k[i + 4][key]);
        matmul(d.k_pairs, columns, m.scaled.r[i][key], m.scaled.r[i + 4][key]);
    }
    return d;
}

// Sums over the lanes g' >= g with the same t.
DEVICE float sum_from(float x, int g) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
        const float other = shuffle_down(x, 4 * step);
        x += g + step < 8 ? other : 0.0f;
    }
    return x;
}

// The gradients of the log decays of one key at tokens g and g + 8, from r~ dr~ and k~ dk~ there.
DEVICE void scan(const float (&r)[2], const float (&k_state)[2], const float (&k_pairs)[2], float overlap, int g,
                        int t, float (&dlog)[2]) {
    const float k[2] = {k_state[0] + k_pairs[0], k_state[1] + k_pairs[1]};
    float after = k_state[0] + k_state[1];
#pragma unroll
    for (int step = 4; step < kWarp; step *= 2) {
        after += shuffle_xor(after, step);
    }
    after += overlap;  // S . G after the last token
    const float upper = sum_from(r[1] - k[1], g), lower = sum_from(r[0] - k[0], g);
    const float whole_upper = shuffle(upper, t);
    dlog[1] = after + (upper - (r[1] - k[1])) - k[1];
    dlog[0] = after + whole_upper + (lower - (r[0] - k[0])) - k[0];
}

// What a thread writes for one token: two neighbouring keys of dr, dk and dw; adds to du.
template <class In>
DEVICE void store_keys(const WkvProblem& p, const Sequence& s, int start, int token, int key,
                              const BackwardStage<In>& stage, const BackwardShared<In>& m, const float (&dr)[2],
                              const float (&dk)[2], const float (&dlog)[2], float (&du)[2]) {
    if (start + token >= s.length) {
        return;
    }
    float r[2], k[2], out_r[2], out_k[2], out_w[2];
    unpack<In>(*reinterpret_cast<const uint32_t*>(&stage.r[token].x[key]), r[0], r[1]);
    unpack<In>(*reinterpret_cast<const uint32_t*>(&stage.k[token].x[key]), k[0], k[1]);
    const float pair = m.bonus_pair[token];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float rate = rate_of<In>(stage.w[token], key + i, p.decay_type);
        out_r[i] = dr[i] * exp2_fast(m.c[token][key + i]) + pair * m.u[key + i] * k[i];
        out_k[i] = dk[i] * exp2_fast(-m.c[token + 1][key + i]) + pair * m.u[key + i] * r[i];
        out_w[i] = rate < kMaxRate ? -rate * dlog[i] : 0.0f;  // a decay that was cut has no gradient
        du[i] += pair * r[i] * k[i];
    }
    *reinterpret_cast<uint32_t*>(row_of<In>(p.dr, s, start + token) + key) = pack<In>(out_r[0], out_r[1]);
    *reinterpret_cast<uint32_t*>(row_of<In>(p.dk, s, start + token) + key) = pack<In>(out_k[0], out_k[1]);
    const int64_t at = offset_of(p.dw, s, start + token) + key;
    store_either<In>(p.dw.data, at, p.decay_type, out_w[0]);
    store_either<In>(p.dw.data, at + 1, p.decay_type, out_w[1]);
}

// dr, dk and dw of eight keys.
template <class In>
DEVICE void keys(const WkvProblem& p, const Sequence& s, int start, int first_key,
                        const BackwardStage<In>& stage, const BackwardShared<In>& m, Lane lane, float (&du)[2]) {
    const KeyGradients d = key_gradients(stage, m, first_key, lane);
    const int key = first_key + 2 * lane.t;
    float dlog[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float r[2], k_state[2], k_pairs[2], of_key[2];
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const int token = lane.g + 8 * upper;
            const float scaled_k = m.scaled.k[token][key + i];
            r[upper] = m.scaled.r[token][key + i] * d.r[2 * upper + i];
            k_state[upper] = scaled_k * d.k_state[2 * upper + i];
            k_pairs[upper] = scaled_k * d.k_pairs[2 * upper + i];
        }
        scan(r, k_state, k_pairs, d.overlap[i], lane.g, lane.t, of_key);
        dlog[0][i] = of_key[0];
        dlog[1][i] = of_key[1];
    }
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        const float dr[2] = {d.r[2 * upper], d.r[2 * upper + 1]};
        const float dk[2] = {d.k_state[2 * upper] + d.k_pairs[2 * upper],
                             d.k_state[2 * upper + 1] + d.k_pairs[2 * upper + 1]};
        store_keys(p, s, start, lane.g + 8 * upper, key, stage, m, dr, dk, dlog[upper], du);
    }
}

// G' to shared memory, in TF32.
template <class In>
DEVICE void publish(const StateRows& gradient, BackwardShared<In>& m, Lane lane) {
#pragma unroll
    for (int n = 0; n < kSteps; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            m.gradient[16 * lane.warp + lane.g + 8 * (i / 2)][8 * n + 2 * lane.t + i % 2] = to_tf32(gradient.c[n][i]);
        }
    }
}

// Needs the states before every tile in `scratch`, one KeptState per tile and head.
template <class In>
KERNEL(kThreads, 2)
backward(WkvProblem p) {
    auto& m = *reinterpret_cast<BackwardShared<In>*>(shared_memory());
    const Lane lane = lane_of_thread();
    const Sequence s = sequence_of_turn(p, block_index(), kThreads, &m.slot);
    StateRows gradient;
    gradient.load(matrix_of(p.dlast, s), 16 * lane.warp, lane);
    float du[2][2] = {};
    if (thread_index() < N) {
        m.u[thread_index()] = load_either<In>(p.u, s.head * N + thread_index(), p.bonus_type);
    }
    const int last = (s.length + kTile - 1) / kTile - 1;
    fetch_stage(p, s, last, m.stages[0]);
    for (int tile = last, turn = 0; tile >= 0; tile--, turn++) {
        const int start = tile * kTile;
        const BackwardStage<In>& stage = m.stages[turn % kBackwardStages];
        wait_copies<0>();
        barrier();
        fetch_stage(p, s, tile - 1, m.stages[(turn + 1) % kBackwardStages]);
        scale(stage.r, stage.k, stage.w, p.decay_type, s.length - start, m.scaled, m.c, kThreads);
        const int row = thread_index() / 8;
        const float bonus = dot_of_row(stage.r[row], stage.k[row], m.u);
        const float bonus_pair = dot_of_row(stage.dy[row], stage.v[row], nullptr);
        if (thread_index() % 8 == 0) {
            m.bonus[row] = bonus;
            m.bonus_pair[row] = bonus_pair;
        }
        barrier();
        gradient.scale_keys(m.scaled.half[1], lane);
        publish(gradient, m, lane);
        pair_products(stage, m, lane);
        barrier();
        value_gradients(p, s, start, stage, m, gradient, lane);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            keys(p, s, start, 16 * lane.warp + 8 * n, stage, m, lane, du[n]);
        }
        gradient.add_outer(stage.dy, m.scaled.r, 16 * lane.warp, lane);
        gradient.scale_keys(m.scaled.half[0], lane);
    }
    gradient.store(matrix_of(p.dstate, s), 16 * lane.warp, lane);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float sum = du[i / 2][i % 2];
        for (int step = 4; step < kWarp; step *= 2) {
            sum += shuffle_xor(sum, step);
        }
        if (p.need_du && lane.g == 0) {
            p.du[(s.index * p.heads + s.head) * N + 16 * lane.warp + 8 * (i / 2) + 2 * lane.t + i % 2] = sum;
        }
    }
}

}  // namespace tiles
