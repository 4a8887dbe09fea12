// Eight lanes of T as a GNU vector: one source for AVX-512, AVX2 and SSE2.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#define PRMFAST_INLINE inline __attribute__((always_inline))

namespace prmfast {

constexpr int kLanes = 8;

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
PRMFAST_INLINE Vec<T> broadcast(T x) {
  return Vec<T>{x, x, x, x, x, x, x, x};  // GCC 12 turns `x - Vec<T>{}` into eight masked moves
}

template <class T>
PRMFAST_INLINE T sum(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// n values from p; the lanes behind repeat the last one, so that they stay finite.
template <class T>
PRMFAST_INLINE Vec<T> load_n(const T* p, int64_t n) {
  Vec<T> v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i < n ? i : n - 1];
  return v;
}

// n values from p, zeros behind.
template <class T>
PRMFAST_INLINE Vec<T> load_zero(const T* p, int64_t n) {
  Vec<T> v{};
  for (int i = 0; i < kLanes && i < n; ++i) v[i] = p[i];
  return v;
}

template <class T>
PRMFAST_INLINE void store_n(T* p, Vec<T> v, int64_t n) {
  for (int i = 0; i < kLanes && i < n; ++i) p[i] = v[i];
}

// n zeroed vectors, aligned (std::vector drops the alignment that a vector type carries as an attribute).
template <class T>
class VecBuffer {
 public:
  explicit VecBuffer(int64_t n) {
    const size_t bytes = (n > 0 ? n : 1) * sizeof(Vec<T>);
    void* memory = std::aligned_alloc(sizeof(Vec<T>), bytes);
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    data_.reset(static_cast<Vec<T>*>(memory));
  }
  Vec<T>& operator[](int64_t i) { return data_.get()[i]; }
  const Vec<T>& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(Vec<T>* p) const { std::free(p); }
  };
  std::unique_ptr<Vec<T>, Free> data_;
};

// exp(-a) for a >= 0, 2e-7 relative; 0 from a = 87.
PRMFAST_INLINE Vec<float> exp_negative(Vec<float> a) {
  typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
  const Vec<float> top = broadcast(87.0f);
  const Int vanishes = a > top;
  a = vanishes ? top : a;
  const Vec<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec<float> n = (a * -1.44269504f + magic) - magic;
  const Vec<float> r = (-a - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> y = broadcast(1.0f / 720);
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Int scale = (__builtin_convertvector(n, Int) + 127) << 23;
  Vec<float> two;
  std::memcpy(&two, &scale, sizeof two);
  y = y * two;
  return vanishes ? Vec<float>{} : y;
}

PRMFAST_INLINE Vec<double> exp_negative(Vec<double> a) {
  Vec<double> y;
  for (int i = 0; i < kLanes; ++i) y[i] = std::exp(-a[i]);
  return y;
}

// log(1 + e) for e in [0, 1], relative 2e-8: 2 atanh(e / (2 + e)).
PRMFAST_INLINE Vec<float> log1p_unit(Vec<float> e) {
  const Vec<float> s = e / (2.0f + e), t = s * s;
  Vec<float> y = broadcast(1.0f / 13);
  y = y * t + 1.0f / 11;
  y = y * t + 1.0f / 9;
  y = y * t + 1.0f / 7;
  y = y * t + 1.0f / 5;
  y = y * t + 1.0f / 3;
  y = y * t + 1.0f;
  return 2.0f * s * y;
}

PRMFAST_INLINE Vec<double> log1p_unit(Vec<double> e) {
  Vec<double> y;
  for (int i = 0; i < kLanes; ++i) y[i] = std::log1p(e[i]);
  return y;
}

}  // namespace prmfast
