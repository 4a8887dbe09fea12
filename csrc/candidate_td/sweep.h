// What is done to every logit of a chunk: the sum of its exponentials, its maximum, and which logits reach a threshold.
#pragma once
#include <cstdint>

#include "common/logits.h"

namespace prmfast::candidate_td {

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

template <class S>
using Real = decltype(widen1(static_cast<const S*>(nullptr)));

template <class R>
struct Sweep {
  double sum;  // of 2^((x - reference) * scale); NaN if a logit is NaN; without meaning where the exponent exceeds 120
  R top;       // maximum, NaN aside
};

// Sums run in lanes of float32 and meet in float64, so a chunk should hold no more than a few thousand logits.
Sweep<float> sweep(const float* x, int64_t n, float scale, float reference);
Sweep<float> sweep(const BFloat16* x, int64_t n, float scale, float reference);
Sweep<float> sweep(const Float16* x, int64_t n, float scale, float reference);
Sweep<double> sweep(const double* x, int64_t n, double scale, double reference);

// Positions of logits >= threshold, increasing, into `out` (room for n); how many there are.
int64_t reach(const float* x, int64_t n, float threshold, int32_t* out);
int64_t reach(const BFloat16* x, int64_t n, float threshold, int32_t* out);
int64_t reach(const Float16* x, int64_t n, float threshold, int32_t* out);
int64_t reach(const double* x, int64_t n, double threshold, int32_t* out);

// out = 2^((x - reference) * scale) * factor, past the caches if `stream`; call finish_streaming() before out is touched again.
void slopes(const float* x, int64_t n, float scale, float reference, float factor, float* out, bool stream);
void slopes(const BFloat16* x, int64_t n, float scale, float reference, float factor, BFloat16* out, bool stream);
void slopes(const Float16* x, int64_t n, float scale, float reference, float factor, Float16* out, bool stream);
void slopes(const double* x, int64_t n, double scale, double reference, double factor, double* out, bool stream);
void finish_streaming();

}  // namespace prmfast::candidate_td
