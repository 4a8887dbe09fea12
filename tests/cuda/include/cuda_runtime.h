// Stands in for CUDA's header where kernels are emulated: the part of it that csrc uses.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulate.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define __restrict__ __restrict
// There is no __shared__: shared memory comes from launch.cuh's shared_memory(), which is poisoned and guarded.

using cudaStream_t = struct CUstream_st*;
using std::isfinite;
using std::isinf;
using std::isnan;

// --- vectors

struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// --- barriers, warps

#define __syncthreads() static_cast<void>(emulate::block_barrier(false, __LINE__))
#define __syncthreads_count(vote) emulate::block_barrier((vote) != 0, __LINE__)
#define __syncthreads_or(vote) static_cast<int>(emulate::block_barrier((vote) != 0, __LINE__) != 0)
#define __syncthreads_and(vote) static_cast<int>(emulate::block_barrier((vote) == 0, __LINE__) == 0)

namespace emulate {

enum class Shuffle { from, up, down, exclusive };

template <class T>
struct Shuffled {
  T value;
  int argument, width;
};

template <class T, Shuffle kind>
void shuffle_all(const void* const* in, void* const* out, uint32_t mask) {
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const auto& own = *static_cast<const Shuffled<T>*>(in[i]);
    const int first = i / own.width * own.width, end = first + own.width;
    int source = kind == Shuffle::from   ? first + (own.argument & (own.width - 1))
                 : kind == Shuffle::up   ? i - own.argument
                 : kind == Shuffle::down ? i + own.argument
                                         : i ^ own.argument;
    if (source < first || source >= end) source = i;
    if ((mask >> source & 1) == 0) fail("a shuffle reads lane " + std::to_string(source) + ", which the mask leaves out");
    *static_cast<T*>(out[i]) = static_cast<const Shuffled<T>*>(in[source])->value;
  }
}

template <Shuffle kind, class T>
T shuffle(uint32_t mask, T value, int argument, int width) {
  const Shuffled<T> in{value, argument, width};
  T out{};
  warp_operation(mask, &in, &out, shuffle_all<T, kind>, "a shuffle");
  return out;
}

inline void ballot_all(const void* const* in, void* const* out, uint32_t mask) {
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) votes |= static_cast<uint32_t>(*static_cast<const bool*>(in[i])) << i;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) *static_cast<uint32_t*>(out[i]) = votes;
}

inline void nothing(const void* const*, void* const*, uint32_t) {}

}  // namespace emulate

template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32) { return emulate::shuffle<emulate::Shuffle::from>(mask, v, lane, width); }
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) { return emulate::shuffle<emulate::Shuffle::up>(mask, v, static_cast<int>(by), width); }
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) { return emulate::shuffle<emulate::Shuffle::down>(mask, v, static_cast<int>(by), width); }
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32) { return emulate::shuffle<emulate::Shuffle::exclusive>(mask, v, by, width); }
inline unsigned __ballot_sync(unsigned mask, int vote) {
  const bool in = vote != 0;
  uint32_t out = 0;
  emulate::warp_operation(mask, &in, &out, emulate::ballot_all, "__ballot_sync");
  return out;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulate::warp_operation(mask, nullptr, nullptr, emulate::nothing, "__syncwarp"); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __trap() { emulate::fail("__trap"); }

// --- atomics: one OS thread runs all of them

template <class T, class V>
T atomicAdd(T* p, V v) { const T old = *p; *p = old + static_cast<T>(v); return old; }
template <class T, class V>
T atomicMax(T* p, V v) { const T old = *p; *p = std::max(old, static_cast<T>(v)); return old; }
template <class T, class V>
T atomicMin(T* p, V v) { const T old = *p; *p = std::min(old, static_cast<T>(v)); return old; }
template <class T, class V>
T atomicOr(T* p, V v) { const T old = *p; *p = old | static_cast<T>(v); return old; }
template <class T, class V>
T atomicExch(T* p, V v) { const T old = *p; *p = static_cast<T>(v); return old; }
template <class T, class C, class V>
T atomicCAS(T* p, C compare, V v) { const T old = *p; if (old == static_cast<T>(compare)) *p = static_cast<T>(v); return old; }

// --- bits and numbers

template <class To, class From>
To emulated_bits(From from) { To to; static_assert(sizeof to == sizeof from); std::memcpy(&to, &from, sizeof to); return to; }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __double2float_rd(double x) {
  const auto nearest = static_cast<float>(x);
  return nearest > x ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }
inline unsigned min(unsigned a, unsigned b) { return std::min(a, b); }
inline unsigned max(unsigned a, unsigned b) { return std::max(a, b); }
inline long long min(long long a, long long b) { return std::min(a, b); }
inline long long max(long long a, long long b) { return std::max(a, b); }
inline long min(long a, long b) { return std::min(a, b); }
inline long max(long a, long b) { return std::max(a, b); }
template <class T>
T __ldg(const T* p) { return *p; }
