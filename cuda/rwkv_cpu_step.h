// What the decoding steps of RWKV-6 and RWKV-7 on a CPU share: a few tokens of some slots through a model, in float32.
//
// It is done in stages, each shared out among the threads of a team; a row of activations is a token. Nothing a row
// gives depends on the other slots' rows.

#pragma once

#include "rwkv_cpu_products.h"
#include "rwkv_cpu_team.h"
#include "wkv_cpu_kernel.h"

namespace {

constexpr int64_t BLOCK = 32;  // outputs, or columns of a low-rank map in vectors of LANES, of one job

inline float total(Vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

inline Vec sigmoid(Vec x) {
    x = either(x > 80.0f, broadcast(80.0f), either(x < -80.0f, broadcast(-80.0f), x));
    return 1.0f / (1.0f + exp(-x));
}

inline Vec tanh(Vec x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

template <class T>
inline Vec at(const void* data, int64_t i) {
    return T::get((const typename T::Element*)data + i);
}

// out = (x - mean) / deviation * weight + bias, for n numbers.
template <class T>
void norm(const float* x, const RwkvNorm& by, int64_t first, int64_t n, float epsilon, float* out) {
    Vec sum = {}, squares = {};
    for (int64_t i = 0; i < n; i += LANES) sum += load(x + i);
    float mean = total(sum) / n;
    for (int64_t i = 0; i < n; i += LANES) squares += (load(x + i) - mean) * (load(x + i) - mean);
    float scale = 1.0f / __builtin_sqrtf(total(squares) / n + epsilon);
    for (int64_t i = 0; i < n; i += LANES)
        store(out + i, (load(x + i) - mean) * scale * at<T>(by.weight, first + i) + at<T>(by.bias, first + i));
}

template <class T>
class Stages {
   protected:
    typedef typename T::Element Element;

    Stages(const RwkvModel& model, const RwkvStep& step, wkv_cpu::Team& team)
        : m(model), s(step), worker(team), C(model.channels), N(model.channels / model.heads), memory((float*)s.scratch) {
        x = take(C), normed = take(C), difference = take(C), y = take(C), hidden = take(m.ffn);
        r = take(C), k = take(C), v = take(C), gate = take(C);
    }

    const RwkvModel& m;
    const RwkvStep& s;
    Worker worker;
    const int64_t C, N;
    float* memory;
    Activations x, normed, difference, y, hidden, r, k, v, gate;

    // From the embeddings to the logits; mix(number) is a layer.
    template <class Layer>
    void run(Layer mix) {
        worker.for_each(s.tokens, [&](int64_t i) {
            const Element* embedding = (const Element*)m.emb + s.ids[i] * C;
            for (int64_t c = 0; c < C; c += LANES) store(normed.row(i) + c, T::get(embedding + c));
            norm<T>(normed.row(i), m.ln0, 0, C, 1e-5f, x.row(i));
        });
        for (int64_t layer = 0; layer < m.layers; layer++) mix(layer);
        worker.for_each(s.tokens, [&](int64_t i) { norm<T>(x.row(i), m.ln_out, 0, C, 1e-5f, normed.row(i)); });
        multiply(m.head, normed, {s.logits, m.vocab}, nothing);
    }

    Activations take(int64_t width) {
        Activations out = {memory, width};
        memory += (s.tokens * width + 15) / 16 * 16;
        return out;
    }

    int64_t slot(int64_t i) const { return s.slot ? s.slot[i] : i; }
    bool is_first(int64_t i) const { return i == 0 || slot(i - 1) != slot(i); }
    bool is_last(int64_t i) const { return i + 1 == s.tokens || slot(i + 1) != slot(i); }
    Element* shift(void* all, int64_t layer, int64_t i) const {
        return (Element*)all + (layer * s.slots + slot(i)) * C;
    }

    static void nothing(int64_t, int64_t, int64_t) {}

    static int64_t blocks(int64_t outputs) { return (outputs + BLOCK - 1) / BLOCK; }

    // One job's outputs of y = W x, and then what is done to them, given row, first and end.
    template <class Then>
    void multiply_block(const RwkvMatrix& matrix, const Activations& in, const Activations& out, int64_t block,
                        Then then) {
        int64_t first = block * BLOCK, end = first + BLOCK < out.width ? first + BLOCK : out.width;
        product(matrix, in, s.tokens, first, end, out);
        for (int64_t i = 0; i < s.tokens; i++) then(i, first, end);
    }

    template <class Then>
    void multiply(const RwkvMatrix& matrix, const Activations& in, const Activations& out, Then then) {
        worker.for_each(blocks(out.width), [&](int64_t block) { multiply_block(matrix, in, out, block, then); });
    }

    // normed = norm(x); difference = the token before less this one, the former as the state would keep it.
    void shift_tokens(const RwkvNorm& by, void* shifts, int64_t layer) {
        worker.for_each(s.tokens, [&](int64_t i) { norm<T>(x.row(i), by, 0, C, 1e-5f, normed.row(i)); });
        worker.for_each(s.tokens, [&](int64_t i) {
            const Element* kept = shift(shifts, layer, i);
            for (int64_t c = 0; c < C; c += LANES) {
                Element rounded[LANES];
                if (!is_first(i)) T::put(rounded, load(normed.row(i - 1) + c));
                store(difference.row(i) + c, T::get(is_first(i) ? kept + c : rounded) - load(normed.row(i) + c));
            }
        });
    }

    void keep_shift(void* shifts, int64_t layer, int64_t i) {
        Element* kept = shift(shifts, layer, i);
        if (is_last(i))
            for (int64_t c = 0; c < C; c += LANES) T::put(kept + c, load(normed.row(i) + c));
    }

    // A block of columns of inside(x W), W a low-rank map.
    template <class Inside>
    void low_rank_block(const void* weights, const Activations& in, const Activations& out, int64_t block,
                        Inside inside) {
        int64_t width = 4 * LANES, first = block * width, end = first + width < out.width ? first + width : out.width;
        for (int64_t i = 0; i < s.tokens; i++) {
            low_rank<T>(weights, out.width, in.row(i), in.width, first, end, out.row(i));
            for (int64_t c = first; c < end; c++) out.row(i)[c] = inside(broadcast(out.row(i)[c]))[0];
        }
    }

    static int64_t low_rank_blocks(const Activations& out) { return (out.width + 4 * LANES - 1) / (4 * LANES); }

    // out = x + maa * (token before - x)
    void blend(const void* maa, int64_t i, const Activations& out) {
        for (int64_t c = 0; c < C; c += LANES)
            store(out.row(i) + c, load(normed.row(i) + c) + load(difference.row(i) + c) * at<T>(maa, c));
    }

    // Calls attend(i, head) for each head of each slot, i the first of its tokens.
    template <class Attend>
    void for_each_slot(Attend attend) {
        worker.for_each(s.tokens * m.heads, [&](int64_t job) {
            if (is_first(job / m.heads)) attend(job / m.heads, job % m.heads);
        });
    }

    int64_t tokens_of_slot(int64_t i) const {
        int64_t count = 1;
        while (!is_last(i + count - 1)) count++;
        return count;
    }

    float* state(int64_t layer, int64_t i, int64_t head) const {
        return s.wkv + ((layer * s.slots + slot(i)) * m.heads + head) * N * N;
    }

    // y += what r reads of the layer's state offset, for a head of a token; `read` is scratch.
    void add_offset(const void* offset, int64_t i, int64_t first, const Activations& read) {
        if (!offset) return;
        low_rank<T>(offset, C, r.row(i) + first, N, first, first + N, read.row(i));
        for (int64_t c = first; c < first + N; c += LANES) store(y.row(i) + c, load(y.row(i) + c) + load(read.row(i) + c));
    }

    void add_to_x(const Activations& part, int64_t i, int64_t first, int64_t end) {
        for (int64_t c = first; c < end; c += LANES) store(x.row(i) + c, load(x.row(i) + c) + load(part.row(i) + c));
    }

    void square_relu(int64_t i, int64_t first, int64_t end) {
        for (int64_t c = first; c < end; c++) {
            float positive = hidden.row(i)[c] > 0 ? hidden.row(i)[c] : 0;
            hidden.row(i)[c] = positive * positive;
        }
    }

   public:
    int64_t scratch_bytes() const { return (char*)memory - (char*)s.scratch; }
};

}  // namespace
