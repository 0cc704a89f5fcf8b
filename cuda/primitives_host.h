// The primitives on a CPU, to test the kernels where there is no GPU (x86-64 or any system with ucontext).
//
// Each thread of a block is a fiber that runs until it has to wait. Waiting for a barrier needs the whole block,
// shuffles and matrix products the whole warp. Warps, and threads in a warp, take turns in an order that the test
// chooses, and a warp runs as far ahead as it can: results must not depend on it, or a barrier is missing. Shared memory
// starts as NaN; copies arrive only when they are waited for.

#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define DEVICE inline
#define KERNEL(threads, blocks) inline void

using Stream = void*;

namespace host {

enum class Wait { nothing, warp, block, ended };

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Wait wait = Wait::nothing;
    std::vector<std::vector<Copy>> groups = {{}};
    int turn = 0;  // collective operations of this fiber so far, modulo 2
    void* fake_stack = nullptr;
};

// What the lanes of a warp lay down for each other: two turns, since no lane can be two operations ahead.
struct Exchange {
    float values[2][32][8];
    const char* operation[2][32];
};

struct Block {
    int64_t index = 0;
    std::vector<Fiber> fibers;
    std::vector<Exchange> warps;
    char* shared = nullptr;
    std::function<void()> body;
    ucontext_t scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    void* scheduler_fake_stack = nullptr;
    int now = 0;
};

inline Block* block = nullptr;
inline int order = 0;  // 0: first one first; 1: last one first; 2: odd ones first

[[noreturn]] inline void fail(const char* message) {
    fprintf(stderr, "host run: block %lld, thread %d: %s\n", static_cast<long long>(block->index), block->now, message);
    abort();
}

inline void enter(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block->scheduler_fake_stack, fiber.stack.data(), fiber.stack.size());
#endif
    swapcontext(&block->scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block->scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void leave(Wait wait) {
    Fiber& fiber = block->fibers[block->now];
    fiber.wait = wait;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(wait == Wait::ended ? nullptr : &fiber.fake_stack, block->scheduler_stack,
                                   block->scheduler_stack_size);
#endif
    swapcontext(&fiber.context, &block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &block->scheduler_stack, &block->scheduler_stack_size);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_size);
#endif
    block->body();
    leave(Wait::ended);
}

inline void prepare(Fiber& fiber) {
    fiber.stack.resize(1 << 16);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, fiber_main, 0);
}

inline bool all_wait(size_t first, size_t last, Wait wait) {
    for (size_t i = first; i < last; i++) {
        if (block->fibers[i].wait != wait) {
            return false;
        }
    }
    return true;
}

inline bool release(size_t first, size_t last, Wait wait) {
    if (!all_wait(first, last, wait)) {
        return false;
    }
    for (size_t i = first; i < last; i++) {
        block->fibers[i].wait = Wait::nothing;
    }
    return true;
}

inline int nth(int i, int count) {
    if (order == 0) {
        return i;
    }
    if (order == 1) {
        return count - 1 - i;
    }
    return i < count / 2 ? 2 * i + 1 : 2 * (i - count / 2);
}

// Runs one warp until all its threads have ended or wait for the block; whether any of them ran.
inline bool run_warp(int first) {
    bool progress = false;
    do {
        for (int i = 0; i < 32; i++) {
            block->now = first + nth(i, 32);
            if (block->fibers[block->now].wait == Wait::nothing) {
                enter(block->fibers[block->now]);
                progress = true;
            }
        }
    } while (release(first, first + 32, Wait::warp));
    return progress;
}

// Runs all threads of the block to their ends. A warp runs as far ahead of the others as it can.
inline void run_block() {
    const int warps = static_cast<int>(block->warps.size()), threads = 32 * warps;
    while (!all_wait(0, threads, Wait::ended)) {
        bool progress = false;
        for (int i = 0; i < warps; i++) {
            progress |= run_warp(32 * nth(i, warps));
        }
        progress |= release(0, threads, Wait::block);
        if (!progress) {
            fail("some threads wait where others have ended or wait for something else");
        }
    }
}

// Lays down up to eight numbers, waits for the warp, and gives what all 32 lanes laid down.
inline float (*exchange(const char* operation, const float* values, int count))[8] {
    Fiber& fiber = block->fibers[block->now];
    Exchange& warp = block->warps[block->now / 32];
    const int turn = fiber.turn, lane = block->now % 32, thread = block->now;
    fiber.turn = 1 - turn;
    if (count > 0) {
        memcpy(warp.values[turn][lane], values, count * sizeof(float));
    }
    warp.operation[turn][lane] = operation;
    leave(Wait::warp);
    for (int other = 0; other < 32; other++) {
        if (strcmp(warp.operation[turn][other], operation) != 0) {
            fail("the lanes of a warp meet in different operations");
        }
    }
    if (thread != block->now) {
        fail("a thread woke up as another");
    }
    return warp.values[turn];
}

}  // namespace host

inline int64_t block_index() { return host::block->index; }
inline int thread_index() { return host::block->now; }
inline char* shared_memory() { return host::block->shared; }
inline void barrier() { host::leave(host::Wait::block); }
inline void warp_barrier() { host::exchange("warp barrier", nullptr, 0); }

template <class T>
T shuffle(T value, int lane) {
    static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
    float bits;
    memcpy(&bits, &value, 4);
    memcpy(&value, host::exchange("shuffle", &bits, 1)[lane & 31], 4);
    return value;
}

template <class T>
T shuffle_xor(T value, int mask) {
    return shuffle(value, (thread_index() & 31) ^ mask);
}

inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float exp_accurate(float x) { return expf(x); }

inline float to_float(Float16 x) {
    _Float16 half;
    memcpy(&half, &x.bits, 2);
    return static_cast<float>(half);
}

inline void from_float(float& out, float x) { out = x; }

inline void from_float(Float16& out, float x) {
    const _Float16 half = static_cast<_Float16>(x);
    memcpy(&out.bits, &half, 2);
}

inline void from_float(Bfloat16& out, float x) {
    const uint32_t bits = bits_of_float(x);
    out.bits = isnan(x) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class In>
uint32_t pack(float first, float second) {
    In low, high;
    from_float(low, first);
    from_float(high, second);
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

inline float to_tf32(float x) {
    return isfinite(x) ? float_of_bits((bits_of_float(x) + 0x1000) & ~0x1fffu) : x;
}

inline void copy_async(void* shared, const void* global, bool valid) {
    host::block->fibers[host::block->now].groups.back().push_back({shared, global, valid});
    memset(shared, 0xff, 16);  // NaN until it has arrived
}

inline void commit_copies() { host::block->fibers[host::block->now].groups.push_back({}); }

template <int kPending>
void wait_copies() {
    auto& groups = host::block->fibers[host::block->now].groups;
    while (groups.size() > kPending + 1) {  // the last one is not committed yet
        for (const host::Copy& copy : groups.front()) {
            if (copy.valid) {
                memcpy(copy.to, copy.from, 16);
            } else {
                memset(copy.to, 0, 16);
            }
        }
        groups.erase(groups.begin());
    }
}

// c (16 x 8) += a (16 x 8) b (8 x 8) by one warp; layouts as on the device, whose tensor cores drop 13 bits.
inline void matmul(float (&c)[4], const float (&a)[4], float b0, float b1) {
    const auto cut = [](float x) { return float_of_bits(bits_of_float(x) & ~0x1fffu); };
    const float mine[6] = {cut(a[0]), cut(a[1]), cut(a[2]), cut(a[3]), cut(b0), cut(b1)};
    const float(*lanes)[8] = host::exchange("matmul", mine, 6);
    const int g = (thread_index() & 31) / 4, t = thread_index() % 4;
    for (int k = 0; k < 8; k++) {
        const float* row = lanes[4 * g + k % 4];
        for (int n = 0; n < 2; n++) {
            const float b = lanes[4 * (2 * t + n) + k % 4][4 + k / 4];
            c[n] += row[2 * (k / 4)] * b;
            c[2 + n] += row[2 * (k / 4) + 1] * b;
        }
    }
}

// The same for bfloat16, two in a word, which are exact.
inline void matmul(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    float bits[6];
    memcpy(bits, mine, sizeof bits);
    const float(*lanes)[8] = host::exchange("bfloat16 matmul", bits, 6);
    const int g = (thread_index() & 31) / 4, t = thread_index() % 4;
    const auto number = [&](int lane, int word, int place) {
        uint32_t both;
        memcpy(&both, &lanes[lane][word], 4);
        return float_of_bits(both >> (16 * place) << 16);
    };
    for (int k = 0; k < 16; k++) {
        const int from = k % 8 / 2, place = k % 2, late = k / 8;
        for (int n = 0; n < 2; n++) {
            const float b = number(4 * (2 * t + n) + from, 4 + late, place);
            c[n] += number(4 * g + from, 2 * late, place) * b;
            c[2 + n] += number(4 * g + from, 2 * late + 1, place) * b;
        }
    }
}

template <bool kTransposed>
void load_matrices(const void* row, uint32_t (&x)[4]) {
    float bits[2];
    memcpy(bits, &row, sizeof bits);
    const float(*lanes)[8] = host::exchange("load matrices", bits, 2);
    const int g = (thread_index() & 31) / 4, t = thread_index() % 4;
    for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t both[2];
        for (int i = 0; i < 2; i++) {
            const int line = kTransposed ? 2 * t + i : g, column = kTransposed ? g : 2 * t + i;
            const uint16_t* start;
            memcpy(&start, lanes[8 * matrix + line], sizeof start);
            both[i] = start[column];
        }
        memcpy(&x[matrix], both, 4);
    }
}

inline uint32_t transpose_matrix(uint32_t x) {
    const float bits = float_of_bits(x);
    const float(*lanes)[8] = host::exchange("transpose", &bits, 1);
    const int g = (thread_index() & 31) / 4, t = thread_index() % 4;
    uint32_t y = 0;
    for (int i = 0; i < 2; i++) {
        const uint32_t word = bits_of_float(lanes[4 * (2 * t + i) + g / 2][0]);
        y |= (word >> (16 * (g % 2)) & 0xffff) << (16 * i);
    }
    return y;
}

template <class Params>
int launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, Stream, const Params& params) {
    for (int64_t index = 0; index < blocks; index++) {
        host::Block block;
        host::block = &block;
        block.index = index;
        block.shared = static_cast<char*>(malloc(shared_bytes));
        memset(block.shared, 0xff, shared_bytes);
        block.warps.resize(threads / 32);  // all kernels have whole warps
        block.fibers.resize(threads);
        block.body = [&] { kernel(params); };
        for (host::Fiber& fiber : block.fibers) {
            host::prepare(fiber);
        }
        host::run_block();
        free(block.shared);
    }
    return 0;
}
