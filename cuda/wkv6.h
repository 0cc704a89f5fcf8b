// The C interface of the native WKV-6 kernels: what Python fills in and both libraries read.
//
// No PyTorch header is needed, so that a build takes seconds and one binary serves every PyTorch.
// src/rwkv_speech/ops/native.py mirrors these structures field by field.

#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum Wkv6Type { WKV6_FLOAT32 = 0, WKV6_BFLOAT16 = 1, WKV6_FLOAT16 = 2 };

// (batch, time, head, channel); strides in elements, that of the channels is 1.
typedef struct {
    void* data;
    int64_t batch, time, head;
} Wkv6Tokens;

// float32 (sequence, head, value, key); the N x N matrix of one head is contiguous. A stride of 0 is an expanded state.
typedef struct {
    float* data;
    int64_t sequence, head;
} Wkv6State;

typedef struct {
    int64_t batch, tokens, heads, head_size, sequences;
    int32_t type;         // of r, k, v, y and their gradients: Wkv6Type
    int32_t decay_type;   // of w and dw: `type` or float32
    int32_t bonus_type;   // of u: `type` or float32
    int32_t need_du;      // 0: du is not touched
    const int64_t* bounds;  // packed: (sequences + 1), from 0 to tokens; null: dense, sequences == batch
    const void* u;          // (heads, head size), contiguous
    Wkv6Tokens r, k, v, w;
    Wkv6State state;  // before the first token
    // forward
    Wkv6Tokens y;
    Wkv6State last;  // after the last token
    // backward
    Wkv6Tokens dy;
    Wkv6State dlast;
    Wkv6Tokens dr, dk, dv, dw;
    float* du;  // (sequences, heads, head size): each sequence's part, to be summed in order
    Wkv6State dstate;
    void* scratch;  // backward: as many bytes as the library asks for
} Wkv6Problem;

#ifdef __cplusplus
}
#endif
