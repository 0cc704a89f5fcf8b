// RWKV-7's decoding step on a CPU: the arithmetic of src/rwkv_speech/models/rwkv7.py.

#pragma once

#include "rwkv_cpu_step.h"
#include "wkv7_cpu.h"

namespace {

template <class T>
class Step7 : public Stages<T> {
    typedef Stages<T> Base;
    using Base::m, Base::s, Base::worker, Base::C, Base::N, Base::x, Base::normed, Base::y, Base::hidden;
    using Base::r, Base::k, Base::v, Base::gate, Base::blocks, Base::low_rank_blocks, Base::nothing;
    enum { R, W, K, V, A, G, MIXES };

   public:
    Step7(const RwkvModel& model, const RwkvStep& step, wkv_cpu::Team& team) : Base(model, step, team) {
        for (Activations& mix : mixes) mix = this->take(C);
        decay_low = this->take(m.ranks[0]), rate_low = this->take(m.ranks[1]);
        value_low = this->take(m.ranks[2]), gate_low = this->take(m.ranks[3]);
        decay = this->take(C), rate = this->take(C), blend_v = this->take(C), first_v = this->take(C);
    }

    void run() {
        Base::run([&](int64_t number) {
            const Rwkv7Layer& layer = ((const Rwkv7Layer*)m.layer)[number];
            time_mix(layer, number);
            channel_mix(layer, number);
        });
    }

   private:
    Activations mixes[MIXES], decay_low, rate_low, value_low, gate_low, decay, rate, blend_v, first_v;

    void time_mix(const Rwkv7Layer& layer, int64_t number) {
        this->shift_tokens(layer.ln1, s.att_shift, number);
        const void* by[] = {layer.x_r, layer.x_w, layer.x_k, layer.x_v, layer.x_a, layer.x_g};
        worker.for_each(s.tokens, [&](int64_t i) {
            this->keep_shift(s.att_shift, number, i);
            for (int mix = 0; mix < MIXES; mix++) this->blend(by[mix], i, mixes[mix]);
        });
        // The low ranks, then receptance, key and value, all at once.
        const int64_t decays = low_rank_blocks(decay_low), rates = decays + low_rank_blocks(rate_low),
                      gates = rates + low_rank_blocks(gate_low),
                      maps = gates + (layer.v1 ? low_rank_blocks(value_low) : 0), each = blocks(C);
        const RwkvMatrix* matrices[] = {&layer.receptance, &layer.key, &layer.value};
        const Activations* outputs[] = {&r, &k, &v};
        const int mix_of[] = {R, K, V};
        const auto same = [](Vec value) { return value; };
        worker.for_each(maps + 3 * each, [&](int64_t job) {
            if (job < decays) return this->low_rank_block(layer.w1, mixes[W], decay_low, job, tanh);
            if (job < rates) return this->low_rank_block(layer.a1, mixes[A], rate_low, job - decays, same);
            if (job < gates) return this->low_rank_block(layer.g1, mixes[G], gate_low, job - rates, sigmoid);
            if (job < maps) return this->low_rank_block(layer.v1, mixes[V], value_low, job - gates, same);
            int64_t part = (job - maps) / each;
            this->multiply_block(*matrices[part], mixes[mix_of[part]], *outputs[part], (job - maps) % each, nothing);
        });
        this->for_each_slot([&](int64_t i, int64_t head) {
            int64_t count = this->tokens_of_slot(i);
            float* state = this->state(number, i, head);
            for (int64_t t = i; t < i + count; t++)
                (N == 32 ? attend<32> : N == 64 ? attend<64> : attend<128>)(*this, layer, t, head * N, state);
        });
        this->multiply(layer.output, y, normed,
                       [&](int64_t i, int64_t first, int64_t end) { this->add_to_x(normed, i, first, end); });
    }

    // out = (x W + constant) for the channels of a head, W a low-rank map.
    void low_rank_of_head(const void* weights, const void* constant, const Activations& low, int64_t i, int64_t first,
                          const Activations& out) {
        low_rank<T>(weights, C, low.row(i), low.width, first, first + N, out.row(i));
        for (int64_t c = first; c < first + N && constant; c += LANES)
            store(out.row(i) + c, load(out.row(i) + c) + at<T>(constant, c));
    }

    // One head of a token, its channels from `first`: decay, rate, values, WKV-7, group norm, bonus, gate.
    template <int SIZE>
    static void attend(Step7& self, const Rwkv7Layer& layer, int64_t i, int64_t first, float* state) {
        wkv7::Tokens<SIZE> token;
        alignas(64) float u[SIZE];
        float* out = self.y.row(i) + first;
        const float bonus = self.prepare(layer, i, first, token);
        wkv7::token_forward<SIZE>(token, 0, state, state, u, out);
        self.add_offset(layer.offset, i, first, self.decay);
        norm<T>(out, layer.ln_x, first, SIZE, 64e-5f, out);
        for (int64_t c = 0; c < SIZE; c += LANES)
            store(out + c, (load(out + c) + bonus * load(token.v[0] + c)) * load(self.gate.row(i) + first + c));
    }

    // What WKV-7 takes of a head of a token; returns the token's bonus, the sum of r k r_k.
    template <int SIZE>
    float prepare(const Rwkv7Layer& layer, int64_t i, int64_t first, wkv7::Tokens<SIZE>& token) {
        low_rank_of_head(layer.w2, layer.w0, decay_low, i, first, decay);
        low_rank_of_head(layer.a2, layer.a0, rate_low, i, first, rate);
        low_rank_of_head(layer.g2, nullptr, gate_low, i, first, gate);
        if (layer.v1) low_rank_of_head(layer.v2, layer.v0, value_low, i, first, blend_v);
        Vec squares = {}, bonus = {};
        for (int64_t c = 0; c < SIZE; c += LANES) {
            const int64_t at_c = first + c;
            Vec value = load(v.row(i) + at_c), key = load(k.row(i) + at_c), a = sigmoid(load(rate.row(i) + at_c));
            if (layer.v1)
                value += (load(first_v.row(i) + at_c) - value) * sigmoid(load(blend_v.row(i) + at_c));
            else
                store(first_v.row(i) + at_c, value);
            Vec removed = key * at<T>(layer.k_k, at_c), receptance = load(r.row(i) + at_c);
            key = key * (1.0f + (a - 1.0f) * at<T>(layer.k_a, at_c));
            squares += removed * removed;
            bonus += receptance * key * at<T>(layer.r_k, at_c);
            store(token.r[0] + c, receptance), store(token.k[0] + c, key), store(token.v[0] + c, value);
            store(token.a[0] + c, removed), store(token.b[0] + c, a);
            // exp(w) = e^-0.5 sigmoid(...)
            store(token.d[0] + c, exp(-0.60653066f * sigmoid(load(decay.row(i) + at_c))));
        }
        const float length = __builtin_sqrtf(total(squares)), scale = 1.0f / (length > 1e-12f ? length : 1e-12f);
        for (int64_t c = 0; c < SIZE; c += LANES) {
            Vec removed = load(token.a[0] + c) * scale;
            store(token.a[0] + c, -removed);
            store(token.b[0] + c, removed * load(token.b[0] + c));
        }
        return total(bonus);
    }

    void channel_mix(const Rwkv7Layer& layer, int64_t number) {
        this->shift_tokens(layer.ln2, s.ffn_shift, number);
        worker.for_each(s.tokens, [&](int64_t i) {
            this->keep_shift(s.ffn_shift, number, i);
            this->blend(layer.ffn_x_k, i, mixes[K]);
        });
        this->multiply(layer.ffn_key, mixes[K], hidden,
                       [&](int64_t i, int64_t first, int64_t end) { this->square_relu(i, first, end); });
        this->multiply(layer.ffn_value, hidden, y,
                       [&](int64_t i, int64_t first, int64_t end) { this->add_to_x(y, i, first, end); });
    }
};

}  // namespace
