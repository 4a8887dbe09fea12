// Blocks of a row: what the sweeps of all instruction sets share.
#pragma once
#include <algorithm>
#include <limits>

#include "common/simd.h"
#include "common/sweep.h"

namespace prmfast {

constexpr int64_t kBlock = 64;     // logits a step: four independent sums
constexpr int64_t kAhead = 4096;   // bytes; the hardware prefetcher stops at the page, and two streams halve its reach
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class S>
PRMFAST_INLINE void prefetch_block(const S* x) {
  const char* p = reinterpret_cast<const char*>(x) + kAhead;
  for (int64_t i = 0; i < kBlock * static_cast<int64_t>(sizeof(S)); i += 64) __builtin_prefetch(p + i);
}

// The last n < 64 logits with -inf behind them.
template <class S>
struct Padded {
  Padded(const S* x, int64_t n) {
    std::copy_n(x, n, values);
    std::fill(values + n, values + kBlock, negative_infinity(S{}));
  }
  S values[kBlock];
};

// Positions i .. end of the logits >= threshold behind the `found` ones in `out`; how many there are now.
template <class S>
PRMFAST_INLINE int64_t reach_each(const S* x, int64_t i, int64_t end, float threshold, int64_t found, int32_t* out) {
  for (; i < end; ++i)
    if (widen1(x + i) >= threshold) out[found++] = static_cast<int32_t>(i);
  return found;
}

#if PRMFAST_HAS_ISAS
template <class S>
PRMFAST_AVX512 Sweep<float> sweep_avx512(const S* x, int64_t n, float scale, float reference);
template <class S>
PRMFAST_AVX512 int64_t reach_avx512(const S* x, int64_t n, float threshold, int32_t* out);
template <class S>
PRMFAST_AVX512 void slopes_avx512(const S* x, int64_t n, float scale, float reference, double factor, S* out);
#endif

}  // namespace prmfast
