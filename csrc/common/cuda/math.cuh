// The special functions of the multi-function unit: one instruction each, within two units of the last float32 digit or so.
#pragma once
#include "common/cuda/launch.cuh"

namespace prmfast::cuda {

#ifdef PRMFAST_EMULATE

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }
inline float log2_approx(float x) { return std::log2(flushed(x)); }
inline float reciprocal_approx(float x) { return flushed(1 / flushed(x)); }

#else

// 2^x, 0 where that is subnormal; 2^-inf = 0, NaN stays.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

}  // namespace prmfast::cuda
