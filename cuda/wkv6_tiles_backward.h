// Second generation, backward: a block per sequence and head, from its last token to its first.
//
// `states` has kept the state S before every 64 tokens. Those 64 are passed forwards, where S gives dr, and then
// backwards, where the state's gradient G gives dk and dv. Both are accumulators of keys by values. In the scaled
// quantities of wkv6_tiles.h, with P_ij = dy_i . v_j for i > j,
//     dr~ = exp(m) dy S + P k~      dk~ = exp(c_16 - m) v G + P^T r~      dv = k^ G + (r~ k~^T)^T dy
//     S <- S exp(c_16) + k^^T v     G <- G exp(c_16) + r^^T dy
// Of a key, S . G before token t is d_t S_t . G_(t+1) + r_t dr_t, and after it d_t S_t . G_(t+1) + k_t dk_t: so the
// gradient of a log decay is a running sum, which starts anew from the exact S . G after every 64 tokens. Both terms
// use the same rounded r~, k~ and P, so that what cancels does so exactly.

#pragma once

#include "wkv6_tiles_operands.h"

namespace tiles {

template <class Decay>
struct BackwardShared {
    BackwardStage<Decay> stages[2];
    Square squares[kWarps];
    union {
        Parts dv;
        KeptState gradient;  // on the way forwards, which needs its registers
    };
    Left left[kTilesOfState];
    float u[N];
    // Kept here, for registers are scarce; all threads write the same.
    Target of_keys, of_values;  // of dr, dk and dw, and of dv
    const KeptState* kept;
    float *dstate, *du;
};

// Forwards over one tile: writes dr, keeps r dr for the way back.
template <class Decay>
DEVICE void pass_forwards(const WkvProblem& p, const BackwardStage<Decay>& stage, int tile, int count,
                          BackwardShared<Decay>& m, Left& left, StateRows& state, Lane lane) {
    Square& square = m.squares[lane.warp];
    Scaled x;
    x.set(stage, count, lane, left);
    Own k_transposed, raw_k, k;
    load_own(stage.k, lane, raw_k);
    float pairs[2][4] = {}, d[2][4] = {}, diagonal[2], u[4];
    lay_down(x.k, square, lane);
    warp_barrier();
#pragma unroll
    for (int part = 0; part < N / 16; part++) {
        products_over_values(stage.dy, stage.v, SplitValues(state, part), part, pairs, d);
    }
    diagonal_of(pairs, lane, diagonal);
    mask<true>(pairs, {0.0f, 0.0f}, lane);
    pick_up(square, lane, k_transposed);
    add_pairs(x.first, pairs, k_transposed, d);
    load4(m.u + lane.key(), u);
    const int64_t at = m.of_keys.at(tile, 2 * lane.g, lane.key());
    const int time = m.of_keys.time;
#pragma unroll
    for (int token = 0; token < 2; token++) {
        float product[4], out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float of_scaled = of_own(d, token, i);
            product[i] = x.r[token][i] * of_scaled;
            out[i] = of_scaled * x.r_factor[token][i] + diagonal[token] * u[i] * raw_k[token][i];
        }
        store4(left.r_dr[token][thread_index()], product);
        if (2 * lane.g + token < count) {
            store4(static_cast<In*>(p.dr.data) + at + token * time, out);
        }
    }
    times(x.k, x.second, k);
    float decay[2];
    decay_of_rows(left.factors[lane.warp], lane, decay);
    state.pass_tile(decay, turned_a(k), stage.v);
}

// The gradients of the log decays of the lane's own tokens and keys: `sums` is S . G after the tile, and then before
// it.
DEVICE void decay_gradients(const Own& r_dr, const Own& k_dk, float (&sums)[4], Lane lane, Own& gradients) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float second = r_dr[1][i] - k_dk[1][i];
        float all;
        const float after = sum_after(r_dr[0][i] - k_dk[0][i] + second, sums[i], lane, all);
        gradients[1][i] = after - k_dk[1][i];
        gradients[0][i] = after + second - k_dk[0][i];
        sums[i] += all;
    }
}

// Over 16 values: what products_over_values gives of v, dy and the gradient; the warp's part of dv, k (tokens by keys)
// times the gradient plus scores times dy; and the gradient before the tile, from r (keys by tokens) and dy.
template <class Decay>
DEVICE void pass_values_backwards(const BackwardStage<Decay>& stage, int part, const SplitA& k, const SplitA& scores,
                                  const SplitA& r, const float (&decay)[2], StateRows& gradient, float (&pairs)[2][4],
                                  float (&d)[2][4], Parts& dv, Lane lane) {
    const SplitValues g(gradient, part);
    uint32_t dy[4];
    load_values<true, true>(stage.dy, part, dy);
    products_over_values(stage.v, stage.dy, g, part, pairs, d);
#pragma unroll
    for (int eight = 0; eight < 2; eight++) {
        const uint32_t high[2] = {transpose_matrix(g.high[0][eight]), transpose_matrix(g.high[1][eight])};
        const uint32_t low[2] = {transpose_matrix(g.low[0][eight]), transpose_matrix(g.low[1][eight])};
        float out[4] = {};
        matmul(out, k.high, high[0], high[1]);
        matmul(out, k.high, low[0], low[1]);
        matmul(out, k.low, high[0], high[1]);
        matmul(out, scores.high, dy[2 * eight], dy[2 * eight + 1]);
        matmul(out, scores.low, dy[2 * eight], dy[2 * eight + 1]);
        dv.put(lane, 16 * part + 8 * eight, out);
        gradient.pass_tile(2 * part + eight, decay, r, dy[2 * eight], dy[2 * eight + 1]);
    }
}

// What one tile adds to the running sums of a lane's own keys: S . G, which enters as it is after the tile, and du.
struct KeySums {
    float overlap[4], du[4];
};

// Backwards over one tile: writes dk and dw, the warp's part of dv.
template <class Decay>
DEVICE void pass_backwards(const WkvProblem& p, const BackwardStage<Decay>& stage, int tile, int count,
                           BackwardShared<Decay>& m, const Left& left, StateRows& gradient, KeySums& sums, Lane lane) {
    Square& square = m.squares[lane.warp];
    Scaled x;
    x.set_again(stage, count, lane, left);
    Own r, k, r_transposed, k_dk, of_r, dlog;
    float scores[2][4] = {}, pairs[2][4] = {}, d[2][4] = {}, bonus[2], diagonal[2], u[4];
    load_own(stage.r, lane, r);
    load_own(stage.k, lane, k);
    load4(m.u + lane.key(), u);
    bonus_of(r, k, u, bonus);
    pairs_of_own(x.k, x.r, scores);
    mask<false>(scores, bonus, lane);
    lay_down(x.r, square, lane);
    warp_barrier();
    float decay[2];
    decay_of_rows(left.factors[lane.warp], lane, decay);
    times(x.k, x.second, k);
    times(x.r, x.first, r);
    const SplitA k_of_end = split_own(k), r_of_start = turned_a(r), all_scores = split_accumulators(scores);
#pragma unroll
    for (int part = 0; part < N / 16; part++) {
        pass_values_backwards(stage, part, k_of_end, all_scores, r_of_start, decay, gradient, pairs, d, m.dv, lane);
    }
    diagonal_of(pairs, lane, diagonal);
    mask<false>(pairs, {0.0f, 0.0f}, lane);
    pick_up(square, lane, r_transposed);
    add_pairs(x.second, pairs, r_transposed, d);
    load_own(stage.r, lane, r);
    load_own(stage.k, lane, k);
    load4(m.u + lane.key(), u);
    const int64_t at = m.of_keys.at(tile, 2 * lane.g, lane.key());
    const int time = m.of_keys.time;
#pragma unroll
    for (int token = 0; token < 2; token++) {
        float out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float of_scaled = of_own(d, token, i);
            k_dk[token][i] = x.k[token][i] * of_scaled;
            const float of_bonus = diagonal[token] * r[token][i];
            out[i] = of_scaled * x.k_factor[token][i] + of_bonus * u[i];
            sums.du[i] += of_bonus * k[token][i];
        }
        if (2 * lane.g + token < count) {
            store4(static_cast<In*>(p.dk.data) + at + token * time, out);
        }
        load4(left.r_dr[token][thread_index()], of_r[token]);
    }
    decay_gradients(of_r, k_dk, sums.overlap, lane, dlog);
#pragma unroll
    for (int token = 0; token < 2; token++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float rate = x.rates[token][i];  // a decay that was cut has no gradient
            dlog[token][i] = rate < kMaxRate ? -kLn2 * rate * dlog[token][i] : 0.0f;
        }
        if (2 * lane.g + token < count) {
            store4(static_cast<Decay*>(p.dw.data) + at + token * time, dlog[token]);
        }
    }
}

// Needs what `states` keeps.
template <class Decay>
KERNEL(kThreads, kBackwardBlocks)
backward(WkvProblem p) {
    auto& m = *reinterpret_cast<BackwardShared<Decay>*>(shared_memory());
    const Lane lane = lane_of_thread();
    const Sequence s = sequence_of_turn(p, block_index());
    const Sources<Decay> sources(p, s);
    const Source<In> source_dy(p.dy, s);
    const auto fetch = [&](int tile, int count, BackwardStage<Decay>& to) {
        sources.fetch(tile, count, to);
        source_dy.fetch(tile, count, to.dy);
        commit_copies();
    };
    m.of_keys = Target(p.dr, s);
    m.of_values = Target(p.dv, s);
    m.kept = static_cast<const KeptState*>(p.scratch) + first_kept(p, s, kKeptEvery) * p.heads + s.head;
    m.dstate = matrix_of(p.dstate, s);
    m.du = p.du + (s.index * p.heads + s.head) * N;
    StateRows gradient;
    gradient.load(matrix_of(p.dlast, s), lane);
    KeySums sums = {};
    if (thread_index() < N) {
        m.u[thread_index()] = load_either<In>(p.u, s.head * N + thread_index(), p.bonus_type);
    }
    int turn = 0;
    // The stage of the tile that was fetched last, after which `next` is fetched; zeros if it is negative.
    const auto advance = [&](int next) -> const BackwardStage<Decay>& {
        wait_copies<0>();
        barrier();
        turn = 1 - turn;
        fetch(next, next < 0 ? 0 : s.length - next * kTile, m.stages[turn]);
        return m.stages[1 - turn];
    };
    const int tiles = tiles_of(s), last = (tiles + kTilesOfState - 1) / kTilesOfState * kTilesOfState - kTilesOfState;
    if (tiles > 0) {
        fetch(last, s.length - last * kTile, m.stages[0]);
    }
#pragma unroll 1
    for (int begin = last; begin >= 0; begin -= kTilesOfState) {
        const int end = begin + kTilesOfState < tiles ? begin + kTilesOfState : tiles;
        barrier();
        gradient.store(m.gradient, lane);
        StateRows state;
        state.load(m.kept[begin / kTilesOfState * p.heads], lane);
#pragma unroll 1
        for (int tile = begin; tile < end; tile++) {
            const auto& stage = advance(tile + 1 < end ? tile + 1 : tile);
            const int count = s.length - tile * kTile;
            pass_forwards(p, stage, tile, count, m, m.left[tile - begin], state, lane);
        }
        gradient.load(m.gradient, lane);
        state.overlap(gradient, lane, sums.overlap);
#pragma unroll 1
        for (int tile = end - 1; tile >= begin; tile--) {
            const auto& stage = advance(tile > begin ? tile - 1 : begin - kTilesOfState);
            const int count = s.length - tile * kTile;
            pass_backwards(p, stage, tile, count, m, m.left[tile - begin], gradient, sums, lane);
            barrier();
            m.dv.store_sum(p.dv.data, m.of_values, tile, count);
        }
    }
    wait_copies<0>();
    gradient.store(m.dstate, lane);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        for (int step = 4; step < kWarp; step *= 2) {
            sums.du[i] += shuffle_xor(sums.du[i], step);
        }
    }
    if (p.need_du && lane.g == 0) {
        store4(m.du + lane.key(), sums.du);
    }
}

}  // namespace tiles
