// A parallel loop on XLA's thread pool that may be called from one of the pool's own threads.
#ifndef JAX_BLOCKSPARSE_CPU_THREAD_POOL_H_
#define JAX_BLOCKSPARSE_CPU_THREAD_POOL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace jax_blocksparse {

// Calls body(i) for i in [0, items), each once, and returns when all have returned. The caller works too and waits only
// for items that a thread is already working on, never for a helper to start: so a pool without a free thread costs
// time but cannot lock up. `body` must not throw.
template <typename Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t items, const Body& body) {
  struct State {
    State(int64_t items, const Body& body) : items(items), body(body) {}

    void work() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
        body(i);
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == items) {
          std::lock_guard<std::mutex> lock(mutex);
          all_done.notify_one();
        }
      }
    }

    const int64_t items;
    const Body& body;  // dead once all items are done: a helper that starts later gets no item and does not touch it
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };

  const int64_t helpers = std::min(items, pool.num_threads()) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
  const auto state = std::make_shared<State>(items, body);
  for (int64_t h = 0; h < helpers; ++h) {
    pool.Schedule([state] { state->work(); });
  }
  state->work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done.load(std::memory_order_acquire) == items; });
}

}  // namespace jax_blocksparse

#endif  // JAX_BLOCKSPARSE_CPU_THREAD_POOL_H_
