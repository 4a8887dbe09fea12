// A wave: W rows side by side, a lane each, as floats.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/lanes.h"

namespace prmfast::ias {

template <int W>
struct WaveOf {
  typedef float Float __attribute__((vector_size(W * 4)));
  typedef int32_t Int __attribute__((vector_size(W * 4)));
};
template <int W>
using Wave = typename WaveOf<W>::Float;

// Rows i, i + 4, ... side by side: four columns of each.
template <int W>
PRMFAST_INLINE Wave<W> four_columns(const float* p, int64_t stride) {
  Wave<4> a;
  std::memcpy(&a, p, sizeof a);
  if constexpr (W == 4) {
    return a;
  } else {
    Wave<4> b;
    std::memcpy(&b, p + 4 * stride, sizeof b);
    const Wave<8> ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (W == 8) {
      return ab;
    } else {
      Wave<4> c, d;
      std::memcpy(&c, p + 8 * stride, sizeof c);
      std::memcpy(&d, p + 12 * stride, sizeof d);
      const Wave<8> cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
      return __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
  }
}

// Per group of four lanes: the first two, or the last two, of a and b interleaved.
template <int W>
PRMFAST_INLINE Wave<W> interleave_low(Wave<W> a, Wave<W> b) {
  if constexpr (W == 4) return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  if constexpr (W == 8) return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
  if constexpr (W == 16) return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
template <int W>
PRMFAST_INLINE Wave<W> interleave_high(Wave<W> a, Wave<W> b) {
  if constexpr (W == 4) return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  if constexpr (W == 8) return __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  if constexpr (W == 16) return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
template <int W>
PRMFAST_INLINE Wave<W> pairs_low(Wave<W> a, Wave<W> b) {
  if constexpr (W == 4) return __builtin_shufflevector(a, b, 0, 1, 4, 5);
  if constexpr (W == 8) return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
  if constexpr (W == 16) return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}
template <int W>
PRMFAST_INLINE Wave<W> pairs_high(Wave<W> a, Wave<W> b) {
  if constexpr (W == 4) return __builtin_shufflevector(a, b, 2, 3, 6, 7);
  if constexpr (W == 8) return __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  if constexpr (W == 16) return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// In every group of four lanes: row i, column j to row j, column i.
template <int W>
PRMFAST_INLINE void transpose_fours(Wave<W>* v) {
  const Wave<W> ab = interleave_low<W>(v[0], v[1]), cd = interleave_low<W>(v[2], v[3]);
  const Wave<W> above = interleave_high<W>(v[0], v[1]), below = interleave_high<W>(v[2], v[3]);
  v[0] = pairs_low<W>(ab, cd);
  v[1] = pairs_high<W>(ab, cd);
  v[2] = pairs_low<W>(above, below);
  v[3] = pairs_high<W>(above, below);
}

// W rows x 4 columns into four columns of W rows.
template <int W>
PRMFAST_INLINE void transpose(const float* p, int64_t stride, Wave<W>* column) {
  for (int i = 0; i < 4; ++i) column[i] = four_columns<W>(p + i * stride, stride);
  transpose_fours<W>(column);
}

}  // namespace prmfast::ias
