// Running log-sum-exp of a row of logits, from float32, float64 or half types.
#pragma once
#include <cstdint>

namespace prmfast {

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.693147180559945309417;

enum class Fault { none, nan, positive_infinity, only_negative_infinity };

// A sum of 2^((x - reference) * scale), where scale is log2(e) / temperature. The reference is a logit near the largest so far
// and is replaced only when a later one exceeds it by a factor of 16.
class LogSum {
 public:
  static constexpr int64_t kChunk = 2048;  // logits to take in at a time: float32 chunks of two rows stay in the first-level cache

  LogSum() = default;
  LogSum(double reference, double sum) : sum_(sum), reference_(reference), started_(sum != 0) {}  // goes on from there

  // Takes in the next n logits, a few thousand at most; returns their maximum, rounded down if at all.
  template <class S>
  double add(const S* x, int64_t n, double scale);

  double reference() const { return reference_; }
  double sum() const { return fault_ == Fault::none ? sum_ : __builtin_nan(""); }  // 0 where nothing was above -inf
  bool started() const { return started_; }
  Fault fault() const { return fault_ == Fault::none && !started_ ? Fault::only_negative_infinity : fault_; }
  double log2_sum() const;                                    // of 2^((x - reference) * scale)
  double log2_p(double x, double scale) const { return (x - reference_) * scale - log2_sum(); }
  double logit_of(double log2_p, double scale) const;         // the logit of this log-probability, as of now

 private:
  template <class S>
  void find_fault(const S* x, int64_t n);

  double sum_ = 0, reference_ = 0;
  bool started_ = false;
  Fault fault_ = Fault::none;
};

}  // namespace prmfast
