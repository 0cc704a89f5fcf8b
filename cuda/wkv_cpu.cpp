// The C interface of the CPU kernels: which instruction set this processor has, and heads over threads.

#include <algorithm>
#include <atomic>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#include "wkv_cpu_kernel.h"
#include "wkv_cpu_threads.h"

using wkv_cpu::Kernels;
using wkv_cpu::kernels;
using wkv_cpu::span_of;

const Kernels& wkv_cpu::kernels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                __builtin_cpu_supports("bmi2");
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512) return wkv_cpu::avx512;
    if (avx2) return wkv_cpu::avx2;
#endif
    return wkv_cpu::plain;
}

namespace {

const wkv_cpu::Recurrence& recurrence(const WkvProblem& p) {
    return p.version == 7 ? kernels().wkv7 : kernels().wkv6;
}

// How many threads are worth starting, which takes some 20 microseconds each.
int useful_threads(const WkvProblem& p, int threads) {
    constexpr int64_t worth = 1 << 21;  // updates of a state's number: some 100 microseconds
    int64_t tokens = p.bounds ? p.tokens : p.batch * p.tokens;
    int64_t work = (tokens + p.sequences) * p.heads * p.head_size * p.head_size / worth;
    return (int)std::max<int64_t>(1, std::min({(int64_t)threads, work, p.sequences * p.heads}));
}

int64_t longest(const WkvProblem& p) {
    int64_t most = 0;
    for (int64_t s = 0; s < p.sequences; s++) most = std::max(most, span_of(p, s).count);
    return most;
}

// Calls job(sequence, head, thread) for each head, on threads that end with the call: a pool would not survive a fork.
//
// Each thread has some heads, side by side, of all sequences, the longest first; when it is done it takes what is left
// of the others'. If any thread did any head, each one's cache would fetch the others' parts of a token's row, too.
template <class Job>
void for_each_head(const WkvProblem& p, int threads, Job job) {
    std::vector<int64_t> order(p.sequences);
    std::iota(order.begin(), order.end(), 0);
    if (p.bounds)
        std::stable_sort(order.begin(), order.end(),
                         [&](int64_t a, int64_t b) { return span_of(p, a).count > span_of(p, b).count; });
    struct alignas(64) Count {  // in a cache line of its own
        std::atomic<int64_t> begun{0};
    };
    std::vector<Count> counts(threads);
    auto work = [&](int thread) {
        wkv_cpu::SubnormalsAreZero scope;
        for (int i = 0; i < threads; i++) {
            int owner = (thread + i) % threads;
            int64_t first = p.heads * owner / threads, heads = p.heads * (owner + 1) / threads - first, mine;
            while ((mine = counts[owner].begun.fetch_add(1, std::memory_order_relaxed)) < p.sequences * heads)
                job(order[mine / heads], first + mine % heads, thread);
        }
    };
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (int thread = 1; thread < threads; thread++) others.emplace_back(work, thread);
    } catch (const std::system_error&) {
        // The system grants no more threads: those that run do the work.
    }
    work(0);
    for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

const char* wkv_cpu_isa(void) { return kernels().isa; }

int64_t wkv_cpu_scratch(const WkvProblem* p, int threads) {
    return recurrence(*p).scratch(p->head_size, longest(*p)) * useful_threads(*p, threads);
}

void wkv_cpu_forward(const WkvProblem* p, int threads) {
    const wkv_cpu::Recurrence& run = recurrence(*p);
    for_each_head(*p, useful_threads(*p, threads),
                  [&](int64_t sequence, int64_t head, int) { run.forward(*p, sequence, head); });
}

void wkv_cpu_backward(const WkvProblem* p, int threads) {
    const wkv_cpu::Recurrence& run = recurrence(*p);
    int64_t bytes = run.scratch(p->head_size, longest(*p));
    for_each_head(*p, useful_threads(*p, threads), [&](int64_t sequence, int64_t head, int thread) {
        run.backward(*p, sequence, head, (char*)p->scratch + thread * bytes);
    });
}

void wkv_cpu_step(const WkvProblem* p, int threads) {
    const wkv_cpu::Recurrence& run = recurrence(*p);
    for_each_head(*p, useful_threads(*p, threads),
                  [&](int64_t sequence, int64_t head, int) { run.step(*p, sequence, head); });
}

}  // extern "C"
