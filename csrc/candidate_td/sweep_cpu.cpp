#include "candidate_td/sweep_block.h"

#include <algorithm>
#include <cmath>
#include <limits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace prmfast::candidate_td {
namespace {

// Sixty-four logits in any order: sums and maxima do not mind, and a pair of bfloat16 is a float32 away from being split.
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

// 2^r on [-1/2, 1/2], 9e-8 relative; 2^n by way of the low bits of a sum whose unit is 1. Below 2^-126 counts as 2^-126: what
// it is added to is no smaller than 2^-5. NaN stays NaN.
PRMFAST_INLINE Wide exp2_term(Wide y) {
  const Wide low = broadcast16(-126.0f), magic = broadcast16(12582912.0f + 127.0f);  // 1.5 * 2^23 + bias
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

PRMFAST_MULTIVERSION Sweep<float> sweep_portable(const float* x, int64_t n, float scale, float reference) {
  return sweep_any(x, n, scale, reference);
}
PRMFAST_MULTIVERSION Sweep<float> sweep_portable(const BFloat16* x, int64_t n, float scale, float reference) {
  return sweep_any(x, n, scale, reference);
}
PRMFAST_MULTIVERSION Sweep<float> sweep_portable(const Float16* x, int64_t n, float scale, float reference) {
  return sweep_any(x, n, scale, reference);
}

template <class S>
Sweep<float> sweep_best(const S* x, int64_t n, float scale, float reference) {
#if PRMFAST_HAS_ISAS
  if (has_avx512()) return sweep_avx512(x, n, scale, reference);
#endif
  return sweep_portable(x, n, scale, reference);
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

PRMFAST_MULTIVERSION int64_t reach_portable(const float* x, int64_t n, float threshold, int32_t* out) {
  return reach_any(x, n, threshold, out);
}
PRMFAST_MULTIVERSION int64_t reach_portable(const BFloat16* x, int64_t n, float threshold, int32_t* out) {
  return reach_any(x, n, threshold, out);
}
PRMFAST_MULTIVERSION int64_t reach_portable(const Float16* x, int64_t n, float threshold, int32_t* out) {
  return reach_any(x, n, threshold, out);
}

template <class S>
int64_t reach_best(const S* x, int64_t n, float threshold, int32_t* out) {
#if PRMFAST_HAS_ISAS
  if (has_avx512()) return reach_avx512(x, n, threshold, out);
#endif
  return reach_portable(x, n, threshold, out);
}

template <class S>
PRMFAST_INLINE void stream16(S* out, Wide v) {
#if defined(__SSE2__)
  char bytes[kWide * sizeof(S)];
  store16(reinterpret_cast<S*>(bytes), v);
  for (size_t i = 0; i < sizeof bytes; i += 16) {
    __m128i part;
    std::memcpy(&part, bytes + i, sizeof part);
    _mm_stream_si128(reinterpret_cast<__m128i*>(reinterpret_cast<char*>(out) + i), part);
  }
#else
  store16(out, v);
#endif
}

// Element by element the same value wherever the row lies, so only speed depends on the alignment of `out`.
template <class S>
PRMFAST_INLINE void slopes_any(const S* x, int64_t n, float scale, float reference, float factor, S* out, bool stream) {
  const Wide wide_scale = broadcast16(scale), wide_reference = broadcast16(reference), wide_factor = broadcast16(factor);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(out) % 64;
  int64_t i = stream && misaligned != 0 ? std::min<int64_t>(n, (64 - misaligned) / sizeof(S)) : 0;
  for (int64_t k = 0; k < i; k += kWide) {
    const int64_t some = std::min<int64_t>(kWide, i - k);
    store16(out + k, exp2_term((load16(x + k, some, 0.0f) - wide_reference) * wide_scale) * wide_factor, some);
  }
  for (; i + kWide <= n; i += kWide) {
    __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kAhead);
    const Wide v = exp2_term((load16(x + i) - wide_reference) * wide_scale) * wide_factor;
    if (stream) stream16(out + i, v);
    else store16(out + i, v);
  }
  if (i < n) store16(out + i, exp2_term((load16(x + i, n - i, 0.0f) - wide_reference) * wide_scale) * wide_factor, n - i);
}

PRMFAST_MULTIVERSION void slopes_wide(const float* x, int64_t n, float scale, float reference, float factor, float* out, bool stream) {
  slopes_any(x, n, scale, reference, factor, out, stream);
}
PRMFAST_MULTIVERSION void slopes_wide(const BFloat16* x, int64_t n, float scale, float reference, float factor, BFloat16* out,
                                      bool stream) {
  slopes_any(x, n, scale, reference, factor, out, stream);
}
PRMFAST_MULTIVERSION void slopes_wide(const Float16* x, int64_t n, float scale, float reference, float factor, Float16* out,
                                      bool stream) {
  slopes_any(x, n, scale, reference, factor, out, stream);
}

}  // namespace

Sweep<float> sweep(const float* x, int64_t n, float scale, float reference) { return sweep_best(x, n, scale, reference); }
Sweep<float> sweep(const BFloat16* x, int64_t n, float scale, float reference) { return sweep_best(x, n, scale, reference); }
Sweep<float> sweep(const Float16* x, int64_t n, float scale, float reference) { return sweep_best(x, n, scale, reference); }

Sweep<double> sweep(const double* x, int64_t n, double scale, double reference) {
  Sweep<double> found{0, -std::numeric_limits<double>::infinity()};
  for (int64_t i = 0; i < n; ++i) {
    found.sum += std::exp2((x[i] - reference) * scale);
    found.top = x[i] > found.top ? x[i] : found.top;
  }
  return found;
}

int64_t reach(const float* x, int64_t n, float threshold, int32_t* out) { return reach_best(x, n, threshold, out); }
int64_t reach(const BFloat16* x, int64_t n, float threshold, int32_t* out) { return reach_best(x, n, threshold, out); }
int64_t reach(const Float16* x, int64_t n, float threshold, int32_t* out) { return reach_best(x, n, threshold, out); }

int64_t reach(const double* x, int64_t n, double threshold, int32_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i)
    if (x[i] >= threshold) out[found++] = static_cast<int32_t>(i);
  return found;
}

void slopes(const float* x, int64_t n, float scale, float reference, float factor, float* out, bool stream) {
  slopes_wide(x, n, scale, reference, factor, out, stream);
}
void slopes(const BFloat16* x, int64_t n, float scale, float reference, float factor, BFloat16* out, bool stream) {
  slopes_wide(x, n, scale, reference, factor, out, stream);
}
void slopes(const Float16* x, int64_t n, float scale, float reference, float factor, Float16* out, bool stream) {
  slopes_wide(x, n, scale, reference, factor, out, stream);
}
void slopes(const double* x, int64_t n, double scale, double reference, double factor, double* out, bool) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::exp2((x[i] - reference) * scale) * factor;
}

void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace prmfast::candidate_td
