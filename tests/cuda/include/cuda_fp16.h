// Stands in for CUDA's header where kernels are emulated.
#pragma once
#include "cuda_runtime.h"

struct __half { unsigned short __x; };
struct alignas(4) __half2 { __half x, y; };

inline float __half2float(__half v) {
  const int exponent = v.__x >> 10 & 31, mantissa = v.__x & 1023;
  const float size = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return v.__x & 0x8000 ? -size : size;
}
inline __half __float2half_rn(float v) {
  if (v != v) return {0x7fff};
  const unsigned sign = __float_as_uint(v) >> 16 & 0x8000u;
  const float size = std::fabs(v);
  unsigned bits = 0x7c00;
  if (size < 0x1p-14f) {
    bits = static_cast<unsigned>(std::nearbyint(size * 0x1p24f));
  } else if (size < 65520.0f) {
    int exponent;
    const float mantissa = std::frexp(size, &exponent);
    bits = (static_cast<unsigned>(exponent + 14) << 10) + static_cast<unsigned>(std::nearbyint(mantissa * 2048.0f)) - 1024;
  }
  return {static_cast<unsigned short>(sign | bits)};
}
inline __half __float2half(float v) { return __float2half_rn(v); }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline unsigned short __half_as_ushort(__half v) { return v.__x; }
inline __half __ushort_as_half(unsigned short v) { return {v}; }
