// Work in two phases on XLA's own threads.

#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace rabit {

// Items that threads claim one by one.
struct Phase {
  std::atomic<int64_t> next{0}, done{0};
  int64_t count = 0;

  // Takes items until none is left, and returns when all are done.
  template <class F>
  void run(const F* body) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      (*body)(i);
      done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins)
      if (spins > 4096) std::this_thread::yield();
  }
};

// What a thread of the pool can join.
struct Work {
  virtual void run() = 0;
  virtual ~Work() = default;
};

// Threads of the pool that have done their part, and look out for the next product for a while: a
// decoding step has one every few dozen microseconds, and waking a thread that sleeps takes as long
// as a small product does.
class Lookout {
 public:
  static Lookout& shared() {
    static Lookout* const one = new Lookout;  // never destroyed: threads may look at any time
    return *one;
  }

  // Shows work to those who look; returns how many did.
  int64_t show(std::shared_ptr<Work> work) {
    const int64_t looking = looking_.load(std::memory_order_acquire);
    const std::lock_guard<std::mutex> lock(mutex_);
    work_ = std::move(work);
    shown_.fetch_add(1, std::memory_order_release);
    return looking;
  }

  // Runs `work`, then what is shown, until nothing was for `kLook`.
  void run(std::shared_ptr<Work> work) {
    for (uint64_t seen; work;) {
      seen = shown_.load(std::memory_order_acquire);
      work->run();
      work = next(seen);
    }
  }

 private:
  static constexpr std::chrono::microseconds kLook{100};

  std::shared_ptr<Work> next(uint64_t seen) {
    looking_.fetch_add(1, std::memory_order_release);
    std::shared_ptr<Work> found;
    const auto end = std::chrono::steady_clock::now() + kLook;
    while (std::chrono::steady_clock::now() < end) {
      if (shown_.load(std::memory_order_acquire) != seen) {
        const std::lock_guard<std::mutex> lock(mutex_);
        found = work_;
        break;
      }
      std::this_thread::yield();
    }
    looking_.fetch_sub(1, std::memory_order_release);
    return found;
  }

  std::mutex mutex_;
  std::shared_ptr<Work> work_;
  std::atomic<uint64_t> shown_{0};
  std::atomic<int64_t> looking_{0};
};

// first(i) for all i below n, then second(i) for all i below m, by this thread and any of the pool
// that come. A thread waits only for items that others have begun, never for tasks that are merely
// scheduled, so pools whose threads all wait here cannot lock up. A task that starts when nothing
// is left touches only `State`, which it holds a share of.
template <class First, class Second>
void in_two_phases(xla::ffi::ThreadPool& pool, int64_t threads, int64_t n, const First& first,
                   int64_t m, const Second& second) {
  const int64_t most = n < m ? m : n;
  if (threads < 2 || most < 2) {
    for (int64_t i = 0; i < n; ++i) first(i);
    for (int64_t i = 0; i < m; ++i) second(i);
    return;
  }
  struct State : Work {
    Phase phases[2];
    const First* first;
    const Second* second;
    void run() override {
      phases[0].run(first);
      phases[1].run(second);
    }
  };
  auto state = std::make_shared<State>();
  state->phases[0].count = n;
  state->phases[1].count = m;
  state->first = &first;
  state->second = &second;
  const int64_t helpers = (threads < most ? threads : most) - 1;
  for (int64_t t = Lookout::shared().show(state); t < helpers; ++t)
    pool.Schedule([state] { Lookout::shared().run(state); });
  state->run();
}

}  // namespace rabit
