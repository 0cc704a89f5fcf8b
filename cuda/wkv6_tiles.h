// Second generation: tiles of 16 tokens on the tensor cores; bfloat16 or float16, head size 64.
//
// In a tile, c_i is the sum of the log decays before token i and m = c_8 the middle. With
//     r~_i = r_i exp(c_i - m),  k~_j = k_j exp(m - c_(j+1))
// a pair of tokens is r~_i . k~_j, and all pairs are one matrix product. Before it the state's columns are scaled by
// exp(m), after it by exp(c_16 - m). Log decays are cut at -9: e^-9 is far below the resolution of the inputs, and
// e^(8 * 9) stays in range. Pairs that do not exist may overflow: they are masked by selection.
//
// Lane 4 g + t of warp q has the fragments that `matmul` describes. Where the inner index of a product may be
// permuted, it is, so that accumulators serve as operands: 2t and 2t + 1 stand where t and t + 4 would.

#pragma once

#include "sequences.h"

namespace tiles {

constexpr int N = 64;
constexpr int kHalf = kTile / 2;
constexpr int kSteps = N / 8;     // of a product over channels, and the 8-wide parts of its result
constexpr int kPitch = N + 8;     // floats or halves: rows t and columns g fall into different banks
constexpr float kMaxRate = 9.0f;  // exp(w) and more

// The words of a token's 64 channels as they come from global memory.
template <class In>
struct RawRow {
    In x[kPitch];
};

struct RawDecay {
    char bytes[N * sizeof(float) + 16];
};

struct Lane {
    int warp, g, t;
};

DEVICE Lane lane_of_thread() {
    const int lane = thread_index() % kWarp;
    return {thread_index() / kWarp, lane / 4, lane % 4};
}

// Tokens start .. start + 15 of one tensor into 16 rows, 16 bytes a copy, zeros past the end.
DEVICE void fetch(const WkvTokens& x, const Sequence& s, int start, int element_size, char* rows, int pitch,
                         int threads) {
    const int per_row = N * element_size / 16;
    for (int i = thread_index(); i < kTile * per_row; i += threads) {
        const int token = i / per_row, part = i % per_row;
        const bool valid = start + token < s.length;
        const int64_t offset = valid ? offset_of(x, s, start + token) * element_size + part * 16 : 0;
        copy_async(rows + token * pitch + part * 16, static_cast<const char*>(x.data) + offset, valid);
    }
}

template <class In>
DEVICE void fetch(const WkvTokens& x, const Sequence& s, int start, RawRow<In>* rows, int threads) {
    fetch(x, s, start, sizeof(In), reinterpret_cast<char*>(rows), sizeof(RawRow<In>), threads);
}

DEVICE void fetch_decay(const WkvProblem& p, const Sequence& s, int start, RawDecay* rows, int threads) {
    fetch(p.w, s, start, p.decay_type == WKV_FLOAT32 ? 4 : 2, rows[0].bytes, sizeof(RawDecay), threads);
}

// exp(w) of a token's channel; the caller cuts it.
template <class In>
DEVICE float rate_of(const RawDecay& row, int channel, int32_t type) {
    return exp2_fast(load_either<In>(row.bytes, channel, type) * kLog2E);
}

template <class In>
DEVICE float log2_decay(const RawDecay& row, int channel, int32_t type, bool valid) {
    const float rate = rate_of<In>(row, channel, type);
    return valid ? -kLog2E * (rate < kMaxRate ? rate : kMaxRate) : 0.0f;
}

struct Scaled {
    float r[kTile][kPitch];  // r~ in TF32
    float k[kTile][kPitch];  // k~ in TF32
    float half[2][N];        // exp(m), exp(c_16 - m)
};

// r~, k~ and the decays of the tile's halves; a thread per channel and half. Without `r` no r~ is made; `c` (17 rows),
// if given, gets c_i - m in log2.
template <class In>
DEVICE void scale(const RawRow<In>* r, const RawRow<In>* k, const RawDecay* w, int32_t decay_type, int count,
                         Scaled& out, float (*c)[kPitch], int threads) {
    const int channel = thread_index() % N;
    for (int half = thread_index() / N; half < 2; half += threads / N) {
        // From the middle outwards: `sum` is the log decay between the middle and the token, `decay` its power of two.
        float sum = 0, decay = 1;
#pragma unroll 4
        for (int i = 0; i < kHalf; i++) {
            const int token = half ? kHalf + i : kHalf - 1 - i;
            const float before = decay;
            sum += log2_decay<In>(w[token], channel, decay_type, token < count);
            decay = exp2_fast(sum);
            const float growth = exp2_fast(-sum);
            out.k[token][channel] = to_tf32(to_float(k[token].x[channel]) * (half ? growth : before));
            if (r != nullptr) {
                out.r[token][channel] = to_tf32(to_float(r[token].x[channel]) * (half ? before : growth));
            }
            if (c != nullptr) {
                c[half ? token + 1 : token][channel] = half ? sum : -sum;
            }
        }
        out.half[half][channel] = decay;
        if (c != nullptr && half == 0) {
            c[kHalf][channel] = 0;
        }
    }
}

// The sum over a token's channels of x weight y, by eight threads; without `weight` of x y.
template <class In>
DEVICE float dot_of_row(const RawRow<In>& x, const RawRow<In>& y, const float* weight) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int channel = 8 * (thread_index() % 8) + i;
        sum += to_float(x.x[channel]) * to_float(y.x[channel]) * (weight == nullptr ? 1.0f : weight[channel]);
    }
    for (int mask = 1; mask < 8; mask *= 2) {
        sum += shuffle_xor(sum, mask);
    }
    return sum;
}

// Rows g and g + 8, columns 8 step + (2t, 2t + 1) of a 16 x 64 matrix, as operand a with a permuted inner index.
DEVICE void load_a(const float (*rows)[kPitch], int step, Lane lane, float (&a)[4]) {
    const int column = 8 * step + 2 * lane.t;
    a[0] = rows[lane.g][column];
    a[2] = rows[lane.g][column + 1];
    a[1] = rows[lane.g + 8][column];
    a[3] = rows[lane.g + 8][column + 1];
}

template <class In>
DEVICE void load_a(const RawRow<In>* rows, int step, Lane lane, float (&a)[4]) {
    const int column = 8 * step + 2 * lane.t;
    unpack<In>(*reinterpret_cast<const uint32_t*>(&rows[lane.g].x[column]), a[0], a[2]);
    unpack<In>(*reinterpret_cast<const uint32_t*>(&rows[lane.g + 8].x[column]), a[1], a[3]);
}

// Columns first + g and first + g + 8 of tokens 8 step + (t, t + 4), as operand a: the transposed rows.
template <class In>
DEVICE void load_a_transposed(const RawRow<In>* rows, int step, int first, Lane lane, float (&a)[4]) {
    const int token = 8 * step + lane.t;
    a[0] = to_float(rows[token].x[first + lane.g]);
    a[1] = to_float(rows[token].x[first + lane.g + 8]);
    a[2] = to_float(rows[token + 4].x[first + lane.g]);
    a[3] = to_float(rows[token + 4].x[first + lane.g + 8]);
}

// A warp's 16 rows (values) of an N x N state: c[n] are keys 8 n + (2t, 2t + 1) of rows g and g + 8.
struct StateRows {
    float c[kSteps][4];

    DEVICE void load(const float* matrix, int first_row, Lane lane) {
#pragma unroll
        for (int n = 0; n < kSteps; n++) {
            const float* at = matrix + (first_row + lane.g) * N + 8 * n + 2 * lane.t;
            c[n][0] = at[0];
            c[n][1] = at[1];
            c[n][2] = at[8 * N];
            c[n][3] = at[8 * N + 1];
        }
    }

    DEVICE void store(float* matrix, int first_row, Lane lane) const {
#pragma unroll
        for (int n = 0; n < kSteps; n++) {
            float* at = matrix + (first_row + lane.g) * N + 8 * n + 2 * lane.t;
            at[0] = c[n][0];
            at[1] = c[n][1];
            at[8 * N] = c[n][2];
            at[8 * N + 1] = c[n][3];
        }
    }

    DEVICE void scale_keys(const float* factors, Lane lane) {
#pragma unroll
        for (int n = 0; n < kSteps; n++) {
            const float first = factors[8 * n + 2 * lane.t], second = factors[8 * n + 2 * lane.t + 1];
            c[n][0] *= first;
            c[n][1] *= second;
            c[n][2] *= first;
            c[n][3] *= second;
        }
    }

    // += x^T y over the tile's tokens: x gives the values, y (TF32) the keys.
    template <class In>
    DEVICE void add_outer(const RawRow<In>* x, const float (*y)[kPitch], int first_row, Lane lane) {
#pragma unroll
        for (int step = 0; step < 2; step++) {
            float a[4];
            load_a_transposed(x, step, first_row, lane, a);
#pragma unroll
            for (int n = 0; n < kSteps; n++) {
                matmul(c[n], a, y[8 * step + lane.t][8 * n + lane.g], y[8 * step + lane.t + 4][8 * n + lane.g]);
            }
        }
    }
};

// += a (16 tokens x 64 keys) times the warp's rows of the state, transposed: 16 tokens x 16 values.
DEVICE void add_from_state(float (&y)[2][4], const float (*a_rows)[kPitch], const StateRows& state, Lane lane) {
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
        float a[4];
        load_a(a_rows, step, lane, a);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            matmul(y[n], a, to_tf32(state.c[step][2 * n]), to_tf32(state.c[step][2 * n + 1]));
        }
    }
}

// Two columns 8 n + (2t, 2t + 1) of rows g and g + 8, if they are tokens of the sequence.
template <class In>
DEVICE void store_pairs(const WkvTokens& x, const Sequence& s, int start, int column, const float (&c)[4],
                               Lane lane) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        const int token = start + lane.g + 8 * upper;
        if (token < s.length) {
            *reinterpret_cast<uint32_t*>(row_of<In>(x, s, token) + column) = pack<In>(c[2 * upper], c[2 * upper + 1]);
        }
    }
}

// States between the passes: float16, each warp's 16 rows with a power of two that puts their largest at 2^14.
struct KeptState {
    Float16 rows[N][N];
    float unit[4];  // what 1 stands for, per 16 rows
    float unused[28];  // 128 bytes: the next one is aligned to a cache line
};

}  // namespace tiles
