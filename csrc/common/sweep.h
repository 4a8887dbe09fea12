// What is done to every logit of a row or a chunk of one: the sum of exponentials, the maximum, which logits reach a threshold, and
// multiples of the exponentials. One function for each instruction set, by chosen_isa().
#pragma once
#include <cstdint>

#include "common/logits.h"

namespace prmfast {

// One logit in the type that thresholds and references of its storage have.
inline double widen1(const double* p) { return *p; }
inline float widen1(const float* p) { return *p; }
inline float widen1(const BFloat16* p) { return bit_cast<float>(static_cast<uint32_t>(p->bits) << 16); }
inline float widen1(const Float16* p) { return load1(p); }

inline void store1(double* p, double x) { *p = x; }
template <class S>
void store1(S* p, double x) {
  store16(p, broadcast16(static_cast<float>(x)), 1);
}
inline void store1(float* p, double x) { *p = static_cast<float>(x); }

inline double negative_infinity(double) { return -__builtin_inf(); }
inline float negative_infinity(float) { return -__builtin_inff(); }
inline BFloat16 negative_infinity(BFloat16) { return {0xff80}; }
inline Float16 negative_infinity(Float16) { return {0xfc00}; }

template <class S>
using Real = decltype(widen1(static_cast<const S*>(nullptr)));

template <class R>
struct Sweep {
  double sum;  // of 2^((x - reference) * scale); NaN if a logit is NaN; without meaning where the exponent exceeds 120
  R top;       // maximum, NaN aside
};

// Sums run in lanes of float32 and meet in float64, so a chunk should hold no more than a few thousand logits.
template <class S>
Sweep<float> sweep(const S* x, int64_t n, float scale, float reference);
Sweep<double> sweep(const double* x, int64_t n, double scale, double reference);

// Positions of logits >= threshold, increasing, into `out` (room for n); how many there are.
template <class S>
int64_t reach(const S* x, int64_t n, float threshold, int32_t* out);
int64_t reach(const double* x, int64_t n, double threshold, int32_t* out);

// out = factor * 2^((x - reference) * scale), within 3e-7 (float32) or 4e-6 (half types, before they round) where the exponent is
// near 0; without meaning where it exceeds 120. out may be x. bfloat16 ties go away from zero: they are accidents of the arithmetic.
template <class S>
void slopes(const S* x, int64_t n, float scale, float reference, double factor, S* out);
void slopes(const double* x, int64_t n, double scale, double reference, double factor, double* out);

}  // namespace prmfast
