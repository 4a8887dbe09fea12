#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/flush_denormals.h"
#include "common/parallel_for.h"
#include "common/simd.h"
#include "dist_ppo/dist_ppo.h"
#include "dist_ppo/stream.h"

namespace prmfast::dist_ppo {
namespace {

constexpr int64_t kPair = 2 * kWide;       // logits taken at a time
constexpr int64_t kChunk = 2048;           // logits between two looks at the running reference
constexpr int64_t kAhead = 2048;           // bytes that memory is asked for in advance
constexpr float kJump = 16;                // powers of two that a logit may exceed the reference by
constexpr int64_t kWorkPerLogit = 20;
constexpr int64_t kStreamFrom = 16 << 20;  // bytes: what is larger is no longer in the cache when somebody reads it

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
PRMFAST_INLINE WideBits round_to_upper_half(Wide v) {  // nearest, ties to even; the only NaN that comes here is inf * 0
  const WideBits bits = bit_cast<WideBits>(v);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
PRMFAST_INLINE void store_pair(BFloat16* p, Pair v) {
  const WideBits bits = (round_to_upper_half(v.a) >> 16) | (round_to_upper_half(v.b) & 0xffff0000u);
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

// 2^z = mantissa * scale for z < 128, 1e-7 relative (a minimax polynomial that is exact at whole z); exactly 0 from z = -126.5
// down. NaN stays NaN in the product.
struct Power {
  Wide mantissa, scale;
};
PRMFAST_INLINE Power exp2_parts(Wide z) {
  const Wide low = broadcast16(-127.0f), magic = broadcast16(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it rounds
  z = z < low ? low : z;
  const Wide t = z + magic, r = z - (t - magic);
  Wide y = broadcast16(1.326465239e-3f);
  y = y * r + 9.671511324e-3f;
  y = y * r + 5.550733963e-2f;
  y = y * r + 2.402224212e-1f;
  y = y * r + 6.931469775e-1f;
  y = y * r + 1.0f;
  return {y, bit_cast<Wide>(bit_cast<WideBits>(t) << 23)};  // t's low bits hold z + 127, an exponent already
}

// sum over the row of 2^((x - reference) * scale): the reference moves up when a logit exceeds it by a lot.
struct Softmax {
  float reference;
  double sum;
};

struct Chunk {
  float top, sum;
};

template <class S>
PRMFAST_INLINE Chunk sum_chunk(const S* x, int64_t n, float reference, float scale) {
  const Wide shift = broadcast16(reference), slope = broadcast16(scale);
  Wide top_a = broadcast16(kNoReference), top_b = top_a, sum_a{}, sum_b{};
  const auto add = [&](Pair v) __attribute__((always_inline)) {
    top_a = v.a > top_a ? v.a : top_a;
    top_b = v.b > top_b ? v.b : top_b;
    const Power a = exp2_parts((v.a - shift) * slope), b = exp2_parts((v.b - shift) * slope);
    sum_a += a.mantissa * a.scale;
    sum_b += b.mantissa * b.scale;
  };
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const char* ahead = reinterpret_cast<const char*>(x + i) + kAhead;
    __builtin_prefetch(ahead);
    if (sizeof(S) == 4) __builtin_prefetch(ahead + 64);
    add(load_pair(x + i));
  }
  if (i < n) add(load_some(x + i, n - i, minus_infinity(S{})));
  return {max16(top_a > top_b ? top_a : top_b), sum16(sum_a + sum_b)};
}

template <class S>
PRMFAST_INLINE Softmax absorb(const S* x, int64_t n, float scale, Softmax state) {
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t m = std::min(kChunk, n - i);
    Chunk chunk = sum_chunk(x + i, m, state.reference, scale);
    if (chunk.top > state.reference + kJump / scale) {
      state.sum *= std::exp2((static_cast<double>(state.reference) - chunk.top) * scale);
      state.reference = chunk.top;
      chunk = sum_chunk(x + i, m, state.reference, scale);
    }
    state.sum += chunk.sum;
  }
  return state;
}

float log2_scale(double temperature) { return static_cast<float>(1.4426950408889634 / temperature); }

double log_sum(const Softmax& state, double temperature) {
  const bool whole = state.sum > 0 && state.sum <= std::numeric_limits<double>::max();
  return whole ? state.reference / temperature + std::log(state.sum) : std::numeric_limits<double>::quiet_NaN();
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
  bool stream;
};

template <class S>
void measure_row(const Job<S>& job, int64_t t, const Softmax& state) {
  const Objective& rule = *job.objective;
  const S* x = job.logits.data + t * job.logits.stride;
  const double lse = job.lse[t] = log_sum(state, job.temperature), weight = rule.row_weight[t * rule.row_weight_stride];
  double total = 0;
  for (int64_t e = job.entries.begin[t]; e < job.entries.end[t]; ++e) {
    const double logp = load1(x + job.entries.token_ids[e]) / job.temperature - lse;
    const Term found = term(logp, rule.policy_logp[e], rule.advantage[e], rule);
    total -= weight * found.value;
    job.coefficients[e] = -weight * found.slope;
  }
  job.row_loss[t] = total;
}

template <class S>
PRMFAST_INLINE void write_chunk(const S* x, int64_t n, float reference, float scale, float factor, S* out) {
  const Wide shift = broadcast16(reference), slope = broadcast16(scale), by = broadcast16(factor);
  const auto grad = [&](Pair v) __attribute__((always_inline)) {
    const Power a = exp2_parts((v.a - shift) * slope), b = exp2_parts((v.b - shift) * slope);
    return Pair{a.mantissa * (a.scale * by), b.mantissa * (b.scale * by)};
  };
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) store_pair(out + i, grad(load_pair(x + i)));
  if (i < n) store_some(out + i, grad(load_some(x + i, n - i, minus_infinity(S{}))), n - i);
}

template <class S>
void zero_row(const Job<S>& job, int64_t t) {
  S* out = job.out.data + t * job.out.stride;
  if (job.stream)
    stream_zeros(out, job.out.columns * sizeof(S));
  else
    std::memset(static_cast<void*>(out), 0, job.out.columns * sizeof(S));
}

// Elements before the first cache line that begins in p.
template <class S>
int64_t to_line(const S* p) {
  return (kLine - reinterpret_cast<uintptr_t>(p) % kLine) % kLine / sizeof(S);
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
  int64_t next = std::lower_bound(ids + begin, ids + end, job.first) - ids;
  const int64_t last = std::lower_bound(ids + next, ids + end, job.first + n) - ids;
  const int64_t base = next;
  fixed.resize(last - base);
  for (int64_t e = base; e < last; ++e) {
    const double p = std::exp(load1(x + (ids[e] - job.first)) / temperature - lse);
    fixed[e - base] = (job.coefficients[e] - total * p) / temperature;
  }
  // lse in float32 would cost digits: what its rounding loses goes into the factor.
  const float reference = static_cast<float>(lse * temperature), scale = log2_scale(temperature);
  const float factor = static_cast<float>(-total / temperature * std::exp(reference / temperature - lse));
  alignas(kLine) S staged[kChunk];
  for (int64_t i = 0; i < n;) {
    const int64_t head = job.stream ? to_line(out + i) : 0, m = std::min(head > 0 ? head : kChunk, n - i);
    S* to = job.stream ? staged : out + i;
    write_chunk(x + i, m, reference, scale, factor, to);
    for (; next < last && ids[next] < job.first + i + m; ++next) store_one(to + (ids[next] - job.first - i), fixed[next - base]);
    if (job.stream) stream_bytes(out + i, staged, m * sizeof(S));
    i += m;
  }
}

template <class S>
PRMFAST_INLINE void some_rows(const Job<S>& job, int64_t begin, int64_t end) {
  const FlushDenormals flush(Flush::results);  // of inputs not: a float16 subnormal is widened through a float32 one
  const float scale = log2_scale(job.temperature);
  std::vector<double> fixed;
  for (int64_t t = begin; t < end; ++t) {
    const bool empty = job.entries.begin[t] == job.entries.end[t];
    if (job.objective != nullptr) {
      if (empty)
        job.lse[t] = job.row_loss[t] = 0;
      else
        measure_row(job, t, absorb(job.logits.data + t * job.logits.stride, job.logits.columns, scale, {kNoReference, 0}));
    }
    if (job.out.data == nullptr || !(std::abs(job.lse[t]) <= std::numeric_limits<double>::max())) continue;
    if (empty)
      zero_row(job, t);
    else
      gradient_row(job, t, fixed);
  }
  if (job.stream) stream_end();
}

PRMFAST_MULTIVERSION void run(const Job<float>& job, int64_t begin, int64_t end) { some_rows(job, begin, end); }
PRMFAST_MULTIVERSION void run(const Job<BFloat16>& job, int64_t begin, int64_t end) { some_rows(job, begin, end); }
PRMFAST_MULTIVERSION void run(const Job<Float16>& job, int64_t begin, int64_t end) { some_rows(job, begin, end); }

template <class S>
void run_all(const Job<S>& job, int threads) {
  threads = thread_count(job.logits.rows, job.logits.columns * kWorkPerLogit, threads);
  parallel_rows(job.logits.rows, threads, [&](int, int64_t begin, int64_t end) { run(job, begin, end); });
}

template <class S>
bool worth_streaming(const Rows<const S>& logits, const Rows<S>& out) {
  return out.data != logits.data && out.rows * out.columns * static_cast<int64_t>(sizeof(S)) >= kStreamFrom;
}

PRMFAST_MULTIVERSION void absorb_rows(const Rows<const float>& block, float scale, float* reference, double* sum, int64_t begin,
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
  const Job<S> job{logits,   entries,          &objective, lse, coefficients, row_loss.data(), objective.temperature,
                   out,      0,                out.data != nullptr && worth_streaming(logits, out)};
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
                 0, worth_streaming(logits, out)},
          threads);
}

void absorb_block(const Rows<const float>& block, int64_t first, const Entries& entries, double temperature, float* reference,
                  double* sum, float* entry_logits, int threads) {
  const float scale = log2_scale(temperature);
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

void differentiate_block(const Rows<float>& block, int64_t first, const Entries& entries, const double* lse,
                         const double* coefficients, double temperature, int threads) {
  const Rows<const float> logits{block.data, block.rows, block.columns, block.stride};
  run_all(Job<float>{logits, entries, nullptr, const_cast<double*>(lse), const_cast<double*>(coefficients), nullptr, temperature,
                     block, first, false},
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
