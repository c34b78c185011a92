// How a kernel shares its work out: a few neighbouring tasks at a time to whoever is free, each task whole on
// one thread. What a task computes may depend on its number only, so the bits do not depend on the threads.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace peftkern::PEFTKERN_ISA {
namespace {

#if defined(_OPENMP)
inline int thread_index() { return omp_get_thread_num(); }
inline int team_size() { return omp_get_num_threads(); }
#else
inline int thread_index() { return 0; }
inline int team_size() { return 1; }
#endif

// The caller's rounding and flushing of subnormals (torch.set_flush_denormal) for as long as this lives:
// every thread has a mode of its own, and the workers' would make the bits depend on who ran a task.
class FloatMode {
 public:
#if defined(__SSE__)
  static uint32_t current() { return _mm_getcsr(); }
  explicit FloatMode(uint32_t mode) : before_(_mm_getcsr()) { _mm_setcsr(mode); }
  ~FloatMode() { _mm_setcsr(before_); }
#else
  static uint32_t current() { return 0; }
  explicit FloatMode(uint32_t) : before_(0) {}
#endif
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  uint32_t before_;
};

// body(thread, task) for every task < tasks; thread < threads names the scratch memory that is its own. One
// thread never enters the runtime: that alone takes longer than a 64 x 64 product.
template <class Body>
inline void parallel_tasks(int threads, int64_t tasks, const Body& body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(0, task);
    return;
  }
  const uint32_t mode = FloatMode::current();
  // Eighths of a thread's part: neighbours prefetch for each other, and a core that others use too holds
  // nobody up.
  [[maybe_unused]] const int64_t share = tasks < 8 * threads ? 1 : tasks / (8 * threads);
#pragma omp parallel num_threads(threads)
  {
    const FloatMode guard(mode);
    const int thread = thread_index();
#pragma omp for schedule(dynamic, share)
    for (int64_t task = 0; task < tasks; ++task) body(thread, task);
  }
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
