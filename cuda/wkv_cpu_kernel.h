// What the dispatch (wkv_cpu.cpp) calls: wkv_cpu_kernel.cpp, compiled once per instruction set.

#pragma once

#include "rwkv.h"
#include "rwkv_cpu_team.h"

namespace wkv_cpu {

// The work of one head of one sequence. Nothing is shared between heads, so that any thread may do any of them.
struct Recurrence {
    void (*forward)(const WkvProblem&, int64_t sequence, int64_t head);
    void (*backward)(const WkvProblem&, int64_t sequence, int64_t head, void* scratch);
    void (*step)(const WkvProblem&, int64_t sequence, int64_t head);  // `state` becomes the last state in place
    int64_t (*scratch)(int64_t head_size, int64_t longest);  // bytes for `backward`, a multiple of 64
};

struct Kernels {
    const char* isa;
    Recurrence wkv6, wkv7;
    void (*model_step)(const RwkvModel&, const RwkvStep&, Team&);  // called by each thread of the team
    int64_t (*model_scratch)(const RwkvModel&, int64_t tokens);     // bytes for `model_step`
};

struct Span {
    int64_t batch, first, count;
};

// The tokens of a sequence.
static inline Span span_of(const WkvProblem& p, int64_t sequence) {
    if (!p.bounds) return {sequence, 0, p.tokens};
    return {0, p.bounds[sequence], p.bounds[sequence + 1] - p.bounds[sequence]};
}

extern const Kernels avx512, avx2, plain;

// Those of the best instruction set that this processor has.
const Kernels& kernels();

}  // namespace wkv_cpu
