#include "common/sweep_block.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace prmfast {
namespace {

// Sixty-four logits in any order that store_block undoes: a pair of bfloat16 is a shift and a mask away from being split.
PRMFAST_INLINE void load_block(const BFloat16* x, Wide* v) {
  for (int i = 0; i < 4; i += 2) {
    WideBits pairs;
    std::memcpy(&pairs, x + i * kWide, sizeof pairs);
    v[i] = bit_cast<Wide>(pairs << 16);
    v[i + 1] = bit_cast<Wide>(pairs & 0xffff0000u);
  }
}
template <class S>
PRMFAST_INLINE void load_block(const S* x, Wide* v) {
  for (int i = 0; i < 4; ++i) v[i] = load16(x + i * kWide);
}

PRMFAST_INLINE void store_block(BFloat16* out, const Wide* v) {
  for (int i = 0; i < 4; i += 2) {
    const WideBits even = bit_cast<WideBits>(v[i]) + 0x8000u, odd = bit_cast<WideBits>(v[i + 1]) + 0x8000u;
    const WideBits pairs = (even >> 16) | (odd & 0xffff0000u);
    std::memcpy(out + i * kWide, &pairs, sizeof pairs);
  }
}
template <class S>
PRMFAST_INLINE void store_block(S* out, const Wide* v) {
  for (int i = 0; i < 4; ++i) store16(out + i * kWide, v[i]);
}

// 2^r on [-1/2, 1/2], 9e-8 relative; 2^n by way of the low bits of a sum whose unit is 1. 0 from 2^-126.5 down. NaN stays NaN.
PRMFAST_INLINE Wide exp2_term(Wide y) {
  const Wide low = broadcast16(-127.0f), magic = broadcast16(12582912.0f + 127.0f);  // 1.5 * 2^23 + bias
  y = y < low ? low : y;
  const Wide t = y + magic, r = y - (t - magic);
  Wide p = broadcast16(1.32647203e-3f);
  p = p * r + 9.67151299e-3f;
  p = p * r + 5.55073395e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.0f;
  return p * bit_cast<Wide>(bit_cast<WideInt>(t) << 23);
}

struct Lanes {
  Wide sum[4], top[4];
};

// The reference comes off before the product: without fma a product far from 0 would round the digits away that count.
template <class S>
PRMFAST_INLINE void sweep_block(const S* x, Wide scale, Wide reference, Lanes* lanes) {
  Wide v[4];
  load_block(x, v);
  for (int i = 0; i < 4; ++i) {
    lanes->top[i] = v[i] > lanes->top[i] ? v[i] : lanes->top[i];
    lanes->sum[i] += exp2_term((v[i] - reference) * scale);
  }
}

template <class S>
PRMFAST_INLINE Sweep<float> sweep_any(const S* x, int64_t n, float scale, float reference) {
  Lanes lanes;
  for (int i = 0; i < 4; ++i) {
    lanes.sum[i] = Wide{};
    lanes.top[i] = broadcast16(-kInfinity);
  }
  const Wide wide_scale = broadcast16(scale), wide_reference = broadcast16(reference);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    prefetch_block(x + i);
    sweep_block(x + i, wide_scale, wide_reference, &lanes);
  }
  if (i < n) sweep_block(Padded<S>(x + i, n - i).values, wide_scale, wide_reference, &lanes);
  double sum = 0;
  float top = -kInfinity;
  for (int k = 0; k < 4; ++k) {
    sum += sum16(lanes.sum[k]);
    top = std::max(top, max16(lanes.top[k]));
  }
  return {sum, top};
}

template <class S>
PRMFAST_INLINE bool block_reaches(const S* x, Wide threshold) {
  Wide v[4];
  load_block(x, v);
  const WideInt hit = (v[0] >= threshold) | (v[1] >= threshold) | (v[2] >= threshold) | (v[3] >= threshold);
  int64_t words[kWide / 2], any = 0;
  std::memcpy(words, &hit, sizeof words);
  for (int64_t word : words) any |= word;
  return any != 0;
}

template <class S>
PRMFAST_INLINE int64_t reach_any(const S* x, int64_t n, float threshold, int32_t* out) {
  const Wide wide = broadcast16(threshold);
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = std::min(n, i + kBlock);
    if (end == i + kBlock && !block_reaches(x + i, wide)) continue;
    found = reach_each(x, i, end, threshold, found, out);
  }
  return found;
}

template <class S>
PRMFAST_INLINE void slopes_block(const S* x, Wide scale, Wide reference, Wide factor, S* out) {
  Wide v[4];
  load_block(x, v);
  for (int i = 0; i < 4; ++i) v[i] = exp2_term((v[i] - reference) * scale) * factor;
  store_block(out, v);
}

template <class S>
PRMFAST_INLINE void slopes_any(const S* x, int64_t n, float scale, float reference, float factor, S* out) {
  const Wide wide_scale = broadcast16(scale), wide_reference = broadcast16(reference), wide_factor = broadcast16(factor);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    prefetch_block(x + i);
    prefetch_block(out + i);
    slopes_block(x + i, wide_scale, wide_reference, wide_factor, out + i);
  }
  if (i == n) return;
  Padded<S> last(x + i, n - i);
  slopes_block(last.values, wide_scale, wide_reference, wide_factor, last.values);
  std::copy_n(last.values, n - i, out + i);
}

template <class S>
PRMFAST_AVX2 Sweep<float> sweep_avx2(const S* x, int64_t n, float scale, float reference) {
  return sweep_any(x, n, scale, reference);
}
template <class S>
Sweep<float> sweep_portable(const S* x, int64_t n, float scale, float reference) {
  return sweep_any(x, n, scale, reference);
}
template <class S>
PRMFAST_AVX2 int64_t reach_avx2(const S* x, int64_t n, float threshold, int32_t* out) {
  return reach_any(x, n, threshold, out);
}
template <class S>
int64_t reach_portable(const S* x, int64_t n, float threshold, int32_t* out) {
  return reach_any(x, n, threshold, out);
}
template <class S>
PRMFAST_AVX2 void slopes_avx2(const S* x, int64_t n, float scale, float reference, float factor, S* out) {
  slopes_any(x, n, scale, reference, factor, out);
}
template <class S>
void slopes_portable(const S* x, int64_t n, float scale, float reference, float factor, S* out) {
  slopes_any(x, n, scale, reference, factor, out);
}

}  // namespace

template <class S>
Sweep<float> sweep(const S* x, int64_t n, float scale, float reference) {
#if PRMFAST_HAS_ISAS
  if (chosen_isa() == Isa::kAvx512) return sweep_avx512(x, n, scale, reference);
#endif
  return chosen_isa() == Isa::kAvx2 ? sweep_avx2(x, n, scale, reference) : sweep_portable(x, n, scale, reference);
}

template <class S>
int64_t reach(const S* x, int64_t n, float threshold, int32_t* out) {
#if PRMFAST_HAS_ISAS
  if (chosen_isa() == Isa::kAvx512) return reach_avx512(x, n, threshold, out);
#endif
  return chosen_isa() == Isa::kAvx2 ? reach_avx2(x, n, threshold, out) : reach_portable(x, n, threshold, out);
}

template <class S>
void slopes(const S* x, int64_t n, float scale, float reference, double factor, S* out) {
#if PRMFAST_HAS_ISAS
  if (chosen_isa() == Isa::kAvx512) return slopes_avx512(x, n, scale, reference, factor, out);
#endif
  const auto single = static_cast<float>(factor);
  if (chosen_isa() == Isa::kAvx2) slopes_avx2(x, n, scale, reference, single, out);
  else slopes_portable(x, n, scale, reference, single, out);
}

Sweep<double> sweep(const double* x, int64_t n, double scale, double reference) {
  Sweep<double> found{0, -std::numeric_limits<double>::infinity()};
  for (int64_t i = 0; i < n; ++i) {
    found.sum += std::exp2((x[i] - reference) * scale);
    found.top = x[i] > found.top ? x[i] : found.top;
  }
  return found;
}

int64_t reach(const double* x, int64_t n, double threshold, int32_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i)
    if (x[i] >= threshold) out[found++] = static_cast<int32_t>(i);
  return found;
}

void slopes(const double* x, int64_t n, double scale, double reference, double factor, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::exp2((x[i] - reference) * scale) * factor;
}

#define PRMFAST_INSTANTIATE(S)                                        \
  template Sweep<float> sweep(const S*, int64_t, float, float);       \
  template int64_t reach(const S*, int64_t, float, int32_t*);         \
  template void slopes(const S*, int64_t, float, float, double, S*);
PRMFAST_INSTANTIATE(float)
PRMFAST_INSTANTIATE(BFloat16)
PRMFAST_INSTANTIATE(Float16)
#undef PRMFAST_INSTANTIATE

}  // namespace prmfast
