// What budget, curve and allocate share: rows as failure probabilities in float64 lanes.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/lanes.h"
#include "ias/ias.h"

namespace prmfast::ias {

using Lanes = prmfast::Lanes<double>;
constexpr int kLanes = kWidth<double>;

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// 1 - clip(p, 0, 1) in float64; NaN stays NaN, as both comparisons are false then.
template <class T>
PRMFAST_INLINE double failure(T p) {
  double q = 1 - static_cast<double>(p);
  q = 0 > q ? 0 : q;
  return 1 < q ? 1 : q;
}

template <class T>
PRMFAST_INLINE void failures_of(const T* p, int64_t n, double* q) {
  for (int64_t m = 0; m < n; ++m) q[m] = failure(p[m]);
}

// The callers keep zeros behind the row: they fail never and add nothing.
void failures(const float* p, int64_t n, double* q);
void failures(const double* p, int64_t n, double* q);

// Of failure probabilities: they are finite, so their sum is a number unless one of them is none.
inline bool has_nan(const double* q, int64_t n) {
  double total = 0;
  for (int64_t m = 0; m < n; ++m) total += q[m];
  return total != total;
}

// The first row in which any thread met a NaN.
class FirstNan {
 public:
  void found(int64_t row) {
    int64_t first = row_.load();
    while (row < first && !row_.compare_exchange_weak(first, row)) {
    }
  }
  int64_t row() const {
    const int64_t first = row_.load();
    return first == kNone ? -1 : first;
  }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> row_{kNone};
};

}  // namespace prmfast::ias
