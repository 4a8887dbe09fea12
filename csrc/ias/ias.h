// Room ias: budgets, success curves and allocations from quantiles of the success probability.
//
// A row holds M quantiles p of one question, clipped to [0, 1]; none is NaN (the caller checks). Success after N samples is
// S(N) = mean_m 1 - (1 - p_m)^N. Everything is computed in float64; T is float or double. The caller's floating-point state
// is left as it was: denormals are flushed inside the parallel regions only.
#pragma once
#include <cstdint>

namespace prmfast::ias {

constexpr double kTouch = 1e-12;   // S(N) >= C - kTouch counts as reached, so that the order of summation cannot decide
constexpr int kKeyShift = 12;      // gains are compared by their first 40 mantissa bits, for the same reason

template <class T>
struct Quantiles {
  const T* data;
  int64_t rows, columns, stride;   // stride between rows, in elements; columns are contiguous
};

// out[row]: smallest N in [1, n_max] with S(N) >= target[row * target_stride], n_max if there is none.
template <class T>
void budget(const Quantiles<T>& quantiles, const double* target, int64_t target_stride, int64_t n_max, int32_t* out, int threads);

// out[row * n_max + N - 1] = S(N).
template <class T>
void curve(const Quantiles<T>& quantiles, int64_t n_max, T* out, int threads);

// out[row]: samples in [n_min, n_max] that sum to min(total, rows * n_max) and maximise sum_row S(N_row); ties to the lower row.
// Needs total >= rows * n_min.
template <class T>
void allocate(const Quantiles<T>& quantiles, int64_t total, int64_t n_max, int64_t n_min, int32_t* out, int threads);

}  // namespace prmfast::ias
