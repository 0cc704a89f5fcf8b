// Second generation: tiles of 16 tokens on the tensor cores; bfloat16, head size 64.
//
// Each of a block's 4 warps has 16 of the head's 64 keys and all that belongs to them: receptances, keys, decays, the
// state's columns and their gradients. In a tile, c_i is the sum of the log decays before token i, m = c_8. With
//     r~_i = r_i exp(c_i - m),  k~_j = k_j exp(m - c_(j+1))
// a pair of tokens is r~_i . k~_j, and all pairs are one matrix product, of which a warp has the part of its keys. With
//     r^_i = r_i exp(c_i),  k^_j = k_j exp(c_16 - c_(j+1))
// y_i = S r^_i from the state before the tile, which then becomes S exp(c_16) + sum of v_j k^_j. Log decays are cut at
// -9: e^-9 is far below the resolution of the inputs, and e^(8 * 9) stays in range. Pairs that do not exist may
// overflow: they are masked by selection.
//
// Lane 4 g + t has the fragments that the matrix products ask for. It owns tokens 2g and 2g + 1 and keys 4t to 4t + 3
// of its warp's, and what it knows of them is a fragment as it stands, as no product cares about the order of its rows,
// columns or inner index: row or column x (0 to 7) of half h is token 2x + h, and key 4 (x / 2) + 2h + x % 2. Side by
// side in a fragment lie tokens 4t + h and 4t + h + 2, and keys 4t + 2h and 4t + 2h + 1. Values keep their order.

#pragma once

#include "sequences.h"

namespace tiles {

using In = Bfloat16;

constexpr int N = 64;
constexpr int kWarps = 4, kThreads = kWarp * kWarps;
constexpr int kPitch = N + 8;  // of rows in shared memory: those of eight tokens fall into different banks
// Blocks that fit a multiprocessor by their registers: on an H100 as many as by shared memory, elsewhere fewer fit
// anyway.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kForwardBlocks = 5, kBackwardBlocks = 3;
#else
constexpr int kForwardBlocks = 4, kBackwardBlocks = 2;
#endif
constexpr float kMaxRate = 9 * kLog2E;  // exp(w) and more, as a power of two
constexpr float kLog2OfLog2E = 0.528766373f;
constexpr float kLn2 = 0.693147181f;

// 16 tokens of one tensor as they come from global memory.
template <class T>
struct Rows {
    T x[kTile][kPitch];
};

struct Lane {
    int warp, g, t;

    DEVICE int key() const { return 16 * warp + 4 * t; }  // the first of its own four
};

DEVICE Lane lane_of_thread() {
    const int lane = thread_index() % kWarp;
    return {thread_index() / kWarp, lane / 4, lane % 4};
}

// How many tiles a sequence has.
DEVICE int tiles_of(const Sequence& s) { return (s.length + kTile - 1) / kTile; }

// What a thread copies of a tensor's tiles into Rows: 16 bytes of each 128 of one token, the same of every tensor.
template <class T>
struct Source {
    const char* first;
    int step;  // bytes from tile to tile

    DEVICE Source(const WkvTokens& x, const Sequence& s)
        : first(reinterpret_cast<const char*>(row_of<T>(x, s, thread_index() / 8)) + 16 * (thread_index() % 8)),
          step(static_cast<int>(x.time) * kTile * static_cast<int>(sizeof(T))) {}

    // `count` tokens of the tile are there.
    DEVICE void fetch(int tile, int count, Rows<T>& to) const {
        const int token = thread_index() / 8;
        char* at = reinterpret_cast<char*>(to.x[token]) + 16 * (thread_index() % 8);
        const char* from = first + int64_t{tile} * step;
#pragma unroll
        for (int more = 0; more < N * static_cast<int>(sizeof(T)); more += 128) {
            copy_async(at + more, from + more, token < count);
        }
    }
};

// What every direction reads of a tile.
template <class Decay>
struct Stage {
    Rows<In> r, k, v;
    Rows<Decay> w;
};

template <class Decay>
struct Sources {
    Source<In> r, k, v;
    Source<Decay> w;

    DEVICE Sources(const WkvProblem& p, const Sequence& s) : r(p.r, s), k(p.k, s), v(p.v, s), w(p.w, s) {}

    DEVICE void fetch(int tile, int count, Stage<Decay>& to) const {
        r.fetch(tile, count, to.r);
        k.fetch(tile, count, to.k);
        v.fetch(tile, count, to.v);
        w.fetch(tile, count, to.w);
    }
};

// Where a head of a sequence lies in a tensor that is written.
struct Target {
    int64_t first;  // elements from the tensor's start
    int time;

    DEVICE Target(const WkvTokens& x, const Sequence& s)
        : first(offset_of(x, s, 0)), time(static_cast<int>(x.time)) {}

    DEVICE int64_t at(int tile, int token, int channel) const {
        return first + int64_t{tile * kTile + token} * time + channel;
    }
};

// A lane's own two tokens and four keys of one tensor.
using Own = float[2][4];

template <class T>
DEVICE void load_own(const Rows<T>& rows, Lane lane, Own& x) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        load4(&rows.x[2 * lane.g + i][lane.key()], x[i]);
    }
}

// exp(w) of a lane's own tokens and keys, cut, as a power of two: 0 for tokens past the end.
template <class Decay>
DEVICE void load_rates(const Rows<Decay>& w, int count, Lane lane, Own& rates) {
    load_own(w, lane, rates);
#pragma unroll
    for (int token = 0; token < 2; token++) {
        const float most = 2 * lane.g + token < count ? kMaxRate : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            rates[token][i] = fminf(exp2_fast(rates[token][i] * kLog2E + kLog2OfLog2E), most);
        }
    }
}

// `after` and the sum of what the lanes with later tokens own; and the sum over all lanes.
DEVICE float sum_after(float own, float after, Lane lane, float& all) {
    const float next = shuffle_xor(own, 4), pair = own + next;
    const float next_pair = shuffle_xor(pair, 8), half = pair + next_pair, other = shuffle_xor(half, 16);
    if (!(lane.g & 1)) {
        after += next;
    }
    if (!(lane.g & 2)) {
        after += next_pair;
    }
    if (!(lane.g & 4)) {
        after += other;
    }
    all = half + other;
    return after;
}

// Of one key: what the rates add up to from the middle of the tile to before each of the lane's tokens and after them,
// and over each half of the tile.
struct Sums {
    float before[3], first, second;
};

DEVICE Sums sums_of_key(const Own& rates, int key, Lane lane) {
    const float own = rates[0][key] + rates[1][key];
    const float next = shuffle_xor(own, 4), pair = own + next;
    const float next_pair = shuffle_xor(pair, 8), half = pair + next_pair, other = shuffle_xor(half, 16);
    const bool late = lane.g >= 4;
    Sums x;
    x.before[0] = late ? 0.0f : -half;
    if (lane.g & 1) {
        x.before[0] += next;
    }
    if (lane.g & 2) {
        x.before[0] += next_pair;
    }
    x.before[1] = x.before[0] + rates[0][key];
    x.before[2] = x.before[1] + rates[1][key];
    x.first = late ? other : half;
    x.second = late ? half : other;
    return x;
}

// Step `step` of what a lane owns as operand a: its tokens by its keys.
DEVICE void own_a(const Own& x, int step, float (&a)[4]) {
    a[0] = x[0][2 * step];
    a[1] = x[1][2 * step];
    a[2] = x[0][2 * step + 1];
    a[3] = x[1][2 * step + 1];
}

// A pair of float32 as the sum of two pairs of bfloat16, each in a word. The tensor cores multiply both with inputs as
// they are, at the price of one product in TF32, and lose next to nothing.
struct Split {
    uint32_t high, low;
};

DEVICE Split split(float first, float second) {
    float high[2];
    const uint32_t word = pack<In>(first, second);
    unpack<In>(word, high[0], high[1]);
    return {word, pack<In>(first - high[0], second - high[1])};
}

// What a lane owns, turned: the warp's keys by the tile's tokens, [half of the keys][half of the tokens], two tokens in
// a word.
struct Turned {
    uint32_t high[2][2], low[2][2];
};

DEVICE Turned turn(const Own& x) {
    Turned y;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int token = 0; token < 2; token++) {
            const Split pair = split(x[token][2 * half], x[token][2 * half + 1]);
            y.high[half][token] = transpose_matrix(pair.high);
            y.low[half][token] = transpose_matrix(pair.low);
        }
    }
    return y;
}

// Operand a of a 16 x 16 matrix as the sum of two.
struct SplitA {
    uint32_t high[4], low[4];

    DEVICE void set(int i, float first, float second) {
        const Split pair = split(first, second);
        high[i] = pair.high;
        low[i] = pair.low;
    }
};

// Accumulators of a 16 x 16 product, [half of the columns], as operand a.
DEVICE SplitA split_accumulators(const float (&c)[2][4]) {
    SplitA a;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a.set(i, c[i / 2][2 * (i % 2)], c[i / 2][2 * (i % 2) + 1]);
    }
    return a;
}

// 16 values of the tile's tokens, in four 8 x 8 matrices: x[2 half + eight] or, if kByEights, x[2 eight + half] of a
// half of the tokens and the first or second eight values. A word has two neighbouring values of a token; transposed,
// two tokens of a value.
template <bool kTransposed, bool kByEights>
DEVICE void load_values(const Rows<In>& rows, int part, uint32_t (&x)[4]) {
    const int lane = thread_index() % kWarp, low = lane / 8 % 2, high = lane / 16;
    const int half = kByEights ? low : high, eight = kByEights ? high : low;
    load_matrices<kTransposed>(&rows.x[2 * (lane % 8) + half][16 * part + 8 * eight], x);
}

// Tokens by tokens, of which `kEarlier` keeps pairs of a row's token with an earlier one, otherwise with a later one,
// and `diagonal` (of the lane's own tokens) on the diagonal. Selection, since what is dropped may be infinite.
template <bool kEarlier>
DEVICE void mask(float (&pairs)[2][4], const float (&diagonal)[2], Lane lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // A row's token less its column's is twice `apart` and this: so few comparisons serve all.
            const int apart = lane.g - 2 * lane.t - i % 2, more = i / 2 - half;
            const float other = more == 0 && apart == 0 ? diagonal[i / 2] : 0.0f;
            const bool keep = kEarlier ? apart >= (more > 0 ? 0 : 1) : apart < (more < 0 ? 1 : 0);
            pairs[half][i] = keep ? pairs[half][i] : other;
        }
    }
}

// a b^T over the warp's keys: tokens by tokens.
DEVICE void pairs_of_own(const Own& rows, const Own& columns, float (&pairs)[2][4]) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
        float a[4];
        own_a(rows, step, a);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            matmul(pairs[half], a, columns[half][2 * step], columns[half][2 * step + 1]);
        }
    }
}

// r . (u k) of the lane's own tokens over the warp's keys.
DEVICE void bonus_of(const Own& r, const Own& k, const float (&u)[4], float (&bonus)[2]) {
#pragma unroll
    for (int token = 0; token < 2; token++) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum += r[token][i] * k[token][i] * u[i];
        }
        sum += shuffle_xor(sum, 1);
        bonus[token] = sum + shuffle_xor(sum, 2);
    }
}

// 16 tokens by 64 values, of which each warp has the part of its keys.
struct Parts {
    float x[kWarps][kTile][N + 4];

    // Two values of each of the lane's own tokens.
    DEVICE void put(Lane lane, int value, const float (&y)[4]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            *reinterpret_cast<Float2*>(&x[lane.warp][2 * lane.g + i][value + 2 * lane.t]) = {{y[2 * i], y[2 * i + 1]}};
        }
    }

    // The sum of the warps' parts; a thread writes twice four values of one token. Needs a barrier before and after.
    DEVICE void store_sum(void* data, const Target& to, int tile, int count) const {
        const int token = thread_index() / 8, value = 4 * (thread_index() % 8);
        In* at = static_cast<In*>(data) + to.at(tile, token, value);
        if (token >= count) {
            return;
        }
#pragma unroll
        for (int more = 0; more < N; more += 32) {
            float sum[4];
            load4(&x[0][token][value + more], sum);
#pragma unroll
            for (int warp = 1; warp < kWarps; warp++) {
                float part[4];
                load4(&x[warp][token][value + more], part);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sum[i] += part[i];
                }
            }
            store4(at + more, sum);
        }
    }
};

}  // namespace tiles
