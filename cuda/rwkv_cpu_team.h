// Threads that walk through a model together, stage by stage: each stage's jobs go to whoever is free.
//
// A stage ends with its last job, not when all threads have arrived: on a busy machine a thread that has lost the
// processor holds up nobody unless it was in the middle of a job, and goes on with the stage where the others are.

#pragma once

#include <sched.h>
#include <stdint.h>

namespace wkv_cpu {

struct Team {
    int64_t threads;
    int64_t ticket;  // the stage that the others are in, times 2^32, and its first job that nobody has taken
    int64_t done;    // jobs of that stage
};

}  // namespace wkv_cpu

namespace {

class Worker {
   public:
    explicit Worker(wkv_cpu::Team& team) : team(team) {}

    // Calls job(i) for each i below `count`, here or on another thread of the team, all of which call this alike.
    template <class Job>
    void for_each(int64_t count, Job job) {
        if (count == 0) return;
        if (team.threads == 1) {
            for (int64_t i = 0; i < count; i++) job(i);
            return;
        }
        int64_t here = stage++, ticket;
        while ((ticket = __atomic_load_n(&team.ticket, __ATOMIC_ACQUIRE)) < (here << 32) + count) {
            if (!__atomic_compare_exchange_n(&team.ticket, &ticket, ticket + 1, false, __ATOMIC_ACQ_REL,
                                             __ATOMIC_RELAXED))
                continue;
            job(ticket - (here << 32));
            if (__atomic_add_fetch(&team.done, 1, __ATOMIC_ACQ_REL) == count) {
                __atomic_store_n(&team.done, 0, __ATOMIC_RELAXED);
                __atomic_store_n(&team.ticket, (here + 1) << 32, __ATOMIC_RELEASE);
                return;
            }
        }
        constexpr int patience = 200;  // looks before others may have the processor
        for (int look = 0; __atomic_load_n(&team.ticket, __ATOMIC_ACQUIRE) >> 32 == here; look++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (look >= patience) sched_yield();
        }
    }

   private:
    wkv_cpu::Team& team;
    int64_t stage = 0;
};

}  // namespace
