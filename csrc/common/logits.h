// Rows of logits as float32 lanes, sixteen at a time, from float32, bfloat16 or float16 storage; and the exponential of a softmax.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace prmfast {

constexpr int kWide = 16;
typedef float Wide __attribute__((vector_size(kWide * 4)));
typedef int32_t WideInt __attribute__((vector_size(kWide * 4)));
typedef uint32_t WideBits __attribute__((vector_size(kWide * 4)));
typedef uint16_t WideHalf __attribute__((vector_size(kWide * 2)));

// Storage only: arithmetic is float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// GCC 12 makes sixteen masked moves of a braced list of one variable, and one broadcast of this.
PRMFAST_INLINE Wide broadcast16(float x) { return WideInt{} == 0 ? x : 0.0f; }

template <class To, class From>
PRMFAST_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps every bit");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

PRMFAST_INLINE Wide widen(WideHalf bits, BFloat16) { return bit_cast<Wide>(__builtin_convertvector(bits, WideBits) << 16); }

// Exponent and mantissa moved into place and rescaled by 2^112, which also makes subnormal halves right; inf and NaN get the
// exponent of their own kind back.
PRMFAST_INLINE Wide widen(WideHalf bits, Float16) {
  const WideBits all = __builtin_convertvector(bits, WideBits), sign = (all & 0x8000u) << 16, rest = (all & 0x7fffu) << 13;
  const WideBits scaled = bit_cast<WideBits>(bit_cast<Wide>(rest) * broadcast16(0x1p112f));
  const WideBits special = rest | 0x7f800000u;
  return bit_cast<Wide>(sign | (rest >= 0x0f800000u ? special : scaled));
}

PRMFAST_INLINE Wide load16(const float* p) {
  Wide v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
PRMFAST_INLINE Wide load16(const S* p) {
  WideHalf bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen(bits, S{});
}

// n < 16 logits, `fill` behind them.
template <class S>
PRMFAST_INLINE Wide load16(const S* p, int64_t n, float fill) {
  S some[kWide] = {};
  std::memcpy(some, p, n * sizeof(S));
  Wide v = load16(some);
  for (int64_t i = n; i < kWide; ++i) v[i] = fill;
  return v;
}

template <class S>
PRMFAST_INLINE float load1(const S* p) {
  return load16(p, 1, 0.0f)[0];
}

PRMFAST_INLINE WideHalf narrow(Wide v, BFloat16) {  // to nearest, ties to even; NaN stays NaN
  const WideBits bits = bit_cast<WideBits>(v), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return __builtin_convertvector((v != v ? bits | 0x400000u : rounded) >> 16, WideHalf);
}

// To nearest, ties to even, subnormals included: adding 2^-14 * 2^(23 - 10) at the right exponent makes the adder round.
PRMFAST_INLINE WideHalf narrow(Wide v, Float16) {
  const WideBits bits = bit_cast<WideBits>(v), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  const WideBits normal = (rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13;  // exponent rebased by 112 << 23, mantissa rounded to 10 bits
  const Wide small = bit_cast<Wide>(rest) + broadcast16(0.5f);              // 0.5 = 2^-24 * 2^23: units of the smallest half
  const WideBits subnormal = bit_cast<WideBits>(small) - 0x3f000000u;
  const WideBits huge = rest > 0x7f800000u ? WideBits{} + 0x7e00u : WideBits{} + 0x7c00u;
  WideBits half = rest < 0x38800000u ? subnormal : normal;
  half = rest >= 0x477ff000u ? huge : half;
  return __builtin_convertvector(half | sign, WideHalf);
}

PRMFAST_INLINE void store16(float* p, Wide v) { std::memcpy(p, &v, sizeof v); }
template <class S>
PRMFAST_INLINE void store16(S* p, Wide v) {
  const WideHalf bits = narrow(v, S{});
  std::memcpy(p, &bits, sizeof bits);
}
template <class S>
PRMFAST_INLINE void store16(S* p, Wide v, int64_t n) {
  S some[kWide];
  store16(some, v);
  std::memcpy(p, some, n * sizeof(S));
}

// 2^x for x <= 0, 2e-7 relative; 0 below -126, so that -inf gives 0. Half a unit above 0 is harmless too.
PRMFAST_INLINE Wide exp2_nonpositive(Wide x) {
  const Wide magic = broadcast16(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Wide low = broadcast16(-126.0f);
  const WideInt vanishes = x < low;
  x = vanishes ? low : x;
  const Wide n = (x + magic) - magic, r = x - n;
  Wide y = broadcast16(1.5403530e-4f);
  y = y * r + 1.3333558e-3f;
  y = y * r + 9.6181291e-3f;
  y = y * r + 5.5504109e-2f;
  y = y * r + 2.4022651e-1f;
  y = y * r + 6.9314718e-1f;
  y = y * r + 1.0f;
  const WideInt scale = (__builtin_convertvector(n, WideInt) + 127) << 23;
  y = y * bit_cast<Wide>(scale);
  return vanishes ? Wide{} : y;
}

PRMFAST_INLINE float sum16(Wide v) {
  float total = 0;
  for (int i = 0; i < kWide; ++i) total += v[i];
  return total;
}

PRMFAST_INLINE float max16(Wide v) {
  float best = v[0];
  for (int i = 1; i < kWide; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

}  // namespace prmfast
