#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>

namespace flashlm {
namespace {

using Run = void (*)(const void*, std::size_t);
// Before sleeping: waking a thread costs more than what Python does between two kernels (docs/experiments.md).
constexpr std::chrono::microseconds SPIN{500};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Lets a wait spin for a while before it sleeps.
class Patience {
public:
    // Pauses, and returns true, until the time is up.
    bool wait() {
        if (++num_pauses_ % PAUSES_PER_LOOK == 0 && std::chrono::steady_clock::now() > ends_) return false;
        pause();
        return true;
    }

private:
    static constexpr int PAUSES_PER_LOOK = 32;
    int num_pauses_ = 0;
    std::chrono::steady_clock::time_point ends_ = std::chrono::steady_clock::now() + SPIN;
};

std::size_t available_cores() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return static_cast<std::size_t>(CPU_COUNT(&set));
    const unsigned cores = std::thread::hardware_concurrency();
    return cores ? cores : 1;
}

class Pool {
public:
    static std::shared_ptr<Pool> start(std::size_t num_threads) {
        auto pool = std::make_shared<Pool>();
        sigset_t all, before;  // signals belong to the interpreter's threads
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (std::size_t i = 1; i < num_threads; ++i) std::thread([pool] { pool->work(); }).detach();
        } catch (const std::system_error&) {
            // No more threads to be had: the caller does what the missing ones would have done.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return pool;
    }

    void stop() {
        stopped_.store(true);
        epoch_.fetch_add(1);
        epoch_.notify_all();
    }

    // One caller at a time.
    void run_job(std::uint32_t num_tasks, Run run, const void* context) {
        const std::uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
        run_.store(run, std::memory_order_release);
        context_.store(context, std::memory_order_release);
        num_pending_.store(num_tasks, std::memory_order_relaxed);
        ticket_.store(std::uint64_t{epoch} << 32 | num_tasks, std::memory_order_release);
        epoch_.store(epoch);
        epoch_.notify_all();
        take_tasks(epoch);
        for (Patience patience;;) {
            const std::uint32_t pending = num_pending_.load(std::memory_order_acquire);
            if (pending == 0) return;
            if (!patience.wait()) num_pending_.wait(pending, std::memory_order_acquire);
        }
    }

private:
    // Takes tasks of the job `epoch` until none is left. The ticket holds (epoch, tasks left): while any is left the job
    // is not over and its fields stand, so a worker that read the fields of another job fails to swap the ticket.
    void take_tasks(std::uint32_t epoch) {
        std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (ticket >> 32 == epoch && static_cast<std::uint32_t>(ticket) != 0) {
            const Run run = run_.load(std::memory_order_acquire);
            const void* context = context_.load(std::memory_order_acquire);
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
            run(context, static_cast<std::uint32_t>(ticket) - 1);
            if (num_pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) num_pending_.notify_one();
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void work() {
        std::uint32_t seen = 0;
        while (!stopped_.load()) {
            std::uint32_t epoch = epoch_.load(std::memory_order_acquire);
            for (Patience patience; epoch == seen && patience.wait();) {
                epoch = epoch_.load(std::memory_order_acquire);
            }
            if (epoch == seen) {
                epoch_.wait(seen, std::memory_order_acquire);
                continue;
            }
            seen = epoch;
            take_tasks(epoch);
        }
    }

    alignas(64) std::atomic<std::uint64_t> ticket_{0};
    alignas(64) std::atomic<std::uint32_t> num_pending_{0};
    alignas(64) std::atomic<std::uint32_t> epoch_{0};
    std::atomic<Run> run_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<bool> stopped_{false};
};

struct State {
    std::mutex mutex;                    // held for the length of a job
    std::shared_ptr<Pool> pool;          // null until the first job
    std::atomic<std::size_t> num_threads{available_cores()};
};

// Never destroyed, so that nothing waits for it at exit. A forked child makes a new one: the threads are not in it.
State& state() {
    alignas(State) static unsigned char storage[sizeof(State)];
    static State* made = [] {
        pthread_atfork(nullptr, nullptr, [] {
            const std::size_t num_threads = reinterpret_cast<State*>(storage)->num_threads.load();
            (new (storage) State)->num_threads.store(num_threads);
        });
        return new (storage) State;
    }();
    return *made;
}

}  // namespace

std::size_t num_threads() { return state().num_threads.load(); }

void set_num_threads(std::size_t num_threads) {
    if (num_threads == 0) throw std::invalid_argument("num_threads must be at least 1, got 0");
    State& s = state();
    const std::lock_guard lock(s.mutex);
    if (num_threads == s.num_threads.load()) return;
    if (s.pool) s.pool->stop();
    s.pool.reset();
    s.num_threads.store(num_threads);
}

void parallel_for(std::size_t num_tasks, Run run, const void* context) {
    State& s = state();
    if (num_tasks > 1 && s.num_threads.load() > 1) {
        const std::unique_lock lock(s.mutex, std::try_to_lock);
        if (lock.owns_lock()) {
            if (!s.pool) s.pool = Pool::start(s.num_threads.load());
            return s.pool->run_job(static_cast<std::uint32_t>(num_tasks), run, context);
        }
    }
    for (std::size_t task = 0; task < num_tasks; ++task) run(context, task);
}

}  // namespace flashlm
