// Room ias: budgets, success curves and allocations from quantiles of the success probability.
//
// A row holds M quantiles p of one question, clipped to [0, 1]. Success after N samples is S(N) = mean_m 1 - (1 - p_m)^N, and results
// are those of float64; T is float or double. Each function returns the first row that holds a NaN, and then what it wrote means
// nothing, or -1. The caller's floating-point state is left as it was: denormals are flushed inside the parallel regions only.
#pragma once
#include <cstdint>

namespace prmfast::ias {

constexpr double kTouch = 1e-12;   // S(N) >= C - kTouch counts as reached, so that the order of summation cannot decide
constexpr int kKeyShift = 12;      // gains are compared by their first 40 mantissa bits, for the same reason

template <class T>
struct Quantiles {
  const T* data;
  int64_t rows, columns, stride;   // stride between rows, in elements, >= 0; columns are contiguous
};

// C, one for all rows or one a row (stride in elements).
struct Targets {
  const double* data;
  int64_t stride;
  double wanted(int64_t row) const { return data[row * stride] - kTouch; }
};

// out[row]: smallest N in [1, n_max] with S(N) >= target, n_max if there is none.
template <class T>
int64_t budget(const Quantiles<T>& quantiles, const Targets& targets, int64_t n_max, int32_t* out, int threads);

// out[row * n_max + N - 1] = S(N).
template <class T>
int64_t curve(const Quantiles<T>& quantiles, int64_t n_max, T* out, int threads);

// out[row]: samples in [n_min, n_max] that sum to min(total, rows * n_max) and maximise sum_row S(N_row); ties to the lower row.
// Needs total >= rows * n_min.
template <class T>
int64_t allocate(const Quantiles<T>& quantiles, int64_t total, int64_t n_max, int64_t n_min, int32_t* out, int threads);

}  // namespace prmfast::ias
