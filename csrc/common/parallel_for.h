// Static row partition over OpenMP threads: the same rows go to the same thread at the same thread count.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace prmfast {

// Waking a second thread costs more than this much work saves.
constexpr int64_t kMinimumWorkPerThread = 200'000;  // floating-point operations, about 0.1 ms

inline int thread_count(int64_t rows, int64_t work_per_row, int wanted) {
  const int64_t by_work = std::max<int64_t>(1, rows * work_per_row / kMinimumWorkPerThread);
  return static_cast<int>(std::min<int64_t>({wanted, rows, by_work}));
}

// body(thread, first_row, end_row); the GIL must not be held by the caller.
template <class Body>
void parallel_rows(int64_t rows, int threads, const Body& body) {
  if (rows <= 0) return;
  if (threads <= 1) {
    body(0, int64_t{0}, rows);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
    body(static_cast<int>(id), rows * id / count, rows * (id + 1) / count);
  }
}

}  // namespace prmfast
