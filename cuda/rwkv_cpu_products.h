// Products of a few rows of activations with frozen weights, bound by the memory that the weights are read from.
//
// Every result is one chain of sums in a fixed order: its bits depend neither on the other rows nor on the threads.

#pragma once

#include "rwkv.h"
#include "wkv_cpu_vectors.h"

namespace {

constexpr int ROWS_AT_ONCE = 4;
constexpr int OUTPUTS_AT_ONCE = LANES / ROWS_AT_ONCE;

// Rows of floats in scratch memory.
struct Activations {
    float* data;
    int64_t width;
    float* row(int64_t i) const { return data + i * width; }
};

// Sums of the LANES products of OUTPUTS_AT_ONCE rows of weights with R of activations; lanes: [row][output].
template <class W, int R>
inline Vec dots(const typename W::Element* const* w, const Activations& x, int64_t row, int64_t inputs) {
    Vec sum[LANES] = {};
    // The next rows: the processor itself looks ahead to the end of a page only, which is about that of a row.
    const int64_t ahead = OUTPUTS_AT_ONCE * inputs, line = 64 / sizeof(typename W::Element);
    for (int64_t k = 0; k < inputs; k += LANES) {
        if (k % line == 0)
            for (int o = 0; o < OUTPUTS_AT_ONCE; o++) __builtin_prefetch(w[o] + k + ahead);
        Vec weights[OUTPUTS_AT_ONCE];
        for (int o = 0; o < OUTPUTS_AT_ONCE; o++) weights[o] = W::get(w[o] + k);
        for (int r = 0; r < R; r++) {
            Vec activation = load(x.row(row + r) + k);
            for (int o = 0; o < OUTPUTS_AT_ONCE; o++) sum[r * OUTPUTS_AT_ONCE + o] += weights[o] * activation;
        }
    }
    return sums(sum);
}

// y[row][o] = W[o] . x[row] for the outputs from `first` to `end` and the first `rows` rows.
template <class W>
void product_as(const RwkvMatrix& matrix, const Activations& x, int64_t rows, int64_t first, int64_t end,
                const Activations& y) {
    typedef typename W::Element Element;
    for (int64_t o = first; o < end; o += OUTPUTS_AT_ONCE) {
        int64_t valid = end - o < OUTPUTS_AT_ONCE ? end - o : OUTPUTS_AT_ONCE;
        const Element* w[OUTPUTS_AT_ONCE];
        for (int i = 0; i < OUTPUTS_AT_ONCE; i++)
            w[i] = (const Element*)matrix.data + (i < valid ? o + i : end - 1) * x.width;
        for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE) {
            int64_t left = rows - row < ROWS_AT_ONCE ? rows - row : ROWS_AT_ONCE;
            Vec sum = left == 1   ? dots<W, 1>(w, x, row, x.width)
                      : left == 2 ? dots<W, 2>(w, x, row, x.width)
                      : left == 3 ? dots<W, 3>(w, x, row, x.width)
                                  : dots<W, 4>(w, x, row, x.width);
            for (int64_t r = 0; r < left; r++)
                for (int64_t i = 0; i < valid; i++) {
                    float scale = matrix.scales ? matrix.scales[o + i] : 1.0f;
                    y.row(row + r)[o + i] = sum[r * OUTPUTS_AT_ONCE + i] * scale;
                }
        }
    }
}

inline void product(const RwkvMatrix& w, const Activations& x, int64_t rows, int64_t first, int64_t end,
                    const Activations& y) {
    (w.type == WKV_FLOAT32    ? product_as<Float32>
     : w.type == WKV_BFLOAT16 ? product_as<Bfloat16>
                               : product_as<Int8>)(w, x, rows, first, end, y);
}

// y[row][c] = sum over k of x[row][k] W[k][c], for a vector of columns from c; W (inputs, columns) is a low-rank map.
template <class T, int VECTORS>
inline void columns_at_once(const typename T::Element* w, int64_t columns, const float* x, int64_t inputs, int64_t c,
                            float* y) {
    Vec sum[VECTORS] = {};
    for (int64_t k = 0; k < inputs; k++)
        for (int v = 0; v < VECTORS; v++) sum[v] += T::get(w + k * columns + c + v * LANES) * x[k];
    for (int v = 0; v < VECTORS; v++) store(y + c + v * LANES, sum[v]);
}

// The same for the columns from `first` to `end`.
template <class T>
void low_rank(const void* weights, int64_t columns, const float* x, int64_t inputs, int64_t first, int64_t end,
              float* y) {
    typedef typename T::Element Element;
    const Element* w = (const Element*)weights;
    int64_t c = first;
    for (; c + 4 * LANES <= end; c += 4 * LANES) columns_at_once<T, 4>(w, columns, x, inputs, c, y);
    for (; c + LANES <= end; c += LANES) columns_at_once<T, 1>(w, columns, x, inputs, c, y);
    if (c == end) return;
    // Fewer columns than lanes are left.
    float sum[LANES] = {};
    for (int64_t k = 0; k < inputs; k++) {
        Element padded[LANES] = {};
        for (int64_t i = 0; i < end - c; i++) padded[i] = w[k * columns + c + i];
        store(sum, load(sum) + T::get(padded) * x[k]);
    }
    for (int64_t i = 0; i < end - c; i++) y[c + i] = sum[i];
}

}  // namespace
