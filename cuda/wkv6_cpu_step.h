// WKV-6 token by token on the caller's state, for a few tokens: rows are values, columns are keys.

#pragma once

#include "wkv6_cpu_chunk.h"

namespace {

constexpr int SHORT = 4;  // so few tokens are faster one by one, as the state need not be transposed

template <int N>
void step(const WkvProblem& p, const Span& span, int64_t head, float* state) {
    alignas(64) float u[1][N], r[1][N], k[1][N], v[1][N], rate[1][N], d[1][N], y[1][N];
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

}  // namespace
