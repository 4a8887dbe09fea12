#include "common/log_sum.h"

#include <cmath>
#include <limits>

#include "common/sweep.h"

namespace prmfast {
namespace {

constexpr double kTop = std::numeric_limits<double>::infinity();
constexpr double kJump = 4;  // in powers of two: a float32 exponent near 0 keeps its precision

}  // namespace

template <class S>
void LogSum::find_fault(const S* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double value = widen1(x + i);
    if (std::isnan(value)) fault_ = Fault::nan;
    if (value == kTop && fault_ == Fault::none) fault_ = Fault::positive_infinity;
  }
}

template <class S>
double LogSum::add(const S* x, int64_t n, double scale) {
  const auto narrow_scale = static_cast<Real<S>>(scale);  // its rounding weighs on the sum only by what lies far below the top
  auto found = sweep(x, n, narrow_scale, static_cast<Real<S>>(reference_));
  const double top = found.top;
  if (top == kTop || (std::isnan(found.sum) && top == -kTop)) {
    find_fault(x, n);
    return top;
  }
  if (top == -kTop) return top;
  const double above = (top - reference_) * scale;
  if (above > kJump || (!started_ && above < -kJump)) {
    sum_ *= started_ ? std::exp2(-above) : 0.0;
    reference_ = top;
    found = sweep(x, n, narrow_scale, found.top);
  }
  if (std::isnan(found.sum)) find_fault(x, n);
  started_ = true;
  sum_ += found.sum;
  return top;
}

double LogSum::log2_sum() const { return std::log2(sum_); }
double LogSum::logit_of(double log2_p, double scale) const { return reference_ + (log2_p + log2_sum()) / scale; }

template double LogSum::add<float>(const float*, int64_t, double);
template double LogSum::add<double>(const double*, int64_t, double);
template double LogSum::add<BFloat16>(const BFloat16*, int64_t, double);
template double LogSum::add<Float16>(const Float16*, int64_t, double);

}  // namespace prmfast
