// A test is a function that calls CHECK; a room's main runs its tests. Buffers are as long as what they hold, so that the address
// sanitizer sees the first element behind them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "common/simd.h"

namespace prmfast::test {

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (0)

// n elements of the heap and not one more.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t n, T value = T()) : size_(n), data_(new T[n]) {
    for (int64_t i = 0; i < n; ++i) data_[i] = value;
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

// rows x columns elements, `stride` apart; what a view of a larger tensor holds ends with the last row's last column.
inline int64_t extent(int64_t rows, int64_t columns, int64_t stride) { return rows == 0 ? 0 : (rows - 1) * stride + columns; }

class Random {
 public:
  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine_); }
  template <class T>
  Exact<T> fill(int64_t n, double low, double high) {
    Exact<T> values(n);
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<T>(uniform(low, high));
    return values;
  }

 private:
  std::mt19937 engine_{7};
};

// The tests of every variant that this CPU runs.
template <class Tests>
void each_isa(const Tests& tests) {
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512})
    if (isa <= best_isa()) {
      chosen_isa() = isa;
      tests();
    }
}

inline bool near(double a, double b, double tolerance) { return std::abs(a - b) <= tolerance * (1 + std::abs(b)); }

}  // namespace prmfast::test
