// Work in two phases on XLA's own threads.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

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
  struct State {
    Phase phases[2];
    const First* first;
    const Second* second;
    void run() {
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
  for (int64_t t = 0; t < helpers; ++t) pool.Schedule([state] { state->run(); });
  state->run();
}

}  // namespace rabit
