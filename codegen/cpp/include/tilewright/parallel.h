// One team of threads per step: a single OpenMP region runs every kernel, with a spinning barrier between them.
// Opening a region for each of the some 150 kernels of a step would cost more than the small kernels themselves.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <sched.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace tw {

static inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Shared by the threads of one step; lives on the stack of the caller.
struct Team {
    explicit Team(int size) : size(size) {}
    const int size;
    alignas(64) std::atomic<uint32_t> arrived{0};
    alignas(64) std::atomic<uint32_t> epoch{0};
};

// What one thread knows about its team.
struct Worker {
    Team& team;
    int id;

    int size() const { return team.size; }

    // Wait for the whole team. Yields after a while, because another process may hold the core of a late thread.
    void barrier() const {
        if (team.size == 1) return;
        const uint32_t epoch = team.epoch.load(std::memory_order_relaxed);
        if (team.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(team.size)) {
            team.arrived.store(0, std::memory_order_relaxed);
            team.epoch.store(epoch + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; team.epoch.load(std::memory_order_acquire) == epoch; spins++) {
            if (spins < 4000) {
                pause_cpu();
            } else {
                sched_yield();
            }
        }
    }
};

// The half-open range of one worker; empty when there is nothing left for it.
struct Range {
    long begin, end;
};

// Split [0, total) evenly, each boundary a multiple of `grain` (so that two threads never share a cache line).
static inline Range split(long total, int id, int size, long grain = 1) {
    long blocks = (total + grain - 1) / grain;
    long begin = blocks * id / size * grain, end = blocks * (id + 1) / size * grain;
    return {begin < total ? begin : total, end < total ? end : total};
}
static inline Range split(const Worker& w, long total, long grain = 1) { return split(total, w.id, w.size(), grain); }

// Bytes for `count` elements of scratch, in whole cache lines; `carve` takes them off the front of a piece of scratch.
template <class T>
static inline long bytes(long count) {
    return (count * long(sizeof(T)) + 63) / 64 * 64;
}
template <class T>
static inline T* carve(char*& scratch, long count) {
    T* taken = reinterpret_cast<T*>(scratch);
    scratch += bytes<T>(count);
    return taken;
}

// Run body(worker) on `threads` threads. The team takes the size that OpenMP really gave.
template <class Body>
static inline void run_team(int threads, const Body& body) {
#if defined(_OPENMP)
    if (threads > 1) {
        alignas(64) unsigned char room[sizeof(Team)];
        Team* team = nullptr;
#pragma omp parallel num_threads(threads)
        {
#pragma omp single
            team = new (room) Team(omp_get_num_threads());
            Worker worker{*team, omp_get_thread_num()};
            body(worker);
        }
        return;
    }
#endif
    Team team(1);
    Worker worker{team, 0};
    body(worker);
}

}  // namespace tw
