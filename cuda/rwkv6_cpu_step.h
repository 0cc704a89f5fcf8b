// RWKV-6's decoding step on a CPU: the arithmetic of src/rwkv_speech/models/rwkv6.py.

#pragma once

#include "rwkv_cpu_step.h"
#include "wkv6_cpu_step.h"

namespace {

template <class T>
class Step6 : public Stages<T> {
    typedef Stages<T> Base;
    typedef typename Base::Element Element;
    using Base::m, Base::s, Base::worker, Base::C, Base::N, Base::x, Base::normed, Base::difference, Base::y;
    using Base::hidden, Base::r, Base::k, Base::v, Base::gate, Base::blocks, Base::low_rank_blocks, Base::nothing;
    static constexpr int MIXES = 5;  // w, k, v, r, g

   public:
    Step6(const RwkvModel& model, const RwkvStep& step, wkv_cpu::Team& team)
        : Base(model, step, team), mix_rank(model.ranks[0]), decay_rank(model.ranks[1]) {
        for (Activations& mix : mixes) mix = this->take(C);
        low = this->take(MIXES * mix_rank), w = this->take(C), decay_low = this->take(decay_rank);
    }

    void run() {
        Base::run([&](int64_t number) {
            const Rwkv6Layer& layer = ((const Rwkv6Layer*)m.layer)[number];
            time_mix(layer, number);
            channel_mix(layer, number);
        });
    }

   private:
    const int64_t mix_rank, decay_rank;
    Activations mixes[MIXES], low, w, decay_low;

    void time_mix(const Rwkv6Layer& layer, int64_t number) {
        this->shift_tokens(layer.ln1, s.att_shift, number);
        worker.for_each(s.tokens, [&](int64_t i) {
            this->keep_shift(s.att_shift, number, i);
            this->blend(layer.maa_x, i, mixes[0]);
        });
        worker.for_each(low_rank_blocks(low),
                        [&](int64_t block) { this->low_rank_block(layer.maa_w1, mixes[0], low, block, tanh); });
        worker.for_each(C / BLOCK, [&](int64_t block) { mix(layer, block * BLOCK); });
        // Receptance, key, value and gate at once, and the decay's low rank.
        const RwkvMatrix* matrices[] = {&layer.key, &layer.value, &layer.receptance, &layer.gate};
        const Activations* outputs[] = {&k, &v, &r, &gate};
        int64_t each = blocks(C), decays = low_rank_blocks(decay_low);
        worker.for_each(decays + 4 * each, [&](int64_t job) {
            if (job < decays) return this->low_rank_block(layer.decay_w1, mixes[0], decay_low, job, tanh);
            int64_t part = (job - decays) / each;
            this->multiply_block(*matrices[part], mixes[1 + part], *outputs[part], (job - decays) % each, nothing);
        });
        this->for_each_slot([&](int64_t i, int64_t head) { attend(layer, number, i, head); });
        this->multiply(layer.output, y, normed,
                       [&](int64_t i, int64_t first, int64_t end) { this->add_to_x(normed, i, first, end); });
    }

    // The five data-dependent mixes of a block of channels.
    void mix(const Rwkv6Layer& layer, int64_t first) {
        for (int64_t i = 0; i < s.tokens; i++)
            for (int f = 0; f < MIXES; f++) {
                float* out = mixes[f].row(i);
                const Element* up = (const Element*)layer.maa_w2 + f * mix_rank * C;
                low_rank<T>(up, C, low.row(i) + f * mix_rank, mix_rank, first, first + BLOCK, out);
                for (int64_t c = first; c < first + BLOCK; c += LANES)
                    store(out + c, load(normed.row(i) + c) +
                                       load(difference.row(i) + c) * (at<T>(layer.maa[f], c) + load(out + c)));
            }
    }

    // One head of the tokens of a slot, the first of which is i: decay, WKV-6, group norm, gate.
    void attend(const Rwkv6Layer& layer, int64_t number, int64_t i, int64_t head) {
        int64_t count = this->tokens_of_slot(i), first = head * N;
        for (int64_t t = i; t < i + count; t++) {
            low_rank<T>(layer.decay_w2, C, decay_low.row(t), decay_rank, first, first + N, w.row(t));
            for (int64_t c = first; c < first + N; c += LANES)
                store(w.row(t) + c, load(w.row(t) + c) + at<T>(layer.decay, c));
        }
        auto tokens = [&](const Activations& from) { return WkvTokens{from.row(i), 0, C, N}; };
        WkvProblem p = {};
        p.heads = m.heads, p.head_size = N, p.bonus_type = (int32_t)m.type, p.u = layer.bonus;
        p.r = tokens(r), p.k = tokens(k), p.v = tokens(v), p.w = tokens(w), p.y = tokens(y);
        float* state = this->state(number, i, head);
        (N == 32 ? step<32> : N == 64 ? step<64> : step<128>)(p, {0, 0, count}, head, state);
        for (int64_t t = i; t < i + count; t++) {
            float* out = y.row(t) + first;
            this->add_offset(layer.offset, t, first, w);
            norm<T>(out, layer.ln_x, first, N, 64e-5f, out);
            for (int64_t c = 0; c < N; c += LANES) {
                Vec g = load(gate.row(t) + first + c);
                store(out + c, load(out + c) * g * sigmoid(g));
            }
        }
    }

    void channel_mix(const Rwkv6Layer& layer, int64_t number) {
        this->shift_tokens(layer.ln2, s.ffn_shift, number);
        worker.for_each(s.tokens, [&](int64_t i) {
            this->keep_shift(s.ffn_shift, number, i);
            this->blend(layer.ffn_maa_k, i, mixes[0]);
            this->blend(layer.ffn_maa_r, i, mixes[1]);
        });
        worker.for_each(blocks(m.ffn) + blocks(C), [&](int64_t job) {
            if (job < blocks(m.ffn))
                this->multiply_block(layer.ffn_key, mixes[0], hidden, job, [&](int64_t i, int64_t first, int64_t end) {
                    this->square_relu(i, first, end);
                });
            else
                this->multiply_block(layer.ffn_receptance, mixes[1], r, job - blocks(m.ffn),
                                     [&](int64_t i, int64_t first, int64_t end) {
                                         for (int64_t c = first; c < end; c += LANES)
                                             store(r.row(i) + c, sigmoid(load(r.row(i) + c)));
                                     });
        });
        this->multiply(layer.ffn_value, hidden, y, [&](int64_t i, int64_t first, int64_t end) {
            for (int64_t c = first; c < end; c += LANES)
                store(x.row(i) + c, load(x.row(i) + c) + load(r.row(i) + c) * load(y.row(i) + c));
        });
    }
};

}  // namespace
