// One team of threads per step: its threads run every kernel of the step, with a spinning barrier between them. Starting
// threads for each of the some 150 kernels of a step would cost more than the small kernels themselves.
//
// The threads are the library's own and persist. Between steps they spin for as long as a decode loop needs to come back,
// then sleep, so that they take no time from whoever computes next (PyTorch, say, whose threads spin as well).
#pragma once

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
    Team(int size, long prefetch_bytes) : size(size), prefetch_bytes(prefetch_bytes) {}
    const int size;
    const long prefetch_bytes;  // how far ahead of their use weights are requested
    alignas(64) std::atomic<uint32_t> arrived{0};
    alignas(64) std::atomic<uint32_t> epoch{0};
};

// What one thread knows about its team.
struct Worker {
    Team& team;
    int id;

    int size() const { return team.size; }

    // Wait for the whole team.
    void barrier() const {
        if (team.size == 1) return;
        const uint32_t epoch = team.epoch.load(std::memory_order_relaxed);
        if (team.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(team.size)) {
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

// The threads beside the caller's, one set for all libraries that one compiler made (GCC merges the pool's address when
// they are loaded). One step at a time: a second caller waits for the first.
class Pool {
  public:
    using Job = void (*)(void* context, const Worker& worker);

    // Run job on `threads` threads, this one among them, and wait for all. Where the system gives fewer threads, the team
    // is smaller.
    void run(int threads, long prefetch_bytes, Job job, void* context) {
        std::lock_guard<std::mutex> one_step(step_);
        while (started_ < threads - 1 && start_one()) {
        }
        Team team(started_ < threads - 1 ? started_ + 1 : threads, prefetch_bytes);
        job_ = job;
        context_ = context;
        team_ = &team;
        busy_.store(started_, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            round_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load(std::memory_order_acquire) > 0) wake_.notify_all();
        job(context, Worker{team, 0});
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
            if (id < team_->size) job_(context_, Worker{*team_, id});
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

    std::mutex step_, sleep_;
    std::condition_variable wake_;
    int started_ = 0;
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    Job job_ = nullptr;
    void* context_ = nullptr;
    Team* team_ = nullptr;
};

// Run body(worker) on a team of `threads` threads, or fewer where the system gives no more.
template <class Body>
static inline void run_team(int threads, long prefetch_bytes, const Body& body) {
    if (threads > 1) {
        const auto job = [](void* context, const Worker& worker) { (*static_cast<const Body*>(context))(worker); };
        Pool::instance().run(threads, prefetch_bytes, job, const_cast<Body*>(&body));
        return;
    }
    Team team(1, prefetch_bytes);
    body(Worker{team, 0});
}

}  // namespace tw
