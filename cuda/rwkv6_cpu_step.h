// RWKV-6's decoding step on a CPU: a few tokens of some slots through the whole model, in float32.
//
// The arithmetic is that of src/rwkv_speech/models/rwkv6.py. It is done in stages, each shared out among the threads
// of a team; a row of activations is a token. Nothing a row gives depends on the other slots' rows.

#pragma once

#include "rwkv6_cpu_products.h"
#include "rwkv6_cpu_team.h"
#include "wkv_cpu_kernel.h"
#include "wkv6_cpu_step.h"

namespace {

constexpr int64_t BLOCK = 32;  // outputs, or columns of a low-rank map in vectors of LANES, of one job
constexpr int MIXES = 5;       // w, k, v, r, g

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
void norm(const float* x, const Rwkv6Norm& by, int64_t first, int64_t n, float epsilon, float* out) {
    Vec sum = {}, squares = {};
    for (int64_t i = 0; i < n; i += LANES) sum += load(x + i);
    float mean = total(sum) / n;
    for (int64_t i = 0; i < n; i += LANES) squares += (load(x + i) - mean) * (load(x + i) - mean);
    float scale = 1.0f / __builtin_sqrtf(total(squares) / n + epsilon);
    for (int64_t i = 0; i < n; i += LANES)
        store(out + i, (load(x + i) - mean) * scale * at<T>(by.weight, first + i) + at<T>(by.bias, first + i));
}

template <class T>
class ModelStep {
    typedef typename T::Element Element;

   public:
    ModelStep(const Rwkv6Model& model, const Rwkv6Step& step, wkv_cpu::Team& team)
        : m(model), s(step), worker(team), C(model.channels), N(model.channels / model.heads), memory((float*)s.scratch) {
        x = take(C), normed = take(C), difference = take(C), y = take(C), low = take(MIXES * m.mix_rank);
        for (Activations& mix : mixes) mix = take(C);
        r = take(C), k = take(C), v = take(C), w = take(C), gate = take(C);
        decay_low = take(m.decay_rank), hidden = take(m.ffn);
    }

    int64_t scratch_bytes() const { return (char*)memory - (char*)s.scratch; }

    void run() {
        worker.for_each(s.tokens, [&](int64_t i) {
            const Element* embedding = (const Element*)m.emb + s.ids[i] * C;
            for (int64_t c = 0; c < C; c += LANES) store(normed.row(i) + c, T::get(embedding + c));
            norm<T>(normed.row(i), m.ln0, 0, C, 1e-5f, x.row(i));
        });
        for (int64_t layer = 0; layer < m.layers; layer++) {
            time_mix(m.layer[layer], layer);
            channel_mix(m.layer[layer], layer);
        }
        worker.for_each(s.tokens, [&](int64_t i) { norm<T>(x.row(i), m.ln_out, 0, C, 1e-5f, normed.row(i)); });
        multiply(m.head, normed, {s.logits, m.vocab}, [](int64_t, int64_t, int64_t) {});
    }

   private:
    const Rwkv6Model& m;
    const Rwkv6Step& s;
    Worker worker;
    const int64_t C, N;
    float* memory;
    Activations x, normed, difference, y, low, mixes[MIXES], r, k, v, w, gate, decay_low, hidden;

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

    static int64_t blocks(int64_t outputs) { return (outputs + BLOCK - 1) / BLOCK; }

    // One job's outputs of y = W x, and then what is done to them, given row, first and end.
    template <class Then>
    void multiply_block(const Rwkv6Matrix& matrix, const Activations& in, const Activations& out, int64_t block,
                        Then then) {
        int64_t first = block * BLOCK, end = first + BLOCK < out.width ? first + BLOCK : out.width;
        product(matrix, in, s.tokens, first, end, out);
        for (int64_t i = 0; i < s.tokens; i++) then(i, first, end);
    }

    template <class Then>
    void multiply(const Rwkv6Matrix& matrix, const Activations& in, const Activations& out, Then then) {
        worker.for_each(blocks(out.width), [&](int64_t block) { multiply_block(matrix, in, out, block, then); });
    }

    // normed = norm(x); difference = the token before less this one, the former as the state would keep it.
    void shift_tokens(const Rwkv6Norm& by, void* shifts, int64_t layer) {
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

    // Columns [first, end) of tanh(x W).
    void tanh_low_rank(const void* weights, const Activations& in, const Activations& out, int64_t block) {
        int64_t width = 4 * LANES, first = block * width, end = first + width < out.width ? first + width : out.width;
        for (int64_t i = 0; i < s.tokens; i++) {
            low_rank<T>(weights, out.width, in.row(i), in.width, first, end, out.row(i));
            for (int64_t c = first; c < end; c++) out.row(i)[c] = tanh(broadcast(out.row(i)[c]))[0];
        }
    }

    static int64_t low_rank_blocks(const Activations& out) { return (out.width + 4 * LANES - 1) / (4 * LANES); }

    void time_mix(const Rwkv6Layer& layer, int64_t number) {
        shift_tokens(layer.ln1, s.att_shift, number);
        worker.for_each(s.tokens, [&](int64_t i) {
            keep_shift(s.att_shift, number, i);
            blend(layer.maa_x, i, mixes[0]);
        });
        worker.for_each(low_rank_blocks(low),
                 [&](int64_t block) { tanh_low_rank(layer.maa_w1, mixes[0], low, block); });
        worker.for_each(C / BLOCK, [&](int64_t block) { mix(layer, block * BLOCK); });
        // Receptance, key, value and gate at once, and the decay's low rank.
        const Rwkv6Matrix* matrices[] = {&layer.key, &layer.value, &layer.receptance, &layer.gate};
        const Activations* outputs[] = {&k, &v, &r, &gate};
        int64_t each = blocks(C), decays = low_rank_blocks(decay_low);
        worker.for_each(decays + 4 * each, [&](int64_t job) {
            if (job < decays) return tanh_low_rank(layer.decay_w1, mixes[0], decay_low, job);
            int64_t part = (job - decays) / each;
            multiply_block(*matrices[part], mixes[1 + part], *outputs[part], (job - decays) % each,
                           [](int64_t, int64_t, int64_t) {});
        });
        worker.for_each(s.tokens * m.heads, [&](int64_t job) {
            if (is_first(job / m.heads)) attend(layer, number, job / m.heads, job % m.heads);
        });
        multiply(layer.output, y, normed, [&](int64_t i, int64_t first, int64_t end) {
            for (int64_t c = first; c < end; c += LANES) store(x.row(i) + c, load(x.row(i) + c) + load(normed.row(i) + c));
        });
    }

    // out = x + maa * (token before - x)
    void blend(const void* maa, int64_t i, const Activations& out) {
        for (int64_t c = 0; c < C; c += LANES)
            store(out.row(i) + c, load(normed.row(i) + c) + load(difference.row(i) + c) * at<T>(maa, c));
    }

    // The five data-dependent mixes of a block of channels.
    void mix(const Rwkv6Layer& layer, int64_t first) {
        for (int64_t i = 0; i < s.tokens; i++)
            for (int f = 0; f < MIXES; f++) {
                float* out = mixes[f].row(i);
                const Element* up = (const Element*)layer.maa_w2 + f * m.mix_rank * C;
                low_rank<T>(up, C, low.row(i) + f * m.mix_rank, m.mix_rank, first, first + BLOCK, out);
                for (int64_t c = first; c < first + BLOCK; c += LANES)
                    store(out + c, load(normed.row(i) + c) +
                                       load(difference.row(i) + c) * (at<T>(layer.maa[f], c) + load(out + c)));
            }
    }

    // One head of the tokens of a slot, the first of which is i: decay, WKV-6, group norm, gate.
    void attend(const Rwkv6Layer& layer, int64_t number, int64_t i, int64_t head) {
        int64_t count = 1, first = head * N;
        while (!is_last(i + count - 1)) count++;
        for (int64_t t = i; t < i + count; t++) {
            low_rank<T>(layer.decay_w2, C, decay_low.row(t), m.decay_rank, first, first + N, w.row(t));
            for (int64_t c = first; c < first + N; c += LANES)
                store(w.row(t) + c, load(w.row(t) + c) + at<T>(layer.decay, c));
        }
        auto tokens = [&](const Activations& from) { return WkvTokens{from.row(i), 0, C, N}; };
        WkvProblem p = {};
        p.heads = m.heads, p.head_size = N, p.bonus_type = (int32_t)m.type, p.u = layer.bonus;
        p.r = tokens(r), p.k = tokens(k), p.v = tokens(v), p.w = tokens(w), p.y = tokens(y);
        float* state = s.wkv + ((number * s.slots + slot(i)) * m.heads + head) * N * N;
        (N == 32 ? step<32> : N == 64 ? step<64> : step<128>)(p, {0, 0, count}, head, state);
        for (int64_t t = i; t < i + count; t++) {
            float* out = y.row(t) + first;
            norm<T>(out, layer.ln_x, first, N, 64e-5f, out);
            for (int64_t c = 0; c < N; c += LANES) {
                Vec g = load(gate.row(t) + first + c);
                store(out + c, load(out + c) * g * sigmoid(g));
            }
        }
    }

    void channel_mix(const Rwkv6Layer& layer, int64_t number) {
        shift_tokens(layer.ln2, s.ffn_shift, number);
        worker.for_each(s.tokens, [&](int64_t i) {
            keep_shift(s.ffn_shift, number, i);
            blend(layer.ffn_maa_k, i, mixes[0]);
            blend(layer.ffn_maa_r, i, mixes[1]);
        });
        worker.for_each(blocks(m.ffn) + blocks(C), [&](int64_t job) {
            if (job < blocks(m.ffn))
                multiply_block(layer.ffn_key, mixes[0], hidden, job, [&](int64_t i, int64_t first, int64_t end) {
                    for (int64_t c = first; c < end; c++) {
                        float positive = hidden.row(i)[c] > 0 ? hidden.row(i)[c] : 0;
                        hidden.row(i)[c] = positive * positive;
                    }
                });
            else
                multiply_block(layer.ffn_receptance, mixes[1], r, job - blocks(m.ffn),
                               [&](int64_t i, int64_t first, int64_t end) {
                                   for (int64_t c = first; c < end; c += LANES)
                                       store(r.row(i) + c, sigmoid(load(r.row(i) + c)));
                               });
        });
        multiply(layer.ffn_value, hidden, y, [&](int64_t i, int64_t first, int64_t end) {
            for (int64_t c = first; c < end; c += LANES)
                store(x.row(i) + c, load(x.row(i) + c) + load(r.row(i) + c) * load(y.row(i) + c));
        });
    }
};

int64_t any_model_scratch(const Rwkv6Model& model, int64_t tokens) {
    wkv_cpu::Team alone = {1, 0, 0};
    Rwkv6Step step = {};
    step.tokens = tokens;
    return ModelStep<Float32>(model, step, alone).scratch_bytes();
}

void any_model_step(const Rwkv6Model& model, const Rwkv6Step& step, wkv_cpu::Team& team) {
    if (model.type == WKV_FLOAT32)
        ModelStep<Float32>(model, step, team).run();
    else
        ModelStep<Bfloat16>(model, step, team).run();
}

}  // namespace
