// The entries of a row, in float64: log-sum-exp, loss, and what the gradient needs. A warp per row, a lane per entry. Sums that an
// fma could change are spelt as intrinsics: the forward pass alone and the one that goes on to the gradient give the same bits.
#pragma once
#include "common/cuda/measure.cuh"
#include "dist_ppo/dist_ppo_cuda.h"

namespace prmfast::dist_ppo::cuda {

using namespace prmfast::cuda;

// Such that a lone token has a probability of exactly 1.
__device__ inline double log_p(double logit, double scale, double lse) {
  return __dadd_rn(__dmul_rn(__dmul_rn(logit, scale), kLn2), -lse);
}

// pi_old * min(rho A, clip(rho) A), with pi_old multiplied in so that nothing overflows, and its derivative by log pi_theta;
// an exact tie of two branches takes half of each, as autograd does.
struct Term {
  double value, slope;
};

__device__ inline Term term(double logp, double policy_logp, double advantage, const Objective& rule) {
  if (policy_logp == -INFINITY) return {0, 0};
  const double now = exp(logp), old = exp(policy_logp);
  const double low = old * (1 - rule.clip_low), high = old * (1 + rule.clip_high);
  const double open = now * advantage, shut = fmin(fmax(now, low), high) * advantage;
  const bool inside = low <= now && now <= high;
  double value = fmin(open, shut), share = open < shut ? 1 : open == shut ? (inside ? 1 : 0.5) : 0;
  if (advantage < 0 && rule.dual_clip <= DBL_MAX) {
    const double floor = rule.dual_clip * old * advantage;
    share *= value > floor ? 1 : value == floor ? 0.5 : 0;
    value = fmax(value, floor);
  }
  return {value, share * open};
}

__device__ inline double warp_max(double x) {
  for (int step = 16; step > 0; step /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Natural log-sum-exp of the tokens that are no entries and of the entries, whose logits logit(e) gives. Not finite where a logit is
// NaN or +inf, or all are -inf.
template <class Logit>
__device__ double log_sum_exp(const RowSum& others, Span row, double scale, const Logit& logit) {
  const double rest = others.sum == 0 ? -INFINITY : __dadd_rn(__dmul_rn(others.top, scale), log2(others.sum));
  double top = rest, total = 0;
  for (int64_t e = row.begin + lane_id(); e < row.end; e += 32) top = fmax(top, __dmul_rn(logit(e), scale));
  top = warp_max(top);
  for (int64_t e = row.begin + lane_id(); e < row.end; e += 32) total += exp2(__dadd_rn(__dmul_rn(logit(e), scale), -top));
  total = __dadd_rn(warp_sum(total), exp2(__dadd_rn(rest, -top)));
  return __dadd_rn(top, log2(total)) * kLn2;
}

struct Settled {
  double lse, loss;
};

// keep(e, d loss / d log pi_theta) is called for every entry, by the lane whose it is.
template <class Logit, class Keep>
__device__ Settled settle(const RowSum& others, Span row, double weight, const Objective& rule, const Logit& logit, const Keep& keep) {
  const double scale = kLog2e / rule.temperature, lse = log_sum_exp(others, row, scale, logit);
  double loss = 0;
  for (int64_t e = row.begin + lane_id(); e < row.end; e += 32) {
    const Term found = term(log_p(logit(e), scale, lse), rule.policy_logp[e], rule.advantage[e], rule);
    loss = __fma_rn(-weight, found.value, loss);
    keep(e, __dmul_rn(-weight, found.slope));  // rounded before anyone adds it up
  }
  return {lse, warp_sum(loss)};
}

// What the entries of a row do to all of its tokens.
struct Pull {
  double total;  // of the coefficients
  bool moves;    // one of them is not zero
};

template <class Coefficient>
__device__ Pull pull_of(Span row, const Coefficient& coefficient) {
  double total = 0;
  bool moves = false;
  for (int64_t e = row.begin + lane_id(); e < row.end; e += 32) {
    total += coefficient(e);
    moves |= coefficient(e) != 0;
  }
  return {warp_sum(total), __any_sync(kAllLanes, moves) != 0};
}

// d loss / d logit of an entry.
__device__ inline double entry_slope(double coefficient, double total, double logit, double lse, double temperature) {
  const double p = exp(log_p(logit, kLog2e / temperature, lse));
  return __fma_rn(-total, p, coefficient) / temperature;
}

// d loss / d logit of every token that is no entry: -total p / temperature = factor 2^((x - certain) scale).
struct Slopes {
  float scale, certain, factor;
};

__device__ inline Slopes slopes_of(double total, double lse, double temperature) {
  const double scale = kLog2e / temperature;
  const auto certain = static_cast<float>(lse * temperature);  // the logit of a probability of 1
  return {static_cast<float>(scale), certain, static_cast<float>(-total / temperature * exp(log_p(certain, scale, lse)))};
}

}  // namespace prmfast::dist_ppo::cuda
