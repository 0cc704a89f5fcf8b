// What the passes of the CPU kernel share: rows of tokens, decays, scores, products of small matrices.
//
// Tokens go in chunks of C. With A_i the product of the decays from the chunk's start to token i, E_j from token j to
// the chunk's end, P_ij between the two and D over all of it, S the state before the chunk, one has
//     y_i = S (A_i r_i) + sum over j <= i of s_ij v_j,   s_ij = r_i . (P_ij k_j),   s_ii = r_i . (u k_i)
//     S  <- S diag(D) + sum over j of v_j (E_j k_j)^T
// so that the state is read and written once in C tokens. All factors are products of decays, numbers from 0 to 1:
// nothing overflows or cancels. Padding after the last token is r = k = v = 0 and a decay of 1.

#pragma once

#include "wkv_cpu_rows.h"

namespace {

constexpr int V = 2;  // vectors in a row of a tile
constexpr int PANEL = V * LANES;
constexpr int PAIRS = C * (C + 1) / 2;
constexpr int PADDED_PAIRS = (PAIRS + LANES - 1) / LANES * LANES;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8;   // of a tile in registers, of which there are 32
constexpr int BURST = 1;  // rows of tokens that are fetched together, or more
#else
constexpr int ROWS = 4;
constexpr int BURST = 8;  // one by one, between tiles that are small, each would wait for its page to be found
#endif

// Vectors of a row that are taken together when scores are summed.
template <int N>
constexpr int GROUP = N / LANES < 4 ? N / LANES : 4;

// Where token i's pair with token j <= i lies.
constexpr int pair(int i, int j) { return i * (i + 1) / 2 + j; }

// N x N matrices lie in panels of PANEL columns, one after the other, each with all rows.
template <int N>
constexpr int in_panels(int row, int column) {
    return column / PANEL * PANEL * N + row * PANEL + column % PANEL;
}

// What a chunk does to the state.
template <int N>
struct alignas(64) Update {
    Rows<N> k, v, d, rate;  // rate = exp(w), d = exp(-rate)
    Rows<N> k_end;          // E k
    float total[N];         // D
};

template <int N>
struct alignas(64) Query {
    Rows<N> r, r_start;  // A r
};

template <int N>
void pad(Rows<N>& x, int count, float value) {
    for (int i = count; i < C; i++)
        for (int n = 0; n < N; n++) x[i][n] = value;
}

template <int N>
void read_padded(const WkvTokens& x, int32_t type, const Place& at, Rows<N>& out) {
    read<N>(x, type, at, out);
    pad<N>(out, at.count, 0);
}

template <int N>
void read_bonus(const WkvProblem& p, int64_t head, float (*out)[N]) {
    read<N>({const_cast<void*>(p.u), 0, 0, N}, p.bonus_type, {0, 0, head, 1}, out);
}

// Brings the rows of a chunk to come towards the caches, a few at a time, between the tiles of the present one: fetched
// at once, they would fill the queue of misses; and they lie too far apart for the processor to foresee.
class Ahead {
    static constexpr int most = 6;
    Place at;
    const char* data[most];
    int64_t stride[most];
    int bytes[most];
    int tensors = 0, tensor = 0, token = 0, due = 0;

   public:
    explicit Ahead(const Place& place) : at(place) {}

    template <int N>
    void add(const WkvTokens& x, int32_t type) {
        int size = type == WKV_FLOAT32 ? 4 : 2;
        data[tensors] = (const char*)x.data + size * (at.batch * x.batch + at.token * x.time + at.head * x.head);
        stride[tensors] = size * x.time;
        bytes[tensors++] = size * N;
    }

    // The share of one of the tiles of an N x N matrix.
    template <int N>
    void fetch() {
        constexpr int tiles = N / ROWS * N / PANEL, share = (most * C + tiles - 1) / tiles;
        if ((due += share) < BURST) return;
        for (; due > 0 && token < at.count; due--) {
            for (int n = 0; n < bytes[tensor]; n += 64) __builtin_prefetch(data[tensor] + n, 0, 2);
            data[tensor] += stride[tensor];
            if (++tensor == tensors) tensor = 0, token++;
        }
    }
};

template <int N>
void read_update(const WkvProblem& p, const Place& at, Update<N>& x) {
    read_padded<N>(p.k, p.type, at, x.k);
    read_padded<N>(p.v, p.type, at, x.v);
    read<N>(p.w, p.decay_type, at, x.rate);
    decays<N>(x.rate, x.d, at.count);
    pad<N>(x.rate, at.count, 0);
    pad<N>(x.d, at.count, 1);
    for (int n = 0; n < N; n += LANES) {
        Vec decay = broadcast(1);
        for (int j = C - 1; j >= 0; j--) {
            store(x.k_end[j] + n, load(x.k[j] + n) * decay);
            decay *= load(x.d[j] + n);
        }
        store(x.total + n, decay);
    }
}

template <int N>
void read_query(const WkvProblem& p, const Place& at, const Update<N>& update, Query<N>& x) {
    read_padded<N>(p.r, p.type, at, x.r);
    for (int n = 0; n < N; n += LANES) {
        Vec decay = broadcast(1);
        for (int i = 0; i < C; i++) {
            store(x.r_start[i] + n, load(x.r[i] + n) * decay);
            decay *= load(update.d[i] + n);
        }
    }
}

// s_ij of all pairs j <= i.
template <int N>
void score(const Query<N>& query, const Update<N>& update, const float* u, float* scores) {
    Vec parts[PADDED_PAIRS] = {};
    for (int n = 0; n < N; n += GROUP<N> * LANES)
        WKV_UNROLL
        for (int j = 0; j < C; j++) {
            Vec k[GROUP<N>];
            Vec sum = parts[pair(j, j)];
            for (int x = 0; x < GROUP<N>; x++) {
                k[x] = load(update.k[j] + n + x * LANES);
                sum += load(u + n + x * LANES) * k[x] * load(query.r[j] + n + x * LANES);
            }
            parts[pair(j, j)] = sum;
            WKV_UNROLL
            for (int i = j + 1; i < C; i++) {
                sum = parts[pair(i, j)];
                for (int x = 0; x < GROUP<N>; x++) {
                    sum += load(query.r[i] + n + x * LANES) * k[x];
                    k[x] *= load(update.d[i] + n + x * LANES);
                }
                parts[pair(i, j)] = sum;
            }
        }
    for (int i = 0; i < PAIRS; i += LANES) store(scores + i, sums(parts + i));
}

// A tile of ROWS x PANEL numbers in registers.
typedef Vec Tile[ROWS][V];

// tile += a b with a (ROWS, STEPS) and b (STEPS, PANEL).
template <int STEPS, int A_ROW, int A_STEP, int B_STEP>
inline void add_product(Tile& tile, const float* a, const float* b) {
    for (int step = 0; step < STEPS; step++, a += A_STEP, b += B_STEP) {
        Vec row[V];
        for (int x = 0; x < V; x++) hold(row[x] = load(b + x * LANES));
        for (int m = 0; m < ROWS; m++)
            for (int x = 0; x < V; x++) tile[m][x] += a[m * A_ROW] * row[x];
    }
}

template <int STRIDE>
inline void load_tile(Tile& tile, const float* from) {
    for (int m = 0; m < ROWS; m++)
        for (int x = 0; x < V; x++) tile[m][x] = load(from + m * STRIDE + x * LANES);
}

template <int STRIDE>
inline void store_tile(const Tile& tile, float* to) {
    for (int m = 0; m < ROWS; m++)
        for (int x = 0; x < V; x++) store(to + m * STRIDE + x * LANES, tile[m][x]);
}

}  // namespace
