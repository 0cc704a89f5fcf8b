// The C interface of the decoding step: checks, and threads.

#include "rwkv.h"
#include "rwkv_cpu_team.h"
#include "wkv_cpu_kernel.h"
#include "wkv_cpu_threads.h"

// OpenMP's, if the process has one: PyTorch's own pool is woken in a few microseconds.
extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
int omp_get_num_threads(void) __attribute__((weak));
}

namespace {

constexpr int64_t WORTH = 1 << 26;  // multiplications: less is done before another thread is awake

struct Call {
    const RwkvModel& model;
    const RwkvStep& step;
    wkv_cpu::Team team;
};

void take_part(void* data) {
    Call& call = *(Call*)data;
    call.team.threads = omp_get_num_threads && GOMP_parallel ? omp_get_num_threads() : 1;
    wkv_cpu::SubnormalsAreZero scope;
    wkv_cpu::kernels().model_step(call.model, call.step, call.team);
}

int64_t multiplications(const RwkvModel& m) {
    return m.layers * m.channels * (6 * m.channels + 2 * m.ffn) + m.channels * m.vocab;
}

// Whether each token is of the vocabulary and of a slot, and the tokens of a slot stand together.
bool fits(const RwkvModel& m, const RwkvStep& s) {
    if (!s.slot && s.tokens != s.slots) return false;
    for (int64_t i = 0; i < s.tokens; i++) {
        if (s.ids[i] < 0 || s.ids[i] >= m.vocab) return false;
        if (!s.slot || (i && s.slot[i] == s.slot[i - 1])) continue;
        if (s.slot[i] < 0 || s.slot[i] >= s.slots) return false;
        for (int64_t before = 0; before < i; before++)
            if (s.slot[before] == s.slot[i]) return false;
    }
    return true;
}

}  // namespace

extern "C" {

int64_t rwkv_cpu_scratch(const RwkvModel* model, int64_t tokens) {
    return wkv_cpu::kernels().model_scratch(*model, tokens);
}

// 0, or 1 if the tokens or slots do not fit; then nothing is changed.
int rwkv_cpu_step(const RwkvModel* model, const RwkvStep* step, int threads) {
    if (!fits(*model, *step)) return 1;
    Call call = {*model, *step, {1, 0, 0}};
    if (threads > 1 && GOMP_parallel && step->tokens * multiplications(*model) > WORTH)
        GOMP_parallel(take_part, &call, threads, 0);
    else
        take_part(&call);
    return 0;
}

}  // extern "C"
