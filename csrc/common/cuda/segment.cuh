// Rows of logits in segments of 2048 from the row's first one, wherever the row lies; a warp takes a segment into registers.
//
// Which lane adds which logits is the same in every kernel, for every alignment and every number of rows: what comes out of a
// segment, and the merge of a row's segments in their order, has the same bits everywhere. Products that an add could swallow
// into an fma are spelt as intrinsics for that reason.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>

#include "common/cuda/math.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/warp.cuh"

namespace prmfast::cuda {

constexpr int kSegment = 2048;         // logits, as the chunks of the CPU backend
constexpr int kEach = kSegment / 32;   // of a lane
constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.693147180559945309417;

__host__ __device__ inline int64_t segments_of(int64_t columns) { return (columns + kSegment - 1) / kSegment; }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half* out) { *out = __float2half_rn(x); }

// Bits of one or two elements in a 32-bit word.
template <class S>
struct Word;

template <>
struct Word<float> {
  static constexpr uint32_t kNothing = 0xff800000u;  // -inf
  __device__ static float get(uint32_t word, int) { return __uint_as_float(word); }
  __device__ static uint32_t make(const float* x) { return __float_as_uint(x[0]); }
};

template <>
struct Word<__nv_bfloat16> {
  static constexpr uint32_t kNothing = 0xff80u;
  __device__ static float get(uint32_t word, int upper) { return __uint_as_float(upper ? word & 0xffff0000u : word << 16); }
  __device__ static uint32_t make(const float* x) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x[0], x[1]);
    return static_cast<uint32_t>(__bfloat16_as_ushort(both.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(both.y)) << 16;
  }
};

template <>
struct Word<__half> {
  static constexpr uint32_t kNothing = 0xfc00u;
  __device__ static float get(uint32_t word, int upper) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(upper ? word >> 16 : word & 0xffffu)));
  }
  __device__ static uint32_t make(const float* x) {
    const __half2 both = __floats2half2_rn(x[0], x[1]);
    return static_cast<uint32_t>(__half_as_ushort(both.x)) | static_cast<uint32_t>(__half_as_ushort(both.y)) << 16;
  }
};

template <class S>
__device__ bool aligned16(const S* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// A lane's share of a segment, or of an aligned part of one: vectors of 16 bytes, vector k of a lane being number 32 k + lane.
template <class S, int logits = kSegment>
struct Segment {
  static constexpr int kElements = logits / 32, kPerWord = 4 / sizeof(S), kPerVector = 16 / sizeof(S);
  static constexpr int kVectors = kElements / kPerVector, kBytes = logits * sizeof(S);
  uint32_t words[4 * kVectors];

  // Where a lane's element j = kPerVector k + i stands in the segment, and the other way round.
  __device__ static int offset(int k, int lane) { return (32 * k + lane) * kPerVector; }
  __device__ static int lane_of(int offset) { return offset / kPerVector % 32; }
  __device__ static int element_of(int offset) { return offset / kPerVector / 32 * kPerVector + offset % kPerVector; }

  __device__ float value(int j) const { return Word<S>::get(words[j / kPerWord], j % kPerWord); }

  __device__ void set(int k, uint4 v) {
    words[4 * k] = v.x;
    words[4 * k + 1] = v.y;
    words[4 * k + 2] = v.z;
    words[4 * k + 3] = v.w;
  }
  __device__ uint4 vector(int k) const { return make_uint4(words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3]); }

  // The `left` logits at p; what lies behind them reads as -inf. kept: they are read again soon.
  template <bool kept>
  __device__ void load(const S* p, int64_t left) {
    const bool aligned = aligned16(p);
    const int lane = lane_id();
    if (aligned && left >= logits) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) set(k, fetch<kept>(reinterpret_cast<const uint4*>(p) + 32 * k + lane));
      return;
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int at = offset(k, lane);
      if (aligned && at + kPerVector <= left) {
        set(k, fetch<kept>(reinterpret_cast<const uint4*>(p + at)));
        continue;
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < kPerWord; ++i) {
          const int column = at + w * kPerWord + i;
          word |= (column < left ? bits(fetch<kept>(p + column)) : Word<S>::kNothing) << (16 * i);
        }
        words[4 * k + w] = word;
      }
    }
  }

  // Only what belongs to the row is written.
  __device__ void store(S* p, int64_t left) const {
    const bool aligned = aligned16(p);
    const int lane = lane_id();
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int at = offset(k, lane);
      if (aligned && at + kPerVector <= left) {
        store_once(reinterpret_cast<uint4*>(p + at), vector(k));
        continue;
      }
#pragma unroll
      for (int i = 0; i < kPerVector; ++i)
        if (at + i < left) store_element(p + at + i, words[4 * k + i / kPerWord] >> (16 * (i % kPerWord)));
    }
  }

  // A whole segment at an aligned address, without registers; the lane that copied a vector is the one that takes it.
  __device__ static void copy_async(S* shared, const S* p) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) copy_async_16(shared + offset(k, lane_id()), p + offset(k, lane_id()));
    copy_async_commit();
  }
  __device__ void load_shared(const S* shared) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) set(k, *reinterpret_cast<const uint4*>(shared + offset(k, lane_id())));
  }
  __device__ void store_shared(S* shared) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) *reinterpret_cast<uint4*>(shared + offset(k, lane_id())) = vector(k);
  }

  // Elements of the lane whose bit is set become -inf.
  __device__ void exclude(uint64_t elements) {
    if (elements == 0) return;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      if ((elements >> j & 1) == 0) continue;
      const int shift = j % kPerWord * 16;
      const uint32_t own = kPerWord == 1 ? 0xffffffffu : 0xffffu << shift;
      words[j / kPerWord] = (words[j / kPerWord] & ~own) | Word<S>::kNothing << shift;
    }
  }

  __device__ void zero() {
#pragma unroll
    for (int w = 0; w < 4 * kVectors; ++w) words[w] = 0;
  }

  // Every x becomes factor 2^((x - reference) scale), rounded to the storage type.
  __device__ void become_slopes(float scale, float reference, float factor) {
#pragma unroll
    for (int w = 0; w < 4 * kVectors; ++w) {
      float y[kPerWord];
#pragma unroll
      for (int i = 0; i < kPerWord; ++i)
        y[i] = factor * exp2_approx((Word<S>::get(words[w], i) - reference) * scale);
      words[w] = Word<S>::make(y);
    }
  }

 private:
  template <bool kept, class V>
  __device__ static V fetch(const V* p) {
    if constexpr (kept)
      return load_kept(p);
    else
      return load_once(p);
  }
  __device__ static uint32_t bits(float x) { return __float_as_uint(x); }
  __device__ static uint32_t bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
  __device__ static uint32_t bits(__half x) { return __half_as_ushort(x); }
  __device__ static void store_element(float* p, uint32_t element) { store_once(p, __uint_as_float(element)); }
  __device__ static void store_element(__nv_bfloat16* p, uint32_t element) {
    store_once(p, __ushort_as_bfloat16(static_cast<unsigned short>(element)));
  }
  __device__ static void store_element(__half* p, uint32_t element) {
    store_once(p, __ushort_as_half(static_cast<unsigned short>(element)));
  }
};

// The largest logit of a segment, -FLT_MAX if none is above -inf, and the sum of 2^((x - top) scale): 0 if none is, NaN if one is
// NaN or +inf.
struct State {
  float top, sum;
};

template <class S>
__device__ State state_of(const Segment<S>& x, float scale) {
  float top = -FLT_MAX;
#pragma unroll
  for (int j = 0; j < kEach; ++j) top = fmaxf(top, x.value(j));
  top = warp_max(top);
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kEach; j += 8) {  // in eights, so that a lane's sum takes 8 steps and not 64
    float part = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) part += exp2_approx((x.value(j + i) - top) * scale);
    sum += part;
  }
  return {top, warp_sum(sum)};
}

// sum over the row of 2^((x - top) scale), in float64 relative to its largest logit.
struct RowSum {
  float top;
  double sum;

  __device__ bool valid() const { return sum > 0 && top <= FLT_MAX; }
  __device__ double log2_p(float x, double scale, double log2_sum) const {
    return __dadd_rn(__dmul_rn(static_cast<double>(x) - static_cast<double>(top), scale), -log2_sum);
  }
};

// By a whole warp; state(s) is that of segment s.
template <class Get>
__device__ RowSum merge(int64_t segments, double scale, const Get& state) {
  float top = -FLT_MAX;
  for (int64_t s = lane_id(); s < segments; s += 32) top = fmaxf(top, state(s).top);
  top = warp_max(top);
  double sum = 0;
  for (int64_t s = lane_id(); s < segments; s += 32) {
    const State one = state(s);
    const double factor = exp2((static_cast<double>(one.top) - static_cast<double>(top)) * scale);
    sum = __fma_rn(static_cast<double>(one.sum), factor, sum);
  }
  return {top, warp_sum(sum)};
}

}  // namespace prmfast::cuda
