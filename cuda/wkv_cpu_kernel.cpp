// WKV-6 and WKV-7 on a CPU, one head of one sequence at a time. Compiled with -DWKV_ISA=avx512, avx2 or plain.

#include "wkv_cpu_kernel.h"

#include "rwkv_cpu_models.h"
#include "wkv6_cpu_backward.h"
#include "wkv6_cpu_chunk.h"
#include "wkv6_cpu_step.h"
#include "wkv7_cpu.h"

namespace {

// Forwards the state is transposed: rows are keys, columns are values.

template <int N>
void read_transposed(const float* state, float* panels) {
    for (int value = 0; value < N; value += LANES)
        for (int key = 0; key < N; key += LANES)
            transpose_block(state + value * N + key, N, panels + in_panels<N>(key, value), PANEL);
}

template <int N>
void write_transposed(const float* panels, float* state) {
    for (int value = 0; value < N; value += LANES)
        for (int key = 0; key < N; key += LANES)
            transpose_block(panels + in_panels<N>(key, value), PANEL, state + value * N + key, N);
}

// y_i = sum over j <= i of s_ij v_j.
template <int N>
void mix(const float* scores, const Rows<N>& v, Rows<N>& y) {
    WKV_UNROLL
    for (int i = 0; i < C; i++)
        for (int n = 0; n < N; n += LANES) {
            Vec sum = {};
            for (int j = 0; j <= i; j++) sum += scores[pair(i, j)] * load(v[j] + n);
            store(y[i] + n, sum);
        }
}

// y += S (A r), then S <- S diag(D) + v^T (E k), for the values of the panel that starts at `value`.
template <int N>
void panel_forward(const Query<N>& query, const Update<N>& update, int value, float* panel, Rows<N>& y, Ahead& ahead) {
    for (int i = 0; i < C; i += ROWS) {
        Tile tile;
        load_tile<N>(tile, y[i] + value);
        add_product<N, N, 1, PANEL>(tile, query.r_start[i], panel);
        store_tile<N>(tile, y[i] + value);
    }
    for (int key = 0; key < N; key += ROWS, panel += ROWS * PANEL) {
        ahead.fetch<N>();
        Tile tile;
        load_tile<PANEL>(tile, panel);
        for (int m = 0; m < ROWS; m++)
            for (int x = 0; x < V; x++) tile[m][x] *= update.total[key + m];
        add_product<C, 1, N, N>(tile, update.k_end[0] + key, update.v[0] + value);
        store_tile<PANEL>(tile, panel);
    }
}

template <int N>
void forward(const WkvProblem& p, int64_t sequence, int64_t head) {
    Span span = wkv_cpu::span_of(p, sequence);
    const float* state = matrix(p.state, sequence, head);
    float* last = matrix(p.last, sequence, head);
    if (span.count <= SHORT) {
        __builtin_memcpy(last, state, N * N * sizeof(float));
        step<N>(p, span, head, last);
        return;
    }
    alignas(64) float panels[N * N], scores[PADDED_PAIRS], u[1][N];
    alignas(64) Rows<N> y;
    Update<N> update;
    Query<N> query;
    read_bonus<N>(p, head, u);
    read_transposed<N>(state, panels);
    for (int64_t t = 0; t < span.count; t += C) {
        Place at = {span.batch, span.first + t, head, chunk_length(span.count - t)};
        Place next = {span.batch, span.first + t + C, head, chunk_length(span.count - t - C)};
        if (!next.count && head + 1 < p.heads) next = {span.batch, span.first, head + 1, chunk_length(span.count)};
        Ahead ahead(next);
        const WkvTokens* same_type[] = {&p.r, &p.k, &p.v, &p.y};
        for (const WkvTokens* x : same_type) ahead.add<N>(*x, p.type);
        ahead.add<N>(p.w, p.decay_type);
        read_update<N>(p, at, update);
        read_query<N>(p, at, update, query);
        score<N>(query, update, u[0], scores);
        mix<N>(scores, update.v, y);
        for (int value = 0; value < N; value += PANEL)
            panel_forward<N>(query, update, value, panels + value * N, y, ahead);
        write<N>(y, at, p.type, p.y);
    }
    write_transposed<N>(panels, last);
}

// From a head size known at run time to one known at compile time.
#define WKV_OF_SIZE(size, function) ((size) == 32 ? function<32> : (size) == 64 ? function<64> : function<128>)

void any_forward(const WkvProblem& p, int64_t sequence, int64_t head) {
    WKV_OF_SIZE(p.head_size, forward)(p, sequence, head);
}

void any_backward(const WkvProblem& p, int64_t sequence, int64_t head, void* memory) {
    WKV_OF_SIZE(p.head_size, backward)(p, sequence, head, memory);
}

void any_step(const WkvProblem& p, int64_t sequence, int64_t head) {
    WKV_OF_SIZE(p.head_size, step)(p, wkv_cpu::span_of(p, sequence), head, matrix(p.state, sequence, head));
}

int64_t any_scratch(int64_t head_size, int64_t longest) { return WKV_OF_SIZE(head_size, scratch)(longest); }

void any_forward7(const WkvProblem& p, int64_t sequence, int64_t head) {
    WKV_OF_SIZE(p.head_size, wkv7::forward)(p, sequence, head);
}

void any_backward7(const WkvProblem& p, int64_t sequence, int64_t head, void* memory) {
    WKV_OF_SIZE(p.head_size, wkv7::backward)(p, sequence, head, memory);
}

void any_step7(const WkvProblem& p, int64_t sequence, int64_t head) {
    WKV_OF_SIZE(p.head_size, wkv7::advance)(p, wkv_cpu::span_of(p, sequence), head, matrix(p.state, sequence, head));
}

int64_t any_scratch7(int64_t head_size, int64_t longest) { return WKV_OF_SIZE(head_size, wkv7::scratch)(longest); }

}  // namespace

#define WKV_STRING(x) #x
#define WKV_NAME(x) WKV_STRING(x)

const wkv_cpu::Kernels wkv_cpu::WKV_ISA = {WKV_NAME(WKV_ISA),
                                           {any_forward, any_backward, any_step, any_scratch},
                                           {any_forward7, any_backward7, any_step7, any_scratch7},
                                           any_model_step,
                                           any_model_scratch};
