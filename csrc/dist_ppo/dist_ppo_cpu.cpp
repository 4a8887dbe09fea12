#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/flush_denormals.h"
#include "common/parallel_for.h"
#include "common/simd.h"
#include "dist_ppo/dist_ppo.h"

namespace prmfast::dist_ppo {
namespace {

constexpr int64_t kPair = 2 * kWide;       // logits taken at a time
constexpr int64_t kChunk = 2048;           // logits between two looks at the running reference
constexpr int64_t kAhead = 2048;           // bytes that memory is asked for in advance
constexpr double kJump = 16;               // powers of two that the largest logit may be away from the reference
constexpr int64_t kWorkPerLogit = 20;

// The lines of a pair that comes later: twice as fast as what the hardware foresees, and faster than stores that pass the cache.
template <class S>
PRMFAST_INLINE void ask_for_pair(const S* p) {
  const char* ahead = reinterpret_cast<const char*>(p) + kAhead;
  __builtin_prefetch(ahead);
  if (sizeof(S) == 4) __builtin_prefetch(ahead + 64);
}

// Two vectors of logits. Which of the 32 go to a and which to b is the storage's choice: load and store agree.
struct Pair {
  Wide a, b;
};

PRMFAST_INLINE Pair load_pair(const float* p) { return {load16(p), load16(p + kWide)}; }
PRMFAST_INLINE Pair load_pair(const Float16* p) { return {load16(p), load16(p + kWide)}; }
// Even ones to a, odd ones to b: a shift and a mask, where widening sixteen neighbours would be a shuffle.
PRMFAST_INLINE Pair load_pair(const BFloat16* p) {
  WideBits bits;
  std::memcpy(&bits, p, sizeof bits);
  return {bit_cast<Wide>(bits << 16), bit_cast<Wide>(bits & 0xffff0000u)};
}

PRMFAST_INLINE void store_pair(float* p, Pair v) {
  store16(p, v.a);
  store16(p + kWide, v.b);
}
PRMFAST_INLINE void store_pair(Float16* p, Pair v) {
  store16(p, v.a);
  store16(p + kWide, v.b);
}
// To nearest. A tie, which is an accident of float32 arithmetic, goes away from zero: three instructions less.
PRMFAST_INLINE void store_pair(BFloat16* p, Pair v) {
  const WideBits a = bit_cast<WideBits>(v.a) + 0x8000u, b = bit_cast<WideBits>(v.b) + 0x8000u;
  const WideBits bits = (a >> 16) | (b & 0xffff0000u);
  std::memcpy(p, &bits, sizeof bits);
}

template <class S>
PRMFAST_INLINE Pair load_some(const S* p, int64_t n, S fill) {
  S some[kPair];
  for (int64_t i = 0; i < kPair; ++i) some[i] = i < n ? p[i] : fill;
  return load_pair(some);
}
template <class S>
PRMFAST_INLINE void store_some(S* p, Pair v, int64_t n) {
  S some[kPair];
  store_pair(some, v);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
}

PRMFAST_INLINE float minus_infinity(float) { return -std::numeric_limits<float>::infinity(); }
PRMFAST_INLINE BFloat16 minus_infinity(BFloat16) { return {0xff80}; }
PRMFAST_INLINE Float16 minus_infinity(Float16) { return {0xfc00}; }

PRMFAST_INLINE void store_one(float* p, double v) { *p = static_cast<float>(v); }
template <class S>
PRMFAST_INLINE void store_one(S* p, double v) {
  const WideHalf bits = narrow(broadcast16(static_cast<float>(v)), S{});
  p->bits = bits[0];
}

// Minimax polynomials of 2^r on [-1/2, 1/2], exact at 0: 1e-7 relative, and 3e-6 or 1e-4 where the result is rounded to a half
// type (to 5e-4 or 4e-3).
constexpr float kFull[] = {1.0f, 6.931469775e-1f, 2.402224212e-1f, 5.550733963e-2f, 9.671511324e-3f, 1.326465239e-3f};
constexpr float kShort[] = {1.0f, 6.931241934e-1f, 2.402409861e-1f, 5.590642482e-2f, 9.582853121e-3f};
constexpr float kCoarse[] = {1.0f, 6.932829269e-1f, 2.422109594e-1f, 5.500893185e-2f};

template <int n>
struct Polynomial {
  Wide c[n];
  PRMFAST_INLINE Polynomial(const float (&coefficients)[n], float factor) {
    for (int i = 0; i < n; ++i) c[i] = broadcast16(coefficients[i] * factor);
  }
  PRMFAST_INLINE Wide operator()(Wide r) const {
    Wide y = c[n - 1];
    for (int i = n - 2; i >= 0; --i) y = y * r + c[i];
    return y;
  }
};

// Logits in powers of two: 2^(x slope) = e^(x / temperature), for a temperature that differs from the caller's by the rounding
// of slope alone. Whoever subtracts a log-sum-exp must use the same one.
struct Scale {
  float slope;
  double ln;  // natural logarithms in a unit of x
  explicit Scale(double temperature) : slope(static_cast<float>(1 / (temperature * kLn2))), ln(slope * kLn2) {}
  static constexpr double kLn2 = 0.69314718055994531;
};

// What logits are held against so that 2^(...) stays in range: x slope - exponent = (x - shift) slope - power. Near 0 it is a
// whole power of two, which comes off the exponent for nothing; elsewhere x slope would lose digits, and x is shifted first.
struct Origin {
  float shift, power;
  double exponent;
  Origin(double wanted, const Scale& scale) {
    const bool near = std::abs(wanted) <= kNear;
    power = near ? static_cast<float>(std::nearbyint(wanted)) : 0;
    shift = near ? 0 : static_cast<float>(wanted / scale.slope);
    exponent = near ? power : static_cast<double>(shift) * scale.slope;
  }
  static Origin at(float reference, const Scale& scale) { return Origin(static_cast<double>(reference) * scale.slope, scale); }
  static constexpr double kNear = 16;
};

// 2^(x slope - exponent) = polynomial(r) * scale, for values below 2^128; exactly 0 from 2^-126.5 down. NaN stays NaN in the
// product.
struct Power {
  Wide r, scale;
};
struct Exponential {
  Wide slope, low, magic;
  PRMFAST_INLINE Exponential(const Origin& origin, const Scale& scale)
      : slope(broadcast16(scale.slope)),
        low(broadcast16(std::max((origin.power - 127) / scale.slope, -std::numeric_limits<float>::max()))),
        magic(broadcast16(12582912.0f + 127.0f - origin.power)) {}  // 1.5 * 2^23: adding it rounds
  PRMFAST_INLINE Power operator()(Wide shifted) const {
    shifted = low > shifted ? low : shifted;
    const Wide t = shifted * slope + magic;
    return {shifted * slope - (t - magic), bit_cast<Wide>(bit_cast<WideBits>(t) << 23)};  // t's low bits are the exponent's
  }
};

// A sum over the row of 2^(x slope - exponent of the origin at reference), starting at (0, 0).
struct Softmax {
  float reference;
  double sum;
};

struct Chunk {
  float top, sum;  // top of the shifted logits
};

// The shift is subtracted even where it is 0: from a float32 difference GCC makes a maximum in one instruction, from a
// bfloat16's widened bits in three.
template <class S>
PRMFAST_INLINE Chunk sum_chunk(const S* x, int64_t n, const Origin& origin, const Scale& scale) {
  const Exponential exponential(origin, scale);
  const Polynomial polynomial(kFull, 1);
  const Wide shift = broadcast16(origin.shift);
  Wide top_a = broadcast16(-std::numeric_limits<float>::infinity()), top_b = top_a, sum_a{}, sum_b{};
  const auto add = [&](Pair v) __attribute__((always_inline)) {
    v = {v.a - shift, v.b - shift};
    top_a = v.a > top_a ? v.a : top_a;
    top_b = v.b > top_b ? v.b : top_b;
    const Power a = exponential(v.a), b = exponential(v.b);
    sum_a += polynomial(a.r) * a.scale;
    sum_b += polynomial(b.r) * b.scale;
  };
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    ask_for_pair(x + i);
    add(load_pair(x + i));
  }
  if (i < n) add(load_some(x + i, n - i, minus_infinity(S{})));
  return {max16(top_a > top_b ? top_a : top_b), sum16(sum_a + sum_b)};
}

// The reference moves to a logit that exceeds it by a lot, or to what there is while nothing has counted yet.
template <class S>
PRMFAST_INLINE Softmax absorb(const S* x, int64_t n, const Scale& scale, Softmax state) {
  Origin origin = Origin::at(state.reference, scale);
  for (int64_t i = 0; i < n;) {
    const int64_t m = std::min(kChunk, n - i);
    const Chunk chunk = sum_chunk(x + i, m, origin, scale);
    const double above = static_cast<double>(chunk.top) * scale.slope - origin.power;
    const bool nothing = state.sum == 0 && chunk.top >= -std::numeric_limits<float>::max();
    if (above > kJump || (nothing && above < -kJump)) {
      const double before = origin.exponent;
      state.reference = static_cast<float>(static_cast<double>(chunk.top) + origin.shift);
      origin = Origin::at(state.reference, scale);
      if (state.sum != 0) state.sum *= std::exp2(before - origin.exponent);
      continue;  // the same chunk again
    }
    state.sum += chunk.sum;
    i += m;
  }
  return state;
}

double log_sum(const Softmax& state, const Scale& scale) {
  const bool whole = state.sum > 0 && state.sum <= std::numeric_limits<double>::max();
  if (!whole) return std::numeric_limits<double>::quiet_NaN();
  return Origin::at(state.reference, scale).exponent * Scale::kLn2 + std::log(state.sum);
}

// pi_old * min(rho A, clip(rho) A), with pi_old multiplied in so that nothing overflows, and its derivative by log pi_theta;
// an exact tie of two branches takes half of each, as autograd does.
struct Term {
  double value, slope;
};
Term term(double logp, double policy_logp, double advantage, const Objective& rule) {
  if (policy_logp == -std::numeric_limits<double>::infinity()) return {0, 0};
  const double now = std::exp(logp), old = std::exp(policy_logp);
  const double low = old * (1 - rule.clip_low), high = old * (1 + rule.clip_high);
  const double open = now * advantage, shut = std::min(std::max(now, low), high) * advantage;
  const bool inside = low <= now && now <= high;
  double value = std::min(open, shut), share = open < shut ? 1 : open == shut ? (inside ? 1 : 0.5) : 0;
  if (advantage < 0 && rule.dual_clip <= std::numeric_limits<double>::max()) {
    const double floor = rule.dual_clip * old * advantage;
    share *= value > floor ? 1 : value == floor ? 0.5 : 0;
    value = std::max(value, floor);
  }
  return {value, share * open};
}

template <class S>
struct Job {
  Rows<const S> logits;
  Entries entries;
  const Objective* objective;  // null where lse and coefficients are known
  double* lse;
  double* coefficients;
  double* row_loss;
  double temperature;
  Rows<S> out;                 // data is null where no gradient is wanted
  int64_t first;               // id of the first column
};

template <class S>
void measure_row(const Job<S>& job, int64_t t, const Softmax& state) {
  const Objective& rule = *job.objective;
  const S* x = job.logits.data + t * job.logits.stride;
  const Scale scale(job.temperature);
  // One token is certain, and exactly so: a rounded sum would leave a gradient behind.
  const double lse = job.lse[t] = job.logits.columns == 1 ? load1(x) * scale.ln : log_sum(state, scale);
  const double weight = rule.row_weight[t * rule.row_weight_stride];
  double total = 0;
  for (int64_t e = job.entries.begin[t]; e < job.entries.end[t]; ++e) {
    const double logp = load1(x + job.entries.token_ids[e]) * scale.ln - lse;
    const Term found = term(logp, rule.policy_logp[e], rule.advantage[e], rule);
    total -= weight * found.value;
    job.coefficients[e] = -weight * found.slope;
  }
  job.row_loss[t] = total;
}

template <class S>
constexpr auto& kRounded = kFull;
template <>
constexpr auto& kRounded<Float16> = kShort;
template <>
constexpr auto& kRounded<BFloat16> = kCoarse;

template <class S>
PRMFAST_INLINE void write_row(const S* x, int64_t n, const Origin& origin, const Scale& scale, float factor, S* out) {
  const Exponential exponential(origin, scale);
  const Polynomial polynomial(kRounded<S>, factor);
  const Wide shift = broadcast16(origin.shift);
  const auto grad = [&](Pair v) __attribute__((always_inline)) {
    const Power a = exponential(v.a - shift), b = exponential(v.b - shift);
    return Pair{polynomial(a.r) * a.scale, polynomial(b.r) * b.scale};
  };
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    ask_for_pair(out + i);
    store_pair(out + i, grad(load_pair(x + i)));
  }
  if (i < n) store_some(out + i, grad(load_some(x + i, n - i, minus_infinity(S{}))), n - i);
}

template <class S>
PRMFAST_INLINE void zero_row(const Job<S>& job, int64_t t) {
  S* out = job.out.data + t * job.out.stride;
  int64_t i = 0;
  for (; i + kPair <= job.out.columns; i += kPair) {
    ask_for_pair(out + i);
    store_pair(out + i, {Wide{}, Wide{}});
  }
  std::memset(static_cast<void*>(out + i), 0, (job.out.columns - i) * sizeof(S));
}

// out = sum_c g_c (1[v = c] - pi_theta(v)) / temperature. Entries' values are made before anything is written: out may be x.
template <class S>
PRMFAST_INLINE void gradient_row(const Job<S>& job, int64_t t, std::vector<double>& fixed) {
  const int64_t begin = job.entries.begin[t], end = job.entries.end[t], n = job.logits.columns;
  const int64_t* ids = job.entries.token_ids;
  const S* x = job.logits.data + t * job.logits.stride;
  S* out = job.out.data + t * job.out.stride;
  double total = 0;
  bool moves = false;
  for (int64_t e = begin; e < end; ++e) {
    total += job.coefficients[e];
    moves |= job.coefficients[e] != 0;
  }
  if (!moves) return zero_row(job, t);
  const double lse = job.lse[t], temperature = job.temperature;
  const Scale scale(temperature);
  const int64_t base = std::lower_bound(ids + begin, ids + end, job.first) - ids;
  const int64_t last = std::lower_bound(ids + base, ids + end, job.first + n) - ids;
  fixed.resize(last - base);
  for (int64_t e = base; e < last; ++e) {
    const double p = std::exp(load1(x + (ids[e] - job.first)) * scale.ln - lse);
    fixed[e - base] = (job.coefficients[e] - total * p) / temperature;
  }
  const Origin origin(lse / Scale::kLn2, scale);
  const float factor = static_cast<float>(-total / temperature * std::exp(origin.exponent * Scale::kLn2 - lse));
  write_row(x, n, origin, scale, factor, out);
  for (int64_t e = base; e < last; ++e) store_one(out + (ids[e] - job.first), fixed[e - base]);
}

template <class S>
PRMFAST_INLINE void some_rows(const Job<S>& job, int64_t begin, int64_t end) {
  const FlushDenormals flush(Flush::results);  // of inputs not: a float16 subnormal is widened through a float32 one
  const Scale scale(job.temperature);
  std::vector<double> fixed;
  for (int64_t t = begin; t < end; ++t) {
    const bool empty = job.entries.begin[t] == job.entries.end[t];
    if (job.objective != nullptr) {
      if (empty)
        job.lse[t] = job.row_loss[t] = 0;
      else
        measure_row(job, t, absorb(job.logits.data + t * job.logits.stride, job.logits.columns, scale, {0, 0}));
    }
    if (job.out.data == nullptr || !(std::abs(job.lse[t]) <= std::numeric_limits<double>::max())) continue;
    if (empty)
      zero_row(job, t);
    else
      gradient_row(job, t, fixed);
  }
}

PRMFAST_MULTIVERSION void run(const Job<float>& job, int64_t begin, int64_t end) { some_rows(job, begin, end); }
PRMFAST_MULTIVERSION void run(const Job<BFloat16>& job, int64_t begin, int64_t end) { some_rows(job, begin, end); }
PRMFAST_MULTIVERSION void run(const Job<Float16>& job, int64_t begin, int64_t end) { some_rows(job, begin, end); }

template <class S>
void run_all(const Job<S>& job, int threads) {
  threads = thread_count(job.logits.rows, job.logits.columns * kWorkPerLogit, threads);
  parallel_rows(job.logits.rows, threads, [&](int, int64_t begin, int64_t end) { run(job, begin, end); });
}

PRMFAST_MULTIVERSION void absorb_rows(const Rows<const float>& block, const Scale& scale, float* reference, double* sum, int64_t begin,
                                      int64_t end) {
  const FlushDenormals flush(Flush::results);
  for (int64_t t = begin; t < end; ++t) {
    const Softmax state = absorb(block.data + t * block.stride, block.columns, scale, {reference[t], sum[t]});
    reference[t] = state.reference;
    sum[t] = state.sum;
  }
}

}  // namespace

template <class S>
double loss_and_gradient(const Rows<const S>& logits, const Entries& entries, const Objective& objective, double* lse,
                         double* coefficients, const Rows<S>& out, int threads) {
  std::vector<double> row_loss(logits.rows);
  const Job<S> job{logits, entries, &objective, lse, coefficients, row_loss.data(), objective.temperature, out, 0};
  run_all(job, threads);
  double total = 0;
  for (const double one : row_loss) total += one;  // in the order of the rows, whatever the threads
  return total;
}

template <class S>
double loss(const Rows<const S>& logits, const Entries& entries, const Objective& objective, double* lse, double* coefficients,
            int threads) {
  return loss_and_gradient(logits, entries, objective, lse, coefficients, Rows<S>{nullptr, 0, 0, 0}, threads);
}

template <class S>
void gradient(const Rows<const S>& logits, const Entries& entries, const double* lse, const double* coefficients,
              double temperature, const Rows<S>& out, int threads) {
  run_all(Job<S>{logits, entries, nullptr, const_cast<double*>(lse), const_cast<double*>(coefficients), nullptr, temperature, out,
                 0},
          threads);
}

void absorb_block(const Rows<const float>& block, int64_t first, const Entries& entries, double temperature, float* reference,
                  double* sum, float* entry_logits, int threads) {
  const Scale scale(temperature);
  threads = thread_count(block.rows, block.columns * kWorkPerLogit, threads);
  parallel_rows(block.rows, threads, [&](int, int64_t begin, int64_t end) {
    absorb_rows(block, scale, reference, sum, begin, end);
    for (int64_t t = begin; t < end; ++t)
      for (int64_t e = entries.begin[t]; e < entries.end[t]; ++e) {
        const int64_t column = entries.token_ids[e] - first;
        if (column >= 0 && column < block.columns) entry_logits[e] = block.data[t * block.stride + column];
      }
  });
}

double finish_blocks(const float* reference, const double* sum, int64_t rows, double temperature, double* lse) {
  const Scale scale(temperature);
  for (int64_t t = 0; t < rows; ++t) lse[t] = log_sum({reference[t], sum[t]}, scale);
  return 1 / scale.ln;
}

void differentiate_block(const Rows<float>& block, int64_t first, const Entries& entries, const double* lse,
                         const double* coefficients, double temperature, int threads) {
  const Rows<const float> logits{block.data, block.rows, block.columns, block.stride};
  run_all(Job<float>{logits, entries, nullptr, const_cast<double*>(lse), const_cast<double*>(coefficients), nullptr, temperature,
                     block, first},
          threads);
}

#define PRMFAST_INSTANTIATE(S)                                                                                                \
  template double loss(const Rows<const S>&, const Entries&, const Objective&, double*, double*, int);                       \
  template void gradient(const Rows<const S>&, const Entries&, const double*, const double*, double, const Rows<S>&, int);   \
  template double loss_and_gradient(const Rows<const S>&, const Entries&, const Objective&, double*, double*, const Rows<S>&, int);
PRMFAST_INSTANTIATE(float)
PRMFAST_INSTANTIATE(BFloat16)
PRMFAST_INSTANTIATE(Float16)
#undef PRMFAST_INSTANTIATE

}  // namespace prmfast::dist_ppo
