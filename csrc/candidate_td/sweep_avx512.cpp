// The sweep in AVX-512 intrinsics: VREDUCE and VSCALEF have no portable spelling, and bfloat16 needs them to keep up with memory.
#include "candidate_td/sweep_block.h"

#if PRMFAST_HAS_ISAS
#include <immintrin.h>

#include <cmath>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own headers: _mm512_undefined_ps() is meant so

namespace prmfast::candidate_td {
namespace {

constexpr double kLn2 = 0.693147180559945309417;

#define PRMFAST_AVX512_INLINE PRMFAST_AVX512 PRMFAST_INLINE

PRMFAST_AVX512_INLINE void load_block(const float* x, __m512* v) {
  for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_ps(x + i * kWide);
}
PRMFAST_AVX512_INLINE void load_block(const BFloat16* x, __m512* v) {
  for (int i = 0; i < 4; i += 2) {
    const __m512i pairs = _mm512_loadu_si512(x + i * kWide);
    v[i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    v[i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
}
PRMFAST_AVX512_INLINE void load_block(const Float16* x, __m512* v) {
  for (int i = 0; i < 4; ++i) v[i] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i * kWide)));
}

PRMFAST_AVX512_INLINE void horner(const __m512* r, float coefficient, __m512* p) {
  for (int i = 0; i < 4; ++i) p[i] = _mm512_fmadd_ps(p[i], r[i], _mm512_set1_ps(coefficient));
}

// sum += 2^y: a polynomial in y - floor y on [0, 1], 8e-8 relative, times 2^floor(y), 0 far below. Four instructions fewer than
// exp2_term. Step by step over four vectors: a chain of 42 cycles per vector fills the scheduler before the next one starts.
PRMFAST_AVX512_INLINE void add_exp2(const __m512* y, __m512* sum) {
  __m512 r[4], p[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm512_reduce_ps(y[i], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  for (int i = 0; i < 4; ++i) p[i] = _mm512_set1_ps(1.8671453e-3f);
  horner(r, 9.01699346e-3f, p);
  horner(r, 5.57999462e-2f, p);
  horner(r, 2.40164354e-1f, p);
  horner(r, 6.93151295e-1f, p);
  horner(r, 1.0f, p);
  for (int i = 0; i < 4; ++i) sum[i] = _mm512_add_ps(sum[i], _mm512_scalef_ps(p[i], y[i]));
}

// kFused: the exponent is one fma, x * scale - offset.
template <bool kFused, class S>
PRMFAST_AVX512_INLINE void sweep_block(const S* x, __m512 scale, __m512 offset, __m512* sum, __m512* top) {
  __m512 v[4], y[4];
  load_block(x, v);
  for (int i = 0; i < 4; ++i) top[i] = _mm512_max_ps(v[i], top[i]);  // the second operand where the first is NaN
  for (int i = 0; i < 4; ++i)
    y[i] = kFused ? _mm512_fmsub_ps(v[i], scale, offset) : _mm512_mul_ps(_mm512_sub_ps(v[i], offset), scale);
  add_exp2(y, sum);
}

template <bool kFused, class S>
PRMFAST_AVX512_INLINE Sweep<float> sweep_wide(const S* x, int64_t n, float scale, float offset) {
  __m512 sum[4], top[4];
  for (int i = 0; i < 4; ++i) {
    sum[i] = _mm512_setzero_ps();
    top[i] = _mm512_set1_ps(-kInfinity);
  }
  const __m512 wide_scale = _mm512_set1_ps(scale), wide_offset = _mm512_set1_ps(offset);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    prefetch_block(x + i);
    sweep_block<kFused>(x + i, wide_scale, wide_offset, sum, top);
  }
  if (i < n) sweep_block<kFused>(Padded<S>(x + i, n - i).values, wide_scale, wide_offset, sum, top);
  const __m512 total = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
  const __m512 most = _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
  return {_mm512_reduce_add_ps(total), _mm512_reduce_max_ps(most)};
}

// x * scale - offset equals (x - reference) * scale up to the rounding of offset, which is known and multiplied away.
template <class S>
PRMFAST_AVX512_INLINE Sweep<float> sweep_best(const S* x, int64_t n, float scale, float reference) {
  const float offset = reference * scale;
  if (!(std::fabs(offset) <= 1024.0f)) return sweep_wide<false>(x, n, scale, reference);
  Sweep<float> found = sweep_wide<true>(x, n, scale, offset);
  found.sum *= 1 + kLn2 * (offset - static_cast<double>(reference) * scale);
  return found;
}

template <class S>
PRMFAST_AVX512_INLINE int64_t reach_best(const S* x, int64_t n, float threshold, int32_t* out) {
  const __m512 wide = _mm512_set1_ps(threshold);
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = std::min(n, i + kBlock);
    if (end == i + kBlock) {
      __m512 v[4];
      load_block(x + i, v);
      unsigned any = 0;
      for (int k = 0; k < 4; ++k) any |= _mm512_cmp_ps_mask(v[k], wide, _CMP_GE_OQ);
      if (any == 0) continue;
    }
    found = reach_each(x, i, end, threshold, found, out);
  }
  return found;
}

}  // namespace

bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}

PRMFAST_AVX512 Sweep<float> sweep_avx512(const float* x, int64_t n, float scale, float reference) {
  return sweep_best(x, n, scale, reference);
}
PRMFAST_AVX512 Sweep<float> sweep_avx512(const BFloat16* x, int64_t n, float scale, float reference) {
  return sweep_best(x, n, scale, reference);
}
PRMFAST_AVX512 Sweep<float> sweep_avx512(const Float16* x, int64_t n, float scale, float reference) {
  return sweep_best(x, n, scale, reference);
}

PRMFAST_AVX512 int64_t reach_avx512(const float* x, int64_t n, float threshold, int32_t* out) {
  return reach_best(x, n, threshold, out);
}
PRMFAST_AVX512 int64_t reach_avx512(const BFloat16* x, int64_t n, float threshold, int32_t* out) {
  return reach_best(x, n, threshold, out);
}
PRMFAST_AVX512 int64_t reach_avx512(const Float16* x, int64_t n, float threshold, int32_t* out) {
  return reach_best(x, n, threshold, out);
}

}  // namespace prmfast::candidate_td
#endif
