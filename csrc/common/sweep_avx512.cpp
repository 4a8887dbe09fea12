// The sweep in AVX-512 intrinsics: VREDUCE and VSCALEF have no portable spelling, and bfloat16 needs them to keep up with memory.
#include "common/sweep_block.h"

#if PRMFAST_HAS_ISAS
#include <immintrin.h>

#include <cmath>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own headers: _mm512_undefined_ps() is meant so

namespace prmfast {
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

PRMFAST_AVX512_INLINE void store_block(float* out, const __m512* v) {
  for (int i = 0; i < 4; ++i) _mm512_storeu_ps(out + i * kWide, v[i]);
}
// Cuts the lower half off: kHalfStep has made a rounding of it.
PRMFAST_AVX512_INLINE void store_block(BFloat16* out, const __m512* v) {
  for (int i = 0; i < 4; i += 2) {
    const __m512i even = _mm512_srli_epi32(_mm512_castps_si512(v[i]), 16), odd = _mm512_castps_si512(v[i + 1]);
    constexpr int kOddWhereMasked = 0xe4;
    const __m512i pairs = _mm512_ternarylogic_epi32(odd, even, _mm512_set1_epi32(static_cast<int>(0xffff0000u)), kOddWhereMasked);
    _mm512_storeu_si512(out + i * kWide, pairs);
  }
}
PRMFAST_AVX512_INLINE void store_block(Float16* out, const __m512* v) {
  for (int i = 0; i < 4; ++i)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * kWide), _mm512_cvtps_ph(v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Minimax polynomials of 2^f on [0, 1], highest power first.
constexpr float kFull[] = {1.8671453e-3f, 9.01699346e-3f, 5.57999462e-2f, 2.40164354e-1f, 6.93151295e-1f, 1.0f};  // 8e-8
constexpr float kShort[] = {1.353417e-2f, 5.201146e-2f, 2.4144276e-1f, 6.9300383e-1f, 1.00000259f};               // 3e-6
template <class S>
constexpr auto& kRounded = kShort;
template <>
constexpr auto& kRounded<float> = kFull;

template <int terms>
struct Coefficients {
  __m512 c[terms];
};

// v = 2^y: a polynomial in y - floor y times 2^floor(y), 0 far below. Four instructions fewer than exp2_term. Step by step over four
// vectors: a chain of 42 cycles per vector fills the scheduler before the next one starts.
template <int terms>
PRMFAST_AVX512_INLINE void exp2_block(const Coefficients<terms>& polynomial, const __m512* y, __m512* v) {
  __m512 r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm512_reduce_ps(y[i], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  for (int i = 0; i < 4; ++i) v[i] = polynomial.c[0];
  for (int k = 1; k < terms; ++k)
    for (int i = 0; i < 4; ++i) v[i] = _mm512_fmadd_ps(v[i], r[i], polynomial.c[k]);
  for (int i = 0; i < 4; ++i) v[i] = _mm512_scalef_ps(v[i], y[i]);
}

// The exponent of a logit: (x - shift) * scale - offset. Near 0 there is no shift and the fma alone keeps every digit.
struct Exponent {
  __m512 scale, shift, offset;
};
struct Split {
  bool fused;
  float shift, offset;
  double residue;  // what the exponents are too small by
};
// For exponents (x - reference) * scale + raised.
inline Split split(float scale, float reference, double raised) {
  const double exact = static_cast<double>(reference) * scale - raised;
  const bool fused = std::fabs(exact) <= 1024;
  const auto offset = static_cast<float>(fused ? exact : -raised);
  return {fused, fused ? 0.0f : reference, offset, fused ? offset - exact : std::isfinite(raised) ? offset + raised : 0};
}

template <bool kFused>
PRMFAST_AVX512_INLINE void exponents(const Exponent& e, const __m512* v, __m512* y) {
  for (int i = 0; i < 4; ++i) y[i] = _mm512_fmsub_ps(kFused ? v[i] : _mm512_sub_ps(v[i], e.shift), e.scale, e.offset);
}

template <bool kFused, class S>
PRMFAST_AVX512_INLINE void sweep_block(const S* x, const Exponent& e, const Coefficients<6>& polynomial, __m512* sum, __m512* top) {
  __m512 v[4], y[4];
  load_block(x, v);
  for (int i = 0; i < 4; ++i) top[i] = _mm512_max_ps(v[i], top[i]);  // the second operand where the first is NaN
  exponents<kFused>(e, v, y);
  exp2_block(polynomial, y, v);
  for (int i = 0; i < 4; ++i) sum[i] = _mm512_add_ps(sum[i], v[i]);
}

template <bool kFused, class S>
PRMFAST_AVX512_INLINE Sweep<float> sweep_wide(const S* x, int64_t n, const Exponent& e) {
  Coefficients<6> polynomial;
  for (int k = 0; k < 6; ++k) polynomial.c[k] = _mm512_set1_ps(kFull[k]);
  __m512 sum[4], top[4];
  for (int i = 0; i < 4; ++i) {
    sum[i] = _mm512_setzero_ps();
    top[i] = _mm512_set1_ps(-kInfinity);
  }
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    prefetch_block(x + i);
    sweep_block<kFused>(x + i, e, polynomial, sum, top);
  }
  if (i < n) sweep_block<kFused>(Padded<S>(x + i, n - i).values, e, polynomial, sum, top);
  const __m512 total = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
  const __m512 most = _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
  return {_mm512_reduce_add_ps(total), _mm512_reduce_max_ps(most)};
}

// factor is in the polynomial where the result is a float32, and in the exponent otherwise, so that a half of the last bfloat16 digit
// is the same part of every polynomial's value: added to its constant, it turns cutting off into rounding.
template <class S>
constexpr float kHalfStep = 0;
template <>
constexpr float kHalfStep<BFloat16> = 0x1p-8f;

template <bool kFused, class S, int terms>
PRMFAST_AVX512_INLINE void slopes_wide(const S* x, int64_t n, const Exponent& e, const Coefficients<terms>& polynomial, S* out) {
  __m512 v[4], y[4];
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    prefetch_block(x + i);
    prefetch_block(out + i);
    load_block(x + i, v);
    exponents<kFused>(e, v, y);
    exp2_block(polynomial, y, v);
    store_block(out + i, v);
  }
  if (i == n) return;
  Padded<S> last(x + i, n - i);
  load_block(last.values, v);
  exponents<kFused>(e, v, y);
  exp2_block(polynomial, y, v);
  store_block(last.values, v);
  std::copy_n(last.values, n - i, out + i);
}

template <class S, int terms>
PRMFAST_AVX512_INLINE void slopes_best(const S* x, int64_t n, float scale, float reference, double factor, const float (&coefficients)[terms],
                                       S* out) {
  const bool raise = sizeof(S) == 2;
  const Split parts = split(scale, reference, raise ? std::log2(std::fabs(factor)) : 0);
  const double sign = factor < 0 ? -1 : 1, rest = std::exp2(parts.residue) * (raise ? sign : factor);
  Coefficients<terms> polynomial;
  for (int k = 0; k < terms; ++k) polynomial.c[k] = _mm512_set1_ps(static_cast<float>(coefficients[k] * rest));
  polynomial.c[terms - 1] = _mm512_add_ps(polynomial.c[terms - 1], _mm512_set1_ps(static_cast<float>(sign * kHalfStep<S>)));
  const Exponent e{_mm512_set1_ps(scale), _mm512_set1_ps(parts.shift), _mm512_set1_ps(parts.offset)};
  if (parts.fused) slopes_wide<true>(x, n, e, polynomial, out);
  else slopes_wide<false>(x, n, e, polynomial, out);
}

}  // namespace

// The rounding of the offset is known and multiplied away.
template <class S>
PRMFAST_AVX512 Sweep<float> sweep_avx512(const S* x, int64_t n, float scale, float reference) {
  const Split parts = split(scale, reference, 0);
  const Exponent e{_mm512_set1_ps(scale), _mm512_set1_ps(parts.shift), _mm512_set1_ps(parts.offset)};
  Sweep<float> found = parts.fused ? sweep_wide<true>(x, n, e) : sweep_wide<false>(x, n, e);
  found.sum *= 1 + kLn2 * parts.residue;
  return found;
}

template <class S>
PRMFAST_AVX512 int64_t reach_avx512(const S* x, int64_t n, float threshold, int32_t* out) {
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

template <class S>
PRMFAST_AVX512 void slopes_avx512(const S* x, int64_t n, float scale, float reference, double factor, S* out) {
  slopes_best(x, n, scale, reference, factor, kRounded<S>, out);
}

#define PRMFAST_INSTANTIATE(S)                                           \
  template Sweep<float> sweep_avx512(const S*, int64_t, float, float);   \
  template int64_t reach_avx512(const S*, int64_t, float, int32_t*);     \
  template void slopes_avx512(const S*, int64_t, float, float, double, S*);
PRMFAST_INSTANTIATE(float)
PRMFAST_INSTANTIATE(BFloat16)
PRMFAST_INSTANTIATE(Float16)
#undef PRMFAST_INSTANTIATE

}  // namespace prmfast
#endif
