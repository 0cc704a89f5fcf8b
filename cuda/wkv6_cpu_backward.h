// WKV-6 backwards, one head of one sequence at a time.
//
// A sweep forwards keeps the state before each chunk; then come the chunks, last to first. With dS the gradient of the
// state after a chunk, and the notation of wkv6_cpu_chunk.h,
//     dr_i = A_i S^T dy_i + sum over j < i of (dy_i . v_j) P_ij k_j + (dy_i . v_i) u k_i
//     dk_j = E_j dS^T v_j + sum over i > j of (dy_i . v_j) P_ij r_i + (dy_j . v_j) u r_j
//     dv_j = dS (E_j k_j) + sum over i >= j of s_ij dy_i
//     dS  <- dS diag(D) + sum over i of dy_i (A_i r_i)^T
// The gradient of a token's log decay is the sum of r dr over all that passes through it: S to dS, S to later tokens,
// earlier tokens to dS, and earlier tokens to later ones. None of these terms has to cancel another.

#pragma once

#include "wkv6_cpu_chunk.h"

namespace {

// Rows of matrices are values, columns are keys.

template <int N>
struct alignas(64) Gradients {
    Rows<N> dy, r, k, v, w;
    float log_total[N];  // of the log decays: what passes through all of the chunk
    float u[N];          // from all chunks so far
};

template <int N>
struct alignas(64) Kept {
    float state[N * N];  // before the chunk
    Update<N> update;
};

// How many chunks are kept at a time: as many as common second-level caches hold.
template <int N>
constexpr int SEGMENT = (900 << 10) / sizeof(Kept<N>);

// to = from diag(D) + b^T a for the keys of the panel that starts at `key`; may be in place.
template <int N>
void advance(const float* from, const float* total, const Rows<N>& a, const Rows<N>& b, int key, float* to,
             Ahead& ahead) {
    for (int value = 0; value < N; value += ROWS, from += ROWS * PANEL, to += ROWS * PANEL) {
        ahead.fetch<N>();
        Tile tile;
        load_tile<PANEL>(tile, from);
        for (int m = 0; m < ROWS; m++)
            for (int x = 0; x < V; x++) tile[m][x] *= load(total + key + x * LANES);
        add_product<C, 1, N, N>(tile, b[0] + value, a[0] + key);
        store_tile<PANEL>(tile, to);
    }
}

// Keeps what the chunks of a segment start from, and the state after it in `end`, if that is not null.
template <int N>
void sweep(const WkvProblem& p, const Span& segment, int64_t head, const float* start, Kept<N>* kept, float* end) {
    __builtin_memcpy(kept->state, start, sizeof kept->state);
    for (int64_t t = 0; t < segment.count; t += C, kept++) {
        Ahead ahead({segment.batch, segment.first + t + C, head, chunk_length(segment.count - t - C)});
        ahead.add<N>(p.k, p.type);
        ahead.add<N>(p.v, p.type);
        ahead.add<N>(p.w, p.decay_type);
        const Update<N>& update = kept->update;
        read_update<N>(p, {segment.batch, segment.first + t, head, chunk_length(segment.count - t)}, kept->update);
        float* after = segment.count - t > C ? kept[1].state : end;
        for (int key = 0; after && key < N; key += PANEL)
            advance<N>(kept->state + key * N, update.total, update.k_end, update.v, key, after + key * N, ahead);
    }
}

// g.v_j = sum over i >= j of s_ij dy_i; scores become dy_i . v_j.
template <int N>
void mix_back(float* scores, const Rows<N>& v, Gradients<N>& g) {
    Vec parts[PADDED_PAIRS] = {};
    for (int n = 0; n < N; n += GROUP<N> * LANES)
        for (int j = 0; j < C; j++) {
            Vec sum[GROUP<N>] = {};
            for (int i = j; i < C; i++) {
                Vec part = parts[pair(i, j)];
                for (int x = 0; x < GROUP<N>; x++) {
                    Vec dy = load(g.dy[i] + n + x * LANES);
                    sum[x] += scores[pair(i, j)] * dy;
                    part += dy * load(v[j] + n + x * LANES);
                }
                parts[pair(i, j)] = part;
            }
            for (int x = 0; x < GROUP<N>; x++) store(g.v[j] + n + x * LANES, sum[x]);
        }
    for (int i = 0; i < PAIRS; i += LANES) store(scores + i, sums(parts + i));
}

// For the keys of the panel that starts at `key`: g.r = S^T dy, g.k = dS^T v, log_total = colsum(S dS) D,
// g.v += dS (E k); then dS becomes the gradient of the state before the chunk.
template <int N>
void panel_back(const Query<N>& query, const Kept<N>& kept, int key, float* panel, Gradients<N>& g, Ahead& ahead) {
    const float* state = kept.state + key * N;
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

// From the gradients of r and k as decayed at the chunk's ends to those of r, k, w and u, with the pairs inside the
// chunk; `dots` holds dy_i . v_j.
template <int N>
void inside_back(const Query<N>& query, const Update<N>& update, const float* u, const float* dots, Gradients<N>& g) {
    for (int n = 0; n < N; n += LANES) {
        Vec d[C], r[C], dr[C], log[C], bonus = load(g.u + n), u_n = load(u + n);
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
        WKV_UNROLL
        for (int j = 0; j < C; j++) {
            Vec k = load(update.k[j] + n), later[C];
            log[j] += through;
            through += load(update.k_end[j] + n) * load(g.k[j] + n);
            Vec rk = dots[pair(j, j)] * r[j];
            dr[j] += dots[pair(j, j)] * u_n * k;
            bonus += rk * k;
            Vec dk = rk * u_n;
            decay = broadcast(1);
            WKV_UNROLL
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
            WKV_UNROLL
            for (int i = C - 1; i > j + 1; i--) {
                between += later[i];
                log[i - 1] += between;
            }
        }
        for (int i = 0; i < C; i++) {
            store(g.r[i] + n, dr[i]);
            store(g.w[i] + n, -load(update.rate[i] + n) * log[i]);
        }
        store(g.u + n, bonus);
    }
}

template <int N>
void chunk_back(const WkvProblem& p, const Place& at, const float* u, const Kept<N>& kept, Ahead& ahead, float* dstate,
                Gradients<N>& g) {
    alignas(64) float scores[PADDED_PAIRS];
    Query<N> query;
    read_query<N>(p, at, kept.update, query);
    read_padded<N>(p.dy, p.type, at, g.dy);
    score<N>(query, kept.update, u, scores);
    mix_back<N>(scores, kept.update.v, g);
    for (int key = 0; key < N; key += PANEL) panel_back<N>(query, kept, key, dstate + key * N, g, ahead);
    inside_back<N>(query, kept.update, u, scores, g);
    write<N>(g.r, at, p.type, p.dr);
    write<N>(g.k, at, p.type, p.dk);
    write<N>(g.v, at, p.type, p.dv);
    write<N>(g.w, at, p.decay_type, p.dw);
}

// A segment's chunks, last to first.
template <int N>
void segment_back(const WkvProblem& p, const Span& segment, int64_t head, const float* u, const Kept<N>* kept,
                  float* dstate, Gradients<N>& g) {
    const WkvTokens* same_type[] = {&p.r, &p.dy, &p.dr, &p.dk, &p.dv};
    for (int64_t t = (segment.count - 1) / C * C; t >= 0; t -= C) {
        Ahead ahead({segment.batch, segment.first + t - C, head, t ? C : 0});
        for (const WkvTokens* x : same_type) ahead.add<N>(*x, p.type);
        ahead.add<N>(p.dw, p.decay_type);
        Place at = {segment.batch, segment.first + t, head, chunk_length(segment.count - t)};
        chunk_back<N>(p, at, u, kept[t / C], ahead, dstate, g);
    }
}

template <int N>
void to_panels(const float* from, float* to) {
    for (int row = 0; row < N; row++)
        for (int n = 0; n < N; n += LANES) store(to + in_panels<N>(row, n), load(from + row * N + n));
}

template <int N>
void from_panels(const float* from, float* to) {
    for (int row = 0; row < N; row++)
        for (int n = 0; n < N; n += LANES) store(to + row * N + n, load(from + in_panels<N>(row, n)));
}

// In scratch: the states that segments start from, then what is kept of the chunks of one segment.
template <int N>
int64_t scratch(int64_t longest) {
    int64_t chunks = (longest + C - 1) / C, segments = (chunks + SEGMENT<N> - 1) / SEGMENT<N>;
    int64_t kept = segments > 1 ? SEGMENT<N> : chunks;
    return segments * N * N * (int64_t)sizeof(float) + kept * (int64_t)sizeof(Kept<N>);
}

template <int N>
void backward(const WkvProblem& p, int64_t sequence, int64_t head, void* memory) {
    Span span = wkv_cpu::span_of(p, sequence);
    constexpr int64_t length = SEGMENT<N> * C;
    int64_t segments = (span.count + length - 1) / length;
    float* starts = (float*)memory;
    Kept<N>* kept = (Kept<N>*)(starts + segments * N * N);
    alignas(64) float dstate[N * N], u[1][N];
    Gradients<N> g;
    for (int n = 0; n < N; n++) g.u[n] = 0;
    read_bonus<N>(p, head, u);
    to_panels<N>(matrix(p.dlast, sequence, head), dstate);
    if (segments) to_panels<N>(matrix(p.state, sequence, head), starts);
    for (int64_t s = 0; s < segments - 1; s++)
        sweep<N>(p, {span.batch, span.first + s * length, length}, head, starts + s * N * N, kept,
                 starts + (s + 1) * N * N);
    for (int64_t s = segments - 1; s >= 0; s--) {
        Span segment = {span.batch, span.first + s * length, s < segments - 1 ? length : span.count - s * length};
        sweep<N>(p, segment, head, starts + s * N * N, kept, nullptr);
        segment_back<N>(p, segment, head, u[0], kept, dstate, g);
    }
    from_panels<N>(dstate, matrix(p.dstate, sequence, head));
    if (p.need_du) __builtin_memcpy(p.du + (sequence * p.heads + head) * N, g.u, sizeof g.u);
}

}  // namespace
