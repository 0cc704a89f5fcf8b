// The C interface of RWKV-6's decoding step on a CPU: the whole model in one call.
//
// src/rwkv_speech/ops/rwkv6_cpu.py mirrors these structures field by field.

#pragma once

#include "wkv.h"

#ifdef __cplusplus
extern "C" {
#endif

// Weights (outputs, inputs) of 8 bits; those of an output share a scale.
enum { RWKV6_INT8 = 3 };

// (outputs, inputs), contiguous.
typedef struct {
    const void* data;
    const float* scales;  // (outputs), for RWKV6_INT8
    int64_t type;         // WkvType or RWKV6_INT8
} Rwkv6Matrix;

typedef struct {
    const void *weight, *bias;
} Rwkv6Norm;

// Under the names of the published checkpoints; vectors and low-rank maps are of the model's type.
typedef struct {
    Rwkv6Norm ln1, ln2, ln_x;
    const void* maa_x;
    const void* maa[5];  // of w, k, v, r, g
    const void *maa_w1, *maa_w2;
    const void *decay, *decay_w1, *decay_w2, *bonus;
    const void *ffn_maa_k, *ffn_maa_r;
    Rwkv6Matrix receptance, key, value, gate, output;
    Rwkv6Matrix ffn_key, ffn_receptance, ffn_value;
} Rwkv6Layer;

typedef struct {
    int64_t layers, channels, heads, ffn, mix_rank, decay_rank, vocab;
    int64_t type;  // WKV_FLOAT32 or WKV_BFLOAT16: of vectors, low-rank maps, embeddings and token shifts
    const Rwkv6Layer* layer;
    const void* emb;
    Rwkv6Norm ln0, ln_out;
    Rwkv6Matrix head;
} Rwkv6Model;

// Tokens of one slot stand together, in their order; its state is changed in place.
typedef struct {
    int64_t tokens, slots;
    const int64_t* ids;    // (tokens)
    const int64_t* slot;   // (tokens) each token's slot; null: one token of each slot
    float* wkv;            // (layers, slots, heads, head size, head size)
    void *att_shift, *ffn_shift;  // (layers, slots, channels)
    float* logits;         // (tokens, vocab)
    void* scratch;         // as many bytes as the library asks for
} Rwkv6Step;

#ifdef __cplusplus
}
#endif
