// What the first generation's kernels of WKV-6 and WKV-7 share: how a block's threads divide a head's state.
//
// Thread 4 i + p holds row i (value) of the state at a quarter of the keys: 16 c + 4 p + (0 .. 3), so that the four
// threads of a row read a token's vectors as neighbouring 16-byte words. Tokens come in tiles through shared memory.

#pragma once

#include "sequences.h"

namespace steps {

constexpr int kParts = 4;

template <int N>
struct Shape {
    static constexpr int kRows = N < 64 ? N : 64;  // of the state, per block
    static constexpr int kBlocks = N / kRows;      // per sequence and head
    static constexpr int kThreads = kParts * kRows;
};

// e^-1000 is zero in float32: the bound makes the gradient of such a decay 0, where 0 * inf would be NaN.
constexpr float kMaxRate = 1000.0f;

// exp(-exp(w)), finite for any w but NaN.
DEVICE float decay_of(float w) { return exp_accurate(-exp_accurate(w)); }

DEVICE int key_of(int part, int i) { return 16 * (i / 4) + 4 * part + i % 4; }

// A thread's share of a row, by 16 bytes.
template <int N>
DEVICE void read_row(const float* row, int part, float (&S)[N / kParts]) {
#pragma unroll
    for (int i = 0; i < N / kParts; i += 4) {
        float four[4];
        load4(row + key_of(part, i), four);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            S[i + j] = four[j];
        }
    }
}

template <int N>
DEVICE void write_row(const float (&S)[N / kParts], int part, float* row) {
#pragma unroll
    for (int i = 0; i < N / kParts; i += 4) {
        store4(row + key_of(part, i), {S[i], S[i + 1], S[i + 2], S[i + 3]});
    }
}

DEVICE float over_parts(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// sums[t] = column `key` of an N x N matrix, by rows[t]; the four threads of a key share the rows of the column.
// `overlap` gains the products with the same column of `other`, if there is one.
template <int N>
DEVICE void project(const float* matrix, const float (*rows)[N + 4], int key, int part, const float* other,
                    float& overlap, float (&sums)[kTile]) {
    constexpr int kShare = N / kParts, kChunk = kShare < 16 ? kShare : 16;
#pragma unroll
    for (int t = 0; t < kTile; t++) {
        sums[t] = 0;
    }
    // In chunks that leave registers free.
#pragma unroll 1
    for (int first = part * kShare; first < (part + 1) * kShare; first += kChunk) {
        float share[kChunk];
#pragma unroll
        for (int i = 0; i < kChunk; i++) {
            share[i] = matrix[(first + i) * N + key];
            overlap += other == nullptr ? 0.0f : share[i] * other[(first + i) * N + key];
        }
#pragma unroll
        for (int t = 0; t < kTile; t++) {
#pragma unroll
            for (int i = 0; i < kChunk; i++) {
                sums[t] += share[i] * rows[t][first + i];
            }
        }
    }
#pragma unroll
    for (int t = 0; t < kTile; t++) {
        sums[t] = over_parts(sums[t]);
    }
}

// One of four neighbours in an array that stays in registers.
DEVICE float pick(const float* x, int part) {
    const float low = part == 0 ? x[0] : x[1], high = part == 2 ? x[2] : x[3];
    return part < 2 ? low : high;
}

constexpr int kOwn = kTile / kParts;  // a thread's own tokens are part, part + 4 ...

}  // namespace steps
