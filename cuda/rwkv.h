// The C interface of the decoding step of RWKV-6 and RWKV-7 on a CPU: the whole model in one call.
//
// src/rwkv_speech/ops/rwkv_cpu.py mirrors these structures field by field.

#pragma once

#include "wkv.h"

#ifdef __cplusplus
extern "C" {
#endif

// Weights (outputs, inputs) of 8 bits; those of an output share a scale.
enum { RWKV_INT8 = 3 };

// (outputs, inputs), contiguous.
typedef struct {
    const void* data;
    const float* scales;  // (outputs), for RWKV_INT8
    int64_t type;         // WkvType or RWKV_INT8
} RwkvMatrix;

typedef struct {
    const void *weight, *bias;
} RwkvNorm;

// Under the names of the published checkpoints; vectors and low-rank maps are of the model's type.
typedef struct {
    RwkvNorm ln1, ln2, ln_x;
    const void* maa_x;
    const void* maa[5];  // of w, k, v, r, g
    const void *maa_w1, *maa_w2;
    const void *decay, *decay_w1, *decay_w2, *bonus;
    const void *ffn_maa_k, *ffn_maa_r;
    const void* offset;  // (head size, channels), what is added to the state that r reads, keys first; or null
    RwkvMatrix receptance, key, value, gate, output;
    RwkvMatrix ffn_key, ffn_receptance, ffn_value;
} Rwkv6Layer;

typedef struct {
    RwkvNorm ln1, ln2, ln_x;
    const void *x_r, *x_w, *x_k, *x_v, *x_a, *x_g;
    const void *w0, *w1, *w2, *a0, *a1, *a2, *g1, *g2;
    const void *v0, *v1, *v2;  // null in the first layer
    const void *k_k, *k_a, *r_k;
    const void* ffn_x_k;
    const void* offset;  // as in RWKV-6
    RwkvMatrix receptance, key, value, output;
    RwkvMatrix ffn_key, ffn_value;
} Rwkv7Layer;

typedef struct {
    int64_t version;  // 6 or 7
    int64_t layers, channels, heads, ffn, vocab;
    int64_t ranks[4];  // in RWKV-6 of mixes and decay; in RWKV-7 of decay, rate, value and gate
    int64_t type;  // WKV_FLOAT32 or WKV_BFLOAT16: of vectors, low-rank maps, embeddings and token shifts
    const void* layer;  // Rwkv6Layer or Rwkv7Layer
    const void* emb;
    RwkvNorm ln0, ln_out;
    RwkvMatrix head;
} RwkvModel;

// Tokens of one slot stand together, in their order; its state is changed in place.
typedef struct {
    int64_t tokens, slots;
    const int64_t* ids;    // (tokens)
    const int64_t* slot;   // (tokens) each token's slot; null: one token of each slot
    float* wkv;            // (layers, slots, heads, head size, head size)
    void *att_shift, *ffn_shift;  // (layers, slots, channels)
    float* logits;         // (tokens, vocab)
    void* scratch;         // as many bytes as the library asks for
} RwkvStep;

#ifdef __cplusplus
}
#endif
