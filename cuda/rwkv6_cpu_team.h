// Threads that walk through a model together: each stage's jobs go to whoever is free, and all wait for its end.

#pragma once

#include <sched.h>
#include <stdint.h>

namespace wkv6_cpu {

struct Team {
    int64_t threads;
    int64_t next;     // the stage's first job that nobody has taken
    int64_t arrived;  // threads that found no more jobs
    int64_t stage;
};

}  // namespace wkv6_cpu

namespace {

// Calls job(i) for each i below `count`, on all threads of the team, every one of which must call this.
template <class Job>
inline void for_each(wkv6_cpu::Team& team, int64_t count, Job job) {
    if (team.threads == 1) {
        for (int64_t i = 0; i < count; i++) job(i);
        return;
    }
    int64_t stage = __atomic_load_n(&team.stage, __ATOMIC_RELAXED);
    for (int64_t i; (i = __atomic_fetch_add(&team.next, 1, __ATOMIC_RELAXED)) < count;) job(i);
    if (__atomic_add_fetch(&team.arrived, 1, __ATOMIC_ACQ_REL) == team.threads) {
        team.next = team.arrived = 0;
        __atomic_store_n(&team.stage, stage + 1, __ATOMIC_RELEASE);
        return;
    }
    constexpr int patience = 20000;  // looks before the others may have the processor
    for (int look = 0; __atomic_load_n(&team.stage, __ATOMIC_ACQUIRE) == stage; look++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (look >= patience) sched_yield();
    }
}

}  // namespace
