// The C interface of the native kernels of WKV-6 and WKV-7: what Python fills in and both libraries read.
//
// No PyTorch header is needed, so that a build takes seconds and one binary serves every PyTorch.
// src/rwkv_speech/ops/native.py mirrors these structures field by field.

#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum WkvType { WKV_FLOAT32 = 0, WKV_BFLOAT16 = 1, WKV_FLOAT16 = 2 };

// (batch, time, head, channel), 16-byte aligned; strides in elements, multiples of 8: that of time less than 2^24, that
// of the channels 1.
typedef struct {
    void* data;
    int64_t batch, time, head;
} WkvTokens;

// float32 (sequence, head, value, key), 16-byte aligned; the N x N matrix of one head is contiguous. A stride of 0 is
// an expanded state.
typedef struct {
    float* data;
    int64_t sequence, head;
} WkvState;

typedef struct {
    int64_t batch, tokens, heads, head_size, sequences;
    int32_t version;      // 6: u is read, a and b are not; 7: the other way round
    int32_t type;         // of r, k, v, a, b, y and their gradients: WkvType
    int32_t decay_type;   // of w and dw: `type` or float32
    int32_t bonus_type;   // of u: `type` or float32
    int32_t need_du;      // 0: du is not touched
    const int64_t* bounds;  // packed: (sequences + 1), from 0 to tokens; null: dense, sequences == batch
    int32_t* order;         // packed, on a GPU: (sequences), written by the library
    const void* u;          // (heads, head size), contiguous
    WkvTokens r, k, v, w, a, b;
    WkvState state;  // before the first token
    // forward
    WkvTokens y;
    WkvState last;  // after the last token
    // backward
    WkvTokens dy;
    WkvState dlast;
    WkvTokens dr, dk, dv, dw, da, db;
    float* du;  // (sequences, heads, head size): each sequence's part, to be summed in order
    WkvState dstate;
    void* scratch;  // backward: as many bytes as the library asks for
} WkvProblem;

#ifdef __cplusplus
}
#endif
