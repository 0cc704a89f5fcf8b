// WKV-7 on a CPU, token by token, one head of one sequence at a time: rows of matrices are values, columns are keys.
//
// Forwards, with d = exp(-exp(w)):
//     u = S a;  S <- S diag(d) + u b^T + v k^T;  y = S r
// Backwards, with S and S' the state before and after the token and dS' the gradient of the state after it:
//     dS' += dy r^T;  dr = S'^T dy;  dv = dS' k;  dk = dS'^T v;  du = dS' b;  db = dS'^T u;  da = S^T du
//     dw = colsum(dS' S) d (-exp(w));  dS = dS' diag(d) + du a^T
// No row of a state meets another, and nothing is divided by a decay: the states before each token of a chunk are
// computed again from the one before the chunk.

#pragma once

#include "wkv_cpu_rows.h"

namespace {
namespace wkv7 {

// The tokens of a chunk: rate = exp(w), d = exp(-rate).
template <int N>
struct alignas(64) Tokens {
    Rows<N> r, k, v, rate, d, a, b;
};

template <int N>
void read_tokens(const WkvProblem& p, const Place& at, Tokens<N>& x) {
    read<N>(p.r, p.type, at, x.r);
    read<N>(p.k, p.type, at, x.k);
    read<N>(p.v, p.type, at, x.v);
    read<N>(p.a, p.type, at, x.a);
    read<N>(p.b, p.type, at, x.b);
    read<N>(p.w, p.decay_type, at, x.rate);
    decays<N>(x.rate, x.d, at.count);
}

// A row of N numbers in registers.
template <int N>
struct Row {
    Vec part[N / LANES];
    explicit Row(const float* x) {
        WKV_UNROLL
        for (int i = 0; i < N / LANES; i++) part[i] = load(x + i * LANES);
    }
};

// One token: from the state `before` it to the one `after` it, which may be the same memory; u = S a and y.
template <int N>
void token_forward(const Tokens<N>& x, int i, const float* before, float* after, float* u, float* y) {
    const Row<N> r(x.r[i]), d(x.d[i]), k(x.k[i]), a(x.a[i]), b(x.b[i]);
    Vec parts[LANES];
    for (int value = 0; value < N; value += LANES, before += LANES * N, after += LANES * N) {
        for (int m = 0; m < LANES; m++) {
            Vec sum = {};
            WKV_UNROLL
            for (int n = 0; n < N / LANES; n++) sum += load(before + m * N + n * LANES) * a.part[n];
            parts[m] = sum;
        }
        store(u + value, sums(parts));
        for (int m = 0; m < LANES; m++) {
            Vec sum = {}, u_m = broadcast(u[value + m]), v_m = broadcast(x.v[i][value + m]);
            WKV_UNROLL
            for (int n = 0; n < N / LANES; n++) {
                Vec s = load(before + m * N + n * LANES) * d.part[n] + u_m * b.part[n] + v_m * k.part[n];
                store(after + m * N + n * LANES, s);
                sum += s * r.part[n];
            }
            parts[m] = sum;
        }
        store(y + value, sums(parts));
    }
}

// All tokens of a span, on the caller's state.
template <int N>
void advance(const WkvProblem& p, const Span& span, int64_t head, float* state) {
    Tokens<N> x;
    alignas(64) Rows<N> y;
    alignas(64) float u[N];
    for (int64_t t = 0; t < span.count; t += C) {
        Place at = {span.batch, span.first + t, head, chunk_length(span.count - t)};
        read_tokens<N>(p, at, x);
        for (int i = 0; i < at.count; i++) token_forward<N>(x, i, state, state, u, y[i]);
        write<N>(y, at, p.type, p.y);
    }
}

template <int N>
void forward(const WkvProblem& p, int64_t sequence, int64_t head) {
    float* last = matrix(p.last, sequence, head);
    __builtin_memcpy(last, matrix(p.state, sequence, head), N * N * sizeof(float));
    advance<N>(p, wkv_cpu::span_of(p, sequence), head, last);
}

template <int N>
struct alignas(64) Gradients {
    Rows<N> dy, r, k, v, w, a, b;
};

// What a chunk is computed again into: the state before each of its tokens and after the last, and each token's u.
template <int N>
struct alignas(64) Kept {
    float state[C + 1][N * N];
    Rows<N> u;
};

// One token backwards: `gradient` is that of the state after it and becomes that of the state before it.
template <int N>
void token_backward(const Tokens<N>& x, int i, const Kept<N>& kept, float* gradient, Gradients<N>& g) {
    constexpr int P = N / LANES;
    const float *before = kept.state[i], *after = kept.state[i + 1];
    const Row<N> r(x.r[i]), d(x.d[i]), k(x.k[i]), a(x.a[i]), b(x.b[i]);
    Vec dr[P] = {}, dk[P] = {}, da[P] = {}, db[P] = {}, dd[P] = {}, of_v[LANES], of_u[LANES];
    alignas(64) float du[LANES];
    for (int value = 0; value < N; value += LANES, before += LANES * N, after += LANES * N, gradient += LANES * N) {
        for (int m = 0; m < LANES; m++) {
            Vec dv_m = {}, du_m = {}, dy_m = broadcast(g.dy[i][value + m]);
            WKV_UNROLL
            for (int n = 0; n < P; n++) {
                Vec ds = load(gradient + m * N + n * LANES) + dy_m * r.part[n];
                store(gradient + m * N + n * LANES, ds);
                dr[n] += dy_m * load(after + m * N + n * LANES);
                dv_m += ds * k.part[n];
                du_m += ds * b.part[n];
            }
            of_v[m] = dv_m, of_u[m] = du_m;
        }
        store(g.v[i] + value, sums(of_v));
        store(du, sums(of_u));
        for (int m = 0; m < LANES; m++) {
            Vec v_m = broadcast(x.v[i][value + m]), u_m = broadcast(kept.u[i][value + m]), du_m = broadcast(du[m]);
            WKV_UNROLL
            for (int n = 0; n < P; n++) {
                Vec ds = load(gradient + m * N + n * LANES), s = load(before + m * N + n * LANES);
                dk[n] += v_m * ds;
                db[n] += u_m * ds;
                da[n] += du_m * s;
                dd[n] += ds * s;
                store(gradient + m * N + n * LANES, ds * d.part[n] + du_m * a.part[n]);
            }
        }
    }
    WKV_UNROLL
    for (int n = 0; n < P; n++) {
        store(g.r[i] + n * LANES, dr[n]);
        store(g.k[i] + n * LANES, dk[n]);
        store(g.a[i] + n * LANES, da[n]);
        store(g.b[i] + n * LANES, db[n]);
        store(g.w[i] + n * LANES, -(dd[n] * d.part[n] * load(x.rate[i] + n * LANES)));
    }
}

// In scratch: what is kept of one chunk, then the state before each chunk.
template <int N>
int64_t scratch(int64_t longest) {
    return (longest + C - 1) / C * N * N * (int64_t)sizeof(float) + (int64_t)sizeof(Kept<N>);
}

template <int N>
void backward(const WkvProblem& p, int64_t sequence, int64_t head, void* memory) {
    Span span = wkv_cpu::span_of(p, sequence);
    Kept<N>& kept = *(Kept<N>*)memory;
    float *starts = (float*)(&kept + 1), *gradient = matrix(p.dstate, sequence, head);
    Tokens<N> x;
    Gradients<N> g;
    alignas(64) float y[N];
    auto place = [&](int64_t t) -> Place { return {span.batch, span.first + t, head, chunk_length(span.count - t)}; };
    __builtin_memcpy(kept.state[0], matrix(p.state, sequence, head), sizeof kept.state[0]);
    for (int64_t t = 0; t < span.count; t += C) {
        __builtin_memcpy(starts + t / C * N * N, kept.state[0], sizeof kept.state[0]);
        if (span.count - t <= C) break;
        read_tokens<N>(p, place(t), x);
        for (int i = 0; i < C; i++) token_forward<N>(x, i, kept.state[0], kept.state[0], kept.u[i], y);
    }
    __builtin_memcpy(gradient, matrix(p.dlast, sequence, head), N * N * sizeof(float));
    for (int64_t t = (span.count - 1) / C * C; t >= 0 && span.count; t -= C) {
        Place at = place(t);
        read_tokens<N>(p, at, x);
        read<N>(p.dy, p.type, at, g.dy);
        __builtin_memcpy(kept.state[0], starts + t / C * N * N, sizeof kept.state[0]);
        for (int i = 0; i < at.count; i++) token_forward<N>(x, i, kept.state[i], kept.state[i + 1], kept.u[i], y);
        for (int i = at.count - 1; i >= 0; i--) token_backward<N>(x, i, kept, gradient, g);
        const Rows<N>* rows[] = {&g.r, &g.k, &g.v, &g.a, &g.b};
        const WkvTokens* out[] = {&p.dr, &p.dk, &p.dv, &p.da, &p.db};
        for (int which = 0; which < 5; which++) write<N>(*rows[which], at, p.type, *out[which]);
        write<N>(g.w, at, p.decay_type, p.dw);
    }
}

}  // namespace wkv7
}  // namespace
