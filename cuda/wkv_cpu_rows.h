// Rows of tokens on a CPU: from and to the caller's tensors, and the decays.

#pragma once

#include "wkv_cpu_kernel.h"
#include "wkv_cpu_vectors.h"

namespace {

using wkv_cpu::Span;

constexpr int C = 8;  // tokens of a chunk

// The tokens of a chunk.
struct Place {
    int64_t batch, token, head;
    int count;
};

// How many tokens the next chunk takes of so many.
inline int chunk_length(int64_t tokens) { return tokens < 0 ? 0 : tokens < C ? (int)tokens : C; }

template <int N>
using Rows = float[C][N];

// From and to the caller's tensors.

template <int N, class Type>
void read_as(const WkvTokens& x, const Place& at, float (*out)[N]) {
    typedef typename Type::Element Element;
    const Element* data = (const Element*)x.data + at.batch * x.batch + at.token * x.time + at.head * x.head;
    for (int i = 0; i < at.count; i++, data += x.time)
        for (int n = 0; n < N; n += LANES) store(out[i] + n, Type::get(data + n));
}

template <int N>
void read(const WkvTokens& x, int32_t type, const Place& at, float (*out)[N]) {
    if (type == WKV_FLOAT32)
        read_as<N, Float32>(x, at, out);
    else if (type == WKV_BFLOAT16)
        read_as<N, Bfloat16>(x, at, out);
    else
        read_as<N, Float16>(x, at, out);
}

template <int N, class Type>
void write_as(const float (*x)[N], const Place& at, const WkvTokens& out) {
    typedef typename Type::Element Element;
    Element* data = (Element*)out.data + at.batch * out.batch + at.token * out.time + at.head * out.head;
    for (int i = 0; i < at.count; i++, data += out.time)
        for (int n = 0; n < N; n += LANES) Type::put(data + n, load(x[i] + n));
}

template <int N>
void write(const float (*x)[N], const Place& at, int32_t type, const WkvTokens& out) {
    if (type == WKV_FLOAT32)
        write_as<N, Float32>(x, at, out);
    else if (type == WKV_BFLOAT16)
        write_as<N, Bfloat16>(x, at, out);
    else
        write_as<N, Float16>(x, at, out);
}

inline float* matrix(const WkvState& x, int64_t sequence, int64_t head) {
    return x.data + sequence * x.sequence + head * x.head;
}

// w, found in `rate`, becomes rate = exp(w) and d = exp(-rate).
//
// exp(-1000) is 0: the bound on the rate makes the gradient of such a decay 0, where 0 * inf would be NaN. exp's own
// bounds: a rate of 1e-38 is none, a decay of 1e-38 is 0. NaN stays NaN.
//
// In two loops, as the processor looks ahead: over more vectors where each has one exp to wait for, not two.
template <int N>
void decays(float (*rate)[N], float (*d)[N], int count) {
    Vec lowest = broadcast(-87.0f), log_most = broadcast(6.9077553f);
    for (int n = 0; n < count * N; n += LANES) {
        Vec w = load(rate[0] + n);
        w = either(w < lowest, lowest, w);
        store(rate[0] + n, exp(either(w > log_most, log_most, w)));
    }
    for (int n = 0; n < count * N; n += LANES) {
        Vec x = load(rate[0] + n);
        store(d[0] + n, either(x > 87.0f, Vec{}, exp(-x)));
    }
}

}  // namespace
