// One team of threads per step: its threads run every kernel of the step, with a spinning barrier between them. Starting
// threads for each of the some 150 kernels of a step would cost more than the small kernels themselves.
//
// The threads are those of PyTorch's OpenMP library where the caller names one. After each of PyTorch's operations these
// spin for milliseconds and would take a core from any others. Else they are the library's own and persist: between steps
// they spin for as long as a decode loop needs to come back, then sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <pthread.h>
#include <sched.h>
#include <system_error>
#include <thread>
#include <time.h>

namespace tw {

static inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin, and after a while yield, because another process may hold the core of a late thread.
static inline void wait_a_little(int spins) {
    if (spins < 4000) {
        pause_cpu();
    } else {
        sched_yield();
    }
}

// Shared by the threads of one step; lives on the stack of the caller.
struct Team {
    explicit Team(long prefetch_bytes) : prefetch_bytes(prefetch_bytes) {}
    const long prefetch_bytes;  // how far ahead of their use weights are requested
    alignas(64) std::atomic<uint32_t> arrived{0};
    alignas(64) std::atomic<uint32_t> epoch{0};
};

// What one thread knows about its team. The size is among it because only inside an OpenMP region is it known.
struct Worker {
    Team& team;
    int id;
    int members;

    int size() const { return members; }

    // Wait for the whole team.
    void barrier() const {
        if (members == 1) return;
        const uint32_t epoch = team.epoch.load(std::memory_order_relaxed);
        if (team.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(members)) {
            team.arrived.store(0, std::memory_order_relaxed);
            team.epoch.store(epoch + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; team.epoch.load(std::memory_order_acquire) == epoch; spins++) wait_a_little(spins);
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

using Job = void (*)(void* context, const Worker& worker);

// What a team needs of an OpenMP library, by address, so that nothing is built or linked for OpenMP (runtime/openmp.py
// fills it in). GOMP_parallel is what GCC makes of a parallel region; LLVM's and Intel's libraries have it too.
struct OpenMP {
    void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
    int (*thread_number)();                                                               // omp_get_thread_num
    int (*thread_count)();                                                                // omp_get_num_threads

    // Run job on `threads` of the threads that PyTorch's operations of this caller have, or fewer where the region is
    // smaller (a limit, a region around it). All of them enter, since libgomp ends those that a region leaves out and
    // the next operation would start them anew; the surplus returns at once.
    void run(int threads, long prefetch_bytes, Job job, void* context) const {
        struct Region {
            const OpenMP& openmp;
            int threads;
            Job job;
            void* context;
            Team team;
        } region{*this, threads, job, context, Team(prefetch_bytes)};
        const auto work = [](void* data) {
            Region& r = *static_cast<Region*>(data);
            const int id = r.openmp.thread_number(), members = std::min(r.threads, r.openmp.thread_count());
            if (id < members) r.job(r.context, Worker{r.team, id, members});
        };
        parallel(work, &region, 0, 0);
    }
};

// The library's own threads beside the caller's, one set for all libraries that one compiler made (GCC merges the pool's
// address when they are loaded). It starts them when it first runs.
class Pool {
  public:
    // Steps run one at a time, on whichever threads: a second caller waits for the first. Two teams on the same cores would
    // spin at their barriers for threads that the other keeps from running.
    std::mutex& one_step() { return one_step_; }

    // Run job on `threads` threads, this one among them, and wait for all. Where the system gives fewer threads, the team
    // is smaller.
    void run(int threads, long prefetch_bytes, Job job, void* context) {
        while (started_ < threads - 1 && start_one()) {
        }
        Team team(prefetch_bytes);
        job_ = job;
        context_ = context;
        members_ = std::min(threads, started_ + 1);
        team_ = &team;
        busy_.store(started_, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            round_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load(std::memory_order_acquire) > 0) wake_.notify_all();
        job(context, Worker{team, 0, members_});
        for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; spins++) wait_a_little(spins);
    }

    static Pool& instance() {
        static Pool* pool = fresh();
        return *pool;
    }

  private:
    static constexpr long SPIN_NANOSECONDS = 200000;

    // A pool is never destroyed: its threads may outlive static destructors. The child of a fork has none of its parent's
    // threads, and perhaps locks that nobody will release, so it begins anew in the same place.
    static Pool* fresh() {
        static Pool* pool = new Pool();
        pthread_atfork(nullptr, nullptr, [] { new (pool) Pool(); });
        return pool;
    }

    bool start_one() {
        const int id = started_ + 1;
        const uint32_t round = round_.load(std::memory_order_relaxed);
        try {
            std::thread([this, id, round] { serve(id, round); }).detach();
        } catch (const std::system_error&) {
            return false;
        }
        started_++;
        return true;
    }

    void serve(int id, uint32_t seen) {
        for (;;) {
            await(seen);
            seen = round_.load(std::memory_order_acquire);
            // Every thread reports, also one that is not on this team: the team is gone once all have.
            if (id < members_) job_(context_, Worker{*team_, id, members_});
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    void await(uint32_t seen) {
        const auto same = [&] { return round_.load(std::memory_order_acquire) == seen; };
        const long start = now();
        for (int spins = 0; same(); spins++) {
            pause_cpu();
            if (spins % 64 == 63 && now() - start > SPIN_NANOSECONDS) break;
        }
        if (!same()) return;
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1, std::memory_order_acq_rel);
        wake_.wait(lock, [&] { return !same(); });
        sleeping_.fetch_sub(1, std::memory_order_acq_rel);
    }

    static long now() {
        timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec * 1000000000L + t.tv_nsec;
    }

    std::mutex one_step_, sleep_;
    std::condition_variable wake_;
    int started_ = 0;
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    Job job_ = nullptr;
    int members_ = 0;
    void* context_ = nullptr;
    Team* team_ = nullptr;
};

// Run body(worker) on a team of `threads` threads, or fewer where the system gives no more: PyTorch's, or where openmp is
// null the library's own.
template <class Body>
static inline void run_team(const OpenMP* openmp, int threads, long prefetch_bytes, const Body& body) {
    if (threads == 1) {
        Team team(prefetch_bytes);
        body(Worker{team, 0, 1});
        return;
    }
    const Job job = [](void* context, const Worker& worker) { (*static_cast<const Body*>(context))(worker); };
    void* const context = const_cast<Body*>(&body);
    std::lock_guard<std::mutex> one_step(Pool::instance().one_step());
    if (openmp != nullptr) {
        openmp->run(threads, prefetch_bytes, job, context);
    } else {
        Pool::instance().run(threads, prefetch_bytes, job, context);
    }
}

}  // namespace tw
