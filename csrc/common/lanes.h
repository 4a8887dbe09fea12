// One 64-byte vector of T: sixteen floats or eight doubles, a register of AVX-512, two of AVX2, four of SSE2.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "common/simd.h"

namespace prmfast {

template <class T>
constexpr int kWidth = 64 / sizeof(T);

template <class T>
struct LanesOf {
  typedef T type __attribute__((vector_size(64)));
};
template <class T>
using Lanes = typename LanesOf<T>::type;

// GCC 12 makes sixteen masked moves of a braced list of one variable, and one broadcast of this.
PRMFAST_INLINE Lanes<float> splat(float x) { return Lanes<int32_t>{} == 0 ? x : 0.0f; }
PRMFAST_INLINE Lanes<double> splat(double x) { return Lanes<int64_t>{} == 0 ? x : 0.0; }

template <class T>
PRMFAST_INLINE Lanes<T> load(const T* p) {
  Lanes<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
PRMFAST_INLINE void store(T* p, Lanes<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
PRMFAST_INLINE Lanes<T> absolute(Lanes<T> v) {
  return v < 0 ? -v : v;
}

template <class T>
PRMFAST_INLINE Lanes<T> larger(Lanes<T> a, Lanes<T> b) {
  return a > b ? a : b;
}

// Interleaves the lower (or upper) halves of a and b: a0 b0 a1 b1 ...
PRMFAST_INLINE Lanes<float> interleave_low(Lanes<float> a, Lanes<float> b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
PRMFAST_INLINE Lanes<float> interleave_high(Lanes<float> a, Lanes<float> b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
PRMFAST_INLINE Lanes<double> interleave_low(Lanes<double> a, Lanes<double> b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
PRMFAST_INLINE Lanes<double> interleave_high(Lanes<double> a, Lanes<double> b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

// A square block of kWidth x kWidth in registers: log2(kWidth) perfect shuffles of its rows.
template <class T>
PRMFAST_INLINE void transpose(Lanes<T>* rows) {
  constexpr int n = kWidth<T>;
  for (int step = 1; step < n; step *= 2) {
    Lanes<T> next[n];
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + n / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + n / 2]);
    }
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

template <class T>
PRMFAST_INLINE T sum(Lanes<T> v) {
  T total = 0;
  for (int i = 0; i < kWidth<T>; ++i) total += v[i];
  return total;
}

// n vectors, aligned (std::vector drops the alignment that a vector type carries as an attribute); uninitialised.
template <class T>
class LaneBuffer {
 public:
  explicit LaneBuffer(int64_t n) {
    void* memory = std::aligned_alloc(64, (n > 0 ? n : 1) * 64);
    if (memory == nullptr) throw std::bad_alloc();
    data_.reset(static_cast<Lanes<T>*>(memory));
  }
  Lanes<T>* get() { return data_.get(); }
  const Lanes<T>* get() const { return data_.get(); }
  Lanes<T>& operator[](int64_t i) { return data_.get()[i]; }
  const Lanes<T>& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(Lanes<T>* p) const { std::free(p); }
  };
  std::unique_ptr<Lanes<T>, Free> data_;
};

// exp(-a) for a >= 0, 2e-7 beside 1; stays at exp(-87) = 1.6e-38 from there on. n is added to the exponent's bits as it is.
PRMFAST_INLINE Lanes<float> exp_of_minus(Lanes<float> a) {
  typedef Lanes<int32_t> Int;
  const Lanes<float> top = splat(87.0f), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  a = a > top ? top : a;
  const Lanes<float> shifted = a * -1.44269504f + magic, r = a * -1.44269504f - (shifted - magic);
  Lanes<float> y = splat(0.00132764691f);
  y = y * r + 0.00967554131f;
  y = y * r + 0.0555071328f;
  y = y * r + 0.240221197f;
  y = y * r + 0.693146967f;
  y = y * r + 1.00000007f;
  Int n, bits;
  std::memcpy(&n, &shifted, sizeof n);
  std::memcpy(&bits, &y, sizeof bits);
  bits += n << 23;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

PRMFAST_INLINE Lanes<double> exp_of_minus(Lanes<double> a) {
  Lanes<double> y;
  for (int i = 0; i < kWidth<double>; ++i) y[i] = std::exp(-a[i]);
  return y;
}

// log(1 + e) for e in [0, 1], 3e-8 relative: e times a polynomial fitted to log(1 + e) / e.
PRMFAST_INLINE Lanes<float> log_of_one_plus(Lanes<float> e) {
  Lanes<float> y = splat(0.00538386516f);
  y = y * e - 0.0301101852f;
  y = y * e + 0.0792094866f;
  y = y * e - 0.137465175f;
  y = y * e + 0.191450681f;
  y = y * e - 0.248529337f;
  y = y * e + 0.333203421f;
  y = y * e - 0.499995525f;
  y = y * e + 0.999999975f;
  return y * e;
}

PRMFAST_INLINE Lanes<double> log_of_one_plus(Lanes<double> e) {
  Lanes<double> y;
  for (int i = 0; i < kWidth<double>; ++i) y[i] = std::log1p(e[i]);
  return y;
}

// 1 / (1 + e) for e in [0, 1], 1e-7 relative: a fitted start and one step of Newton's, half of what a division costs.
PRMFAST_INLINE Lanes<float> inverse_of_one_plus(Lanes<float> e) {
  const Lanes<float> d = e + 1.0f;
  Lanes<float> y = splat(0.152243627f);
  y = y * e - 0.532854722f;
  y = y * e + 0.865891713f;
  y = y * e - 0.984834584f;
  y = y * e + 0.999702633f;
  return y * (2.0f - d * y);
}

PRMFAST_INLINE Lanes<double> inverse_of_one_plus(Lanes<double> e) { return 1.0 / (1.0 + e); }

}  // namespace prmfast
