// WKV-6 on a CPU, one head of one sequence at a time. Compiled with -DWKV6_ISA=avx512, avx2 or plain.
//
// Tokens go in chunks of C. With A_i the product of the decays from the chunk's start to token i, E_j from token j to
// the chunk's end, P_ij between the two and D over all of it, S the state before the chunk, one has
//     y_i = S (A_i r_i) + sum over j <= i of s_ij v_j,   s_ij = r_i . (P_ij k_j),   s_ii = r_i . (u k_i)
//     S  <- S diag(D) + sum over j of v_j (E_j k_j)^T
// so that the state is read and written once in C tokens. Everything is a product of decays, numbers from 0 to 1:
// nothing overflows or cancels. Padding after the last token is r = k = v = 0 and a decay of 1.
//
// Matrices are kept as panels of `PANEL` columns, one after the other, each with all its N rows.

#include "wkv6_cpu_kernel.h"

#include "wkv6_cpu_vectors.h"

namespace {

using wkv6_cpu::Span;

constexpr int C = 8;
constexpr int V = 2;  // vectors in a row of a panel
constexpr int PANEL = V * LANES;
constexpr int PAIRS = C * (C + 1) / 2;
constexpr int PADDED_PAIRS = (PAIRS + LANES - 1) / LANES * LANES;
constexpr int SHORT = 4;  // so few tokens are faster one by one, as the state need not be transposed
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8;  // of a tile in registers, of which there are 32
#else
constexpr int ROWS = 4;
#endif

constexpr int pair(int i, int j) { return i * (i + 1) / 2 + j; }

struct Place {
    int64_t batch, token, head;
    int count;  // tokens, up to C
};

template <int N>
using Rows = float[C][N];

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

// Token by token from and to the caller's tensors.

template <int N, class Type>
void read_as(const Wkv6Tokens& x, const Place& at, float (*out)[N]) {
    typedef typename Type::Element Element;
    const Element* data = (const Element*)x.data + at.batch * x.batch + at.token * x.time + at.head * x.head;
    for (int i = 0; i < at.count; i++, data += x.time)
        for (int n = 0; n < N; n += LANES) store(out[i] + n, Type::get(data + n));
}

template <int N>
void read(const Wkv6Tokens& x, int32_t type, const Place& at, float (*out)[N]) {
    if (type == WKV6_FLOAT32)
        read_as<N, Float32>(x, at, out);
    else if (type == WKV6_BFLOAT16)
        read_as<N, Bfloat16>(x, at, out);
    else
        read_as<N, Float16>(x, at, out);
}

template <int N>
void pad(Rows<N>& x, int count, float value) {
    for (int i = count; i < C; i++)
        for (int n = 0; n < N; n++) x[i][n] = value;
}

template <int N, class Type>
void write_as(const float (*x)[N], const Place& at, const Wkv6Tokens& out) {
    typedef typename Type::Element Element;
    Element* data = (Element*)out.data + at.batch * out.batch + at.token * out.time + at.head * out.head;
    for (int i = 0; i < at.count; i++, data += out.time)
        for (int n = 0; n < N; n += LANES) Type::put(data + n, load(x[i] + n));
}

template <int N>
void write(const Rows<N>& x, const Place& at, int32_t type, const Wkv6Tokens& out) {
    if (type == WKV6_FLOAT32)
        write_as<N, Float32>(x, at, out);
    else if (type == WKV6_BFLOAT16)
        write_as<N, Bfloat16>(x, at, out);
    else
        write_as<N, Float16>(x, at, out);
}

template <int N>
void read_bonus(const Wkv6Problem& p, int64_t head, float (*out)[N]) {
    read<N>({const_cast<void*>(p.u), 0, 0, N}, p.bonus_type, {0, 0, head, 1}, out);
}

// Brings the rows of the next chunk towards the caches, a few at a time between the tiles: fetched at once, they would
// fill the queue of misses, and the caller's rows lie too far apart for the processor to guess.
class Ahead {
    const char* data[6];
    int64_t stride[6];
    int bytes[6];
    int tensors = 0, next = 0, rows;

   public:
    // C tokens from `token`, as far as there are `count`; backwards in time, token and count may be below 0.
    explicit Ahead(int64_t count) : rows(count < 0 ? 0 : count < C ? (int)count : C) {}

    template <int N>
    void add(const Wkv6Tokens& x, int32_t type, const Place& at) {
        int size = type == WKV6_FLOAT32 ? 4 : 2;
        data[tensors] = (const char*)x.data + size * (at.batch * x.batch + at.token * x.time + at.head * x.head);
        stride[tensors] = size * x.time;
        bytes[tensors++] = size * N;
    }

    // The share of one of `tiles` tiles.
    template <int TILES>
    void fetch() {
        constexpr int share = (6 * C + TILES - 1) / TILES;
        for (int i = 0; i < share && next < tensors * rows; i++, next++) {
            int tensor = next % tensors;
            const char* row = data[tensor] + next / tensors * stride[tensor];
            for (int n = 0; n < bytes[tensor]; n += 64) __builtin_prefetch(row + n, 0, 2);
        }
    }
};

inline float* matrix(const Wkv6State& x, int64_t sequence, int64_t head) {
    return x.data + sequence * x.sequence + head * x.head;
}

// w in `rate` becomes rate = exp(w) and d = exp(-rate), up to the last token.
//
// exp(-1000) is 0: the bound on the rate makes the gradient of such a decay 0, where 0 * inf would be NaN.
template <int N>
void decays(float (*rate)[N], float (*d)[N], int count) {
    Vec lowest = broadcast(-87.0f), highest = broadcast(6.9077553f);
    for (int i = 0; i < count; i++)
        for (int n = 0; n < N; n += LANES) {
            Vec w = load(rate[i] + n);
            w = either(w < lowest, lowest, w);
            Vec x = exp(either(w > highest, highest, w));
            store(rate[i] + n, x);
            store(d[i] + n, either(x > 87.0f, Vec{}, exp(-x)));
        }
}

template <int N>
void read_update(const Wkv6Problem& p, const Place& at, Update<N>& x) {
    read<N>(p.k, p.type, at, x.k);
    read<N>(p.v, p.type, at, x.v);
    read<N>(p.w, p.decay_type, at, x.rate);
    decays<N>(x.rate, x.d, at.count);
    pad<N>(x.k, at.count, 0);
    pad<N>(x.v, at.count, 0);
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
void read_query(const Wkv6Problem& p, const Place& at, const Update<N>& update, Query<N>& x) {
    read<N>(p.r, p.type, at, x.r);
    pad<N>(x.r, at.count, 0);
    for (int n = 0; n < N; n += LANES) {
        Vec decay = broadcast(1);
        for (int i = 0; i < C; i++) {
            store(x.r_start[i] + n, load(x.r[i] + n) * decay);
            decay *= load(update.d[i] + n);
        }
    }
}

// A tile of ROWS x PANEL numbers in registers.
typedef Vec Tile[ROWS][V];

// tile += a b with a (ROWS, STEPS) and b (STEPS, PANEL).
template <int STEPS, int A_ROW, int A_STEP, int B_STEP>
inline void add_product(Tile& tile, const float* a, const float* b) {
    for (int step = 0; step < STEPS; step++, a += A_STEP, b += B_STEP) {
        Vec row[V];
        for (int x = 0; x < V; x++) row[x] = load(b + x * LANES);
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

// Forward. The state is transposed: rows are keys, columns are values.

template <int N>
void read_transposed(const float* state, float* panels) {
    for (int value = 0; value < N; value += LANES)
        for (int key = 0; key < N; key += LANES)
            transpose_block(state + value * N + key, N,
                            panels + value / PANEL * PANEL * N + key * PANEL + value % PANEL, PANEL);
}

template <int N>
void write_transposed(const float* panels, float* state) {
    for (int value = 0; value < N; value += LANES)
        for (int key = 0; key < N; key += LANES)
            transpose_block(panels + value / PANEL * PANEL * N + key * PANEL + value % PANEL, PANEL,
                            state + value * N + key, N);
}

// s_ij of all pairs j <= i.
template <int N>
void score(const Query<N>& query, const Update<N>& update, const float* u, float* scores) {
    constexpr int GROUP = N / LANES < 4 ? N / LANES : 4;
    Vec parts[PADDED_PAIRS] = {};
    for (int n = 0; n < N; n += GROUP * LANES)
        WKV6_UNROLL
        for (int j = 0; j < C; j++) {
            Vec k[GROUP];
            Vec sum = parts[pair(j, j)];
            for (int x = 0; x < GROUP; x++) {
                k[x] = load(update.k[j] + n + x * LANES);
                sum += load(u + n + x * LANES) * k[x] * load(query.r[j] + n + x * LANES);
            }
            parts[pair(j, j)] = sum;
            WKV6_UNROLL
            for (int i = j + 1; i < C; i++) {
                sum = parts[pair(i, j)];
                for (int x = 0; x < GROUP; x++) {
                    sum += load(query.r[i] + n + x * LANES) * k[x];
                    k[x] *= load(update.d[i] + n + x * LANES);
                }
                parts[pair(i, j)] = sum;
            }
        }
    for (int i = 0; i < PAIRS; i += LANES) store(scores + i, sums(parts + i));
}

// y_i = sum over j <= i of s_ij v_j.
template <int N>
void mix(const float* scores, const Rows<N>& v, Rows<N>& y) {
    WKV6_UNROLL
    for (int i = 0; i < C; i++)
        for (int n = 0; n < N; n += LANES) {
            Vec sum = {};
            for (int j = 0; j <= i; j++) sum += scores[pair(i, j)] * load(v[j] + n);
            store(y[i] + n, sum);
        }
}

// y += S (A r), then S <- S diag(D) + v^T (E k), for the values of one panel.
template <int N>
void read_and_advance(float* panel, const Query<N>& query, const Update<N>& update, int value, Rows<N>& y, Ahead& ahead) {
    for (int i = 0; i < C; i += ROWS) {
        Tile tile;
        load_tile<N>(tile, y[i] + value);
        add_product<N, N, 1, PANEL>(tile, query.r_start[i], panel);
        store_tile<N>(tile, y[i] + value);
    }
    for (int key = 0; key < N; key += ROWS, panel += ROWS * PANEL) {
        ahead.fetch<N / ROWS * N / PANEL>();
        Tile tile;
        load_tile<PANEL>(tile, panel);
        for (int m = 0; m < ROWS; m++)
            for (int x = 0; x < V; x++) tile[m][x] *= update.total[key + m];
        add_product<C, 1, N, N>(tile, update.k_end[0] + key, update.v[0] + value);
        store_tile<PANEL>(tile, panel);
    }
}

template <int N>
void step(const Wkv6Problem& p, const Span& span, int64_t head, float* state);

template <int N>
void forward(const Wkv6Problem& p, int64_t sequence, int64_t head) {
    Span span = wkv6_cpu::span_of(p, sequence);
    const float* state = matrix(p.state, sequence, head);
    float* last = matrix(p.last, sequence, head);
    if (span.count <= SHORT) {
        __builtin_memcpy(last, state, N * N * sizeof(float));
        step<N>(p, span, head, last);
        return;
    }
    alignas(64) float panels[N * N], scores[PADDED_PAIRS];
    alignas(64) float u[1][N];
    alignas(64) Rows<N> y;
    Update<N> update;
    Query<N> query;
    read_bonus<N>(p, head, u);
    read_transposed<N>(state, panels);
    for (int64_t t = 0; t < span.count; t += C) {
        Place at = {span.batch, span.first + t, head, (int)(span.count - t < C ? span.count - t : C)};
        Place next = {at.batch, at.token + C, head, 0};
        Ahead ahead(span.count - t - C);
        const Wkv6Tokens* same_type[] = {&p.r, &p.k, &p.v, &p.y};
        for (const Wkv6Tokens* x : same_type) ahead.add<N>(*x, p.type, next);
        ahead.add<N>(p.w, p.decay_type, next);
        read_update<N>(p, at, update);
        read_query<N>(p, at, update, query);
        score<N>(query, update, u[0], scores);
        mix<N>(scores, update.v, y);
        for (int value = 0; value < N; value += PANEL)
            read_and_advance<N>(panels + value * N, query, update, value, y, ahead);
        write<N>(y, at, p.type, p.y);
    }
    write_transposed<N>(panels, last);
}

// Token by token on the caller's state: rows are values, columns are keys.
template <int N>
void step(const Wkv6Problem& p, const Span& span, int64_t head, float* state) {
    alignas(64) float u[1][N];
    alignas(64) Rows<N> r, k, v, rate, d, y;
    read_bonus<N>(p, head, u);
    for (int64_t t = 0; t < span.count; t++) {
        Place at = {span.batch, span.first + t, head, 1};
        read<N>(p.r, p.type, at, r);
        read<N>(p.k, p.type, at, k);
        read<N>(p.v, p.type, at, v);
        read<N>(p.w, p.decay_type, at, rate);
        decays<N>(rate, d, 1);
        Vec products = {};
        for (int n = 0; n < N; n += LANES) products += load(u[0] + n) * load(k[0] + n) * load(r[0] + n);
        float bonus = 0;
        for (int i = 0; i < LANES; i++) bonus += products[i];
        for (int value = 0; value < N; value += LANES) {
            Vec parts[LANES];
            for (int m = 0; m < LANES; m++) {
                float* row = state + (value + m) * N;
                Vec sum = {};
                for (int n = 0; n < N; n += LANES) {
                    Vec s = load(row + n);
                    sum += s * load(r[0] + n);
                    store(row + n, s * load(d[0] + n) + v[0][value + m] * load(k[0] + n));
                }
                parts[m] = sum;
            }
            store(y[0] + value, sums(parts) + bonus * load(v[0] + value));
        }
        write<N>(y, at, p.type, p.y);
    }
}

// Backward. Rows are values, columns are keys, in the state and in its gradient dS.

template <int N>
struct alignas(64) Gradients {
    Rows<N> dy, r, k, v;
    Rows<N> log;         // of log d = -rate, which is its own derivative by w
    float log_total[N];  // the part of all of the chunk's tokens
    float bonus[N];      // of u, from all chunks
};

template <int N>
struct alignas(64) Kept {
    float state[N * N];  // before the chunk, in panels
    Update<N> update;
};

template <int N>
constexpr int SEGMENT = (1 << 17) / (N * N);  // chunks: their states take 512 KiB, which many second-level caches hold

// to = from diag(D) + b^T a with the rows of a scaled to the keys' end of the chunk; may be in place.
template <int N>
void advance(const float* from, const float* total, const Rows<N>& a, const Rows<N>& b, int key, float* to,
             Ahead& ahead) {
    for (int value = 0; value < N; value += ROWS, from += ROWS * PANEL, to += ROWS * PANEL) {
        ahead.fetch<N / ROWS * N / PANEL>();
        Tile tile;
        load_tile<PANEL>(tile, from);
        for (int m = 0; m < ROWS; m++)
            for (int x = 0; x < V; x++) tile[m][x] *= load(total + key + x * LANES);
        add_product<C, 1, N, N>(tile, b[0] + value, a[0] + key);
        store_tile<PANEL>(tile, to);
    }
}

// Keeps what a segment's chunks start from; the state after it goes to `end`, if that is not null.
template <int N>
void sweep(const Wkv6Problem& p, Place at, int64_t tokens, const float* start, Kept<N>* kept, float* end) {
    __builtin_memcpy(kept->state, start, sizeof kept->state);
    for (; tokens > 0; tokens -= C, at.token += C, kept++) {
        at.count = tokens < C ? (int)tokens : C;
        Place next = {at.batch, at.token + C, at.head, 0};
        Ahead ahead(tokens - C);
        ahead.add<N>(p.k, p.type, next);
        ahead.add<N>(p.v, p.type, next);
        ahead.add<N>(p.w, p.decay_type, next);
        read_update<N>(p, at, kept->update);
        float* after = tokens > C ? kept[1].state : end;
        for (int key = 0; after && key < N; key += PANEL)
            advance<N>(kept->state + key * N, kept->update.total, kept->update.k_end, kept->update.v, key,
                       after + key * N, ahead);
    }
}

// g.v_j = sum over i >= j of s_ij dy_i; scores become dy_i . v_j.
template <int N>
void mix_back(float* scores, const Rows<N>& v, Gradients<N>& g) {
    constexpr int GROUP = N / LANES < 4 ? N / LANES : 4;
    Vec parts[PADDED_PAIRS] = {};
    for (int n = 0; n < N; n += GROUP * LANES)
        for (int j = 0; j < C; j++) {
            Vec sum[GROUP] = {};
            for (int i = j; i < C; i++) {
                Vec part = parts[pair(i, j)];
                for (int x = 0; x < GROUP; x++) {
                    Vec dy = load(g.dy[i] + n + x * LANES);
                    sum[x] += scores[pair(i, j)] * dy;
                    part += dy * load(v[j] + n + x * LANES);
                }
                parts[pair(i, j)] = part;
            }
            for (int x = 0; x < GROUP; x++) store(g.v[j] + n + x * LANES, sum[x]);
        }
    for (int i = 0; i < PAIRS; i += LANES) store(scores + i, sums(parts + i));
}

// The columns from `key` of the panel pass into g.r = S^T dy, g.k = dS^T v, log_total = colsum(S dS D) and
// g.v += dS (E k); then dS becomes the gradient of the state before the chunk.
template <int N>
void panel_back(const Query<N>& query, const Kept<N>& kept, int key, float* dstate, Gradients<N>& g,
                Ahead& ahead) {
    const float* state = kept.state + key * N;
    float* panel = dstate + key * N;
    for (int i = 0; i < C; i += ROWS) {
        Tile tile = {};
        add_product<N, N, 1, PANEL>(tile, g.dy[i], state);
        store_tile<N>(tile, g.r[i] + key);
    }
    for (int j = 0; j < C; j += ROWS) {
        Tile tile = {};
        add_product<N, N, 1, PANEL>(tile, kept.update.v[j], panel);
        store_tile<N>(tile, g.k[j] + key);
    }
    for (int x = 0; x < PANEL; x += LANES) {
        Vec sum[4] = {};
        for (int value = 0; value < N; value += 4)
            for (int m = 0; m < 4; m++)
                sum[m] += load(state + (value + m) * PANEL + x) * load(panel + (value + m) * PANEL + x);
        Vec total = load(kept.update.total + key + x);
        store(g.log_total + key + x, ((sum[0] + sum[1]) + (sum[2] + sum[3])) * total);
    }
    alignas(64) float transposed[PANEL * N];
    for (int value = 0; value < N; value += LANES)
        for (int x = 0; x < PANEL; x += LANES)
            transpose_block(panel + value * PANEL + x, PANEL, transposed + x * N + value, N);
    for (int value = 0; value < N; value += PANEL)
        for (int j = 0; j < C; j += ROWS) {
            Tile tile;
            load_tile<N>(tile, g.v[j] + value);
            add_product<PANEL, N, 1, N>(tile, kept.update.k_end[j] + key, transposed + value);
            store_tile<N>(tile, g.v[j] + value);
        }
    advance<N>(panel, kept.update.total, query.r_start, g.dy, key, panel, ahead);
}

// From the gradients of r and k as decayed at the chunk's ends to those of r, k, log d and u, with the pairs inside
// the chunk; of these `dots` holds dy_i . v_j. The log decay of a token gains r dr or k dk of all that passes through it.
template <int N>
void inside_back(const Query<N>& query, const Update<N>& update, const float* u, const float* dots, Gradients<N>& g) {
    for (int n = 0; n < N; n += LANES) {
        Vec d[C], r[C], dr[C], log[C], bonus = load(g.bonus + n), u_n = load(u + n);
        Vec through = load(g.log_total + n), decay = broadcast(1);
        for (int i = C - 1; i >= 0; i--) {
            log[i] = through;
            through += load(query.r_start[i] + n) * load(g.r[i] + n);
        }
        for (int i = 0; i < C; i++) {
            d[i] = load(update.d[i] + n);
            r[i] = load(query.r[i] + n);
            dr[i] = load(g.r[i] + n) * decay;
            decay *= d[i];
        }
        through = Vec{};
        WKV6_UNROLL
        for (int j = 0; j < C; j++) {
            Vec k = load(update.k[j] + n), later[C];
            log[j] += through;
            through += load(update.k_end[j] + n) * load(g.k[j] + n);
            Vec rk = dots[pair(j, j)] * r[j];
            dr[j] += dots[pair(j, j)] * u_n * k;
            bonus += rk * k;
            Vec dk = rk * u_n;
            decay = broadcast(1);
            WKV6_UNROLL
            for (int i = j + 1; i < C; i++) {
                Vec factor = dots[pair(i, j)] * decay;
                Vec part = factor * r[i];
                dk += part;
                dr[i] += factor * k;
                later[i] = part * k;
                decay *= d[i];
            }
            store(g.k[j] + n, dk + decay * load(g.k[j] + n));
            Vec between = {};
            WKV6_UNROLL
            for (int i = C - 1; i > j + 1; i--) {
                between += later[i];
                log[i - 1] += between;
            }
        }
        for (int i = 0; i < C; i++) {
            store(g.r[i] + n, dr[i]);
            store(g.log[i] + n, -load(update.rate[i] + n) * log[i]);
        }
        store(g.bonus + n, bonus);
    }
}

template <int N>
void chunk_back(const Wkv6Problem& p, const Place& at, const float* u, const Kept<N>& kept, float* dstate,
                Gradients<N>& g, bool first) {
    Place next = {at.batch, at.token - C, at.head, 0};
    Ahead ahead(first ? 0 : C);
    const Wkv6Tokens* same_type[] = {&p.r, &p.dy, &p.dr, &p.dk, &p.dv};
    for (const Wkv6Tokens* x : same_type) ahead.add<N>(*x, p.type, next);
    ahead.add<N>(p.dw, p.decay_type, next);
    alignas(64) float scores[PADDED_PAIRS];
    Query<N> query;
    read_query<N>(p, at, kept.update, query);
    read<N>(p.dy, p.type, at, g.dy);
    pad<N>(g.dy, at.count, 0);
    score<N>(query, kept.update, u, scores);
    mix_back<N>(scores, kept.update.v, g);
    for (int key = 0; key < N; key += PANEL) panel_back<N>(query, kept, key, dstate, g, ahead);
    inside_back<N>(query, kept.update, u, scores, g);
    write<N>(g.r, at, p.type, p.dr);
    write<N>(g.k, at, p.type, p.dk);
    write<N>(g.v, at, p.type, p.dv);
    write<N>(g.log, at, p.decay_type, p.dw);
}

template <int N>
void to_panels(const float* from, float* to) {
    for (int value = 0; value < N; value++)
        for (int key = 0; key < N; key += LANES)
            store(to + key / PANEL * PANEL * N + value * PANEL + key % PANEL, load(from + value * N + key));
}

template <int N>
void from_panels(const float* from, float* to) {
    for (int value = 0; value < N; value++)
        for (int key = 0; key < N; key += LANES)
            store(to + value * N + key, load(from + key / PANEL * PANEL * N + value * PANEL + key % PANEL));
}

// In scratch: the states that segments start from, then what is kept of the chunks of one segment.
template <int N>
int64_t scratch(int64_t longest) {
    int64_t chunks = (longest + C - 1) / C, segments = (chunks + SEGMENT<N> - 1) / SEGMENT<N>;
    return segments * N * N * (int64_t)sizeof(float) +
           (chunks < SEGMENT<N> ? chunks : SEGMENT<N>)*(int64_t)sizeof(Kept<N>);
}

template <int N>
void backward(const Wkv6Problem& p, int64_t sequence, int64_t head, void* memory) {
    Span span = wkv6_cpu::span_of(p, sequence);
    constexpr int64_t length = SEGMENT<N> * C;
    int64_t segments = (span.count + length - 1) / length;
    float* starts = (float*)memory;
    Kept<N>* kept = (Kept<N>*)(starts + segments * N * N);
    alignas(64) float dstate[N * N], u[1][N];
    Gradients<N> g;
    for (int n = 0; n < N; n++) g.bonus[n] = 0;
    read_bonus<N>(p, head, u);
    to_panels<N>(matrix(p.dlast, sequence, head), dstate);
    if (segments) to_panels<N>(matrix(p.state, sequence, head), starts);
    for (int64_t s = 0; s < segments - 1; s++)
        sweep<N>(p, {span.batch, span.first + s * length, head, C}, length, starts + s * N * N, kept,
                 starts + (s + 1) * N * N);
    for (int64_t s = segments - 1; s >= 0; s--) {
        Place at = {span.batch, span.first + s * length, head, C};
        int64_t tokens = s < segments - 1 ? length : span.count - s * length;
        sweep<N>(p, at, tokens, starts + s * N * N, kept, nullptr);
        for (int64_t n = (tokens - 1) / C; n >= 0; n--) {
            at.token = span.first + s * length + n * C;
            at.count = tokens - n * C < C ? (int)(tokens - n * C) : C;
            chunk_back<N>(p, at, u[0], kept[n], dstate, g, n == 0);
        }
    }
    from_panels<N>(dstate, matrix(p.dstate, sequence, head));
    float* du = p.du + (sequence * p.heads + head) * N;
    for (int n = 0; p.need_du && n < N; n++) du[n] = g.bonus[n];
}

// From a head size known at run time to one known at compile time.

void any_forward(const Wkv6Problem& p, int64_t sequence, int64_t head) {
    (p.head_size == 32 ? forward<32> : p.head_size == 64 ? forward<64> : forward<128>)(p, sequence, head);
}

void any_backward(const Wkv6Problem& p, int64_t sequence, int64_t head, void* memory) {
    (p.head_size == 32 ? backward<32> : p.head_size == 64 ? backward<64> : backward<128>)(p, sequence, head, memory);
}

void any_step(const Wkv6Problem& p, int64_t sequence, int64_t head) {
    (p.head_size == 32 ? step<32> : p.head_size == 64 ? step<64> : step<128>)(
        p, wkv6_cpu::span_of(p, sequence), head, matrix(p.state, sequence, head));
}

int64_t any_scratch(int64_t head_size, int64_t longest) {
    return (head_size == 32 ? scratch<32> : head_size == 64 ? scratch<64> : scratch<128>)(longest);
}

}  // namespace

#define WKV6_STRING(x) #x
#define WKV6_NAME(x) WKV6_STRING(x)

const wkv6_cpu::Kernels wkv6_cpu::WKV6_ISA = {WKV6_NAME(WKV6_ISA), any_forward, any_backward, any_step, any_scratch};
