#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/flush_denormals.h"
#include "common/log_sum.h"
#include "common/parallel_for.h"
#include "common/sweep.h"
#include "dist_ppo/dist_ppo.h"

namespace prmfast::dist_ppo {
namespace {

constexpr int64_t kWorkPerLogit = 5;  // for thread_count: its unit is a scalar operation, of which a vector does many

// Candidates of one row by increasing id; those of a block of columns are a part of them.
struct Span {
  const int64_t *begin, *end;
};
Span within(const Span& all, int64_t first, int64_t columns) {
  const int64_t* begin = std::lower_bound(all.begin, all.end, first);
  return {begin, std::lower_bound(begin, all.end, first + columns)};
}

// Takes in the logits of columns first .. first + n that are no candidates. Candidates, which hold most of the probability, are
// added in float64 by whoever finishes the sum: what is left of 1 - p beside a certain one then keeps its digits.
template <class S>
void absorb(const S* x, int64_t n, int64_t first, Span candidates, double scale, LogSum* others) {
  S held[LogSum::kChunk];
  for (int64_t c = 0; c < n; c += LogSum::kChunk) {
    const int64_t m = std::min(LogSum::kChunk, n - c);
    const S* chunk = x + c;
    if (candidates.begin != candidates.end && *candidates.begin < first + c + m) {
      std::copy_n(chunk, m, held);
      for (; candidates.begin != candidates.end && *candidates.begin < first + c + m; ++candidates.begin)
        held[*candidates.begin - first - c] = negative_infinity(S{});
      chunk = held;
    }
    others->add(chunk, m, scale);
  }
}

// Natural log-sum-exp of the others and of the candidates, whose logits `logit(i)` gives; NaN where one of them is NaN or +inf.
template <class Logit>
double log_sum_exp(double reference, double sum, int64_t count, double scale, const Logit& logit) {
  const double rest = sum == 0 ? -std::numeric_limits<double>::infinity() : reference * scale + std::log2(sum);
  double top = rest, total = 0;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, logit(i) * scale);
  if (top == -std::numeric_limits<double>::infinity()) return top;
  for (int64_t i = 0; i < count; ++i) total += std::exp2(logit(i) * scale - top);
  return (top + std::log2(total + std::exp2(rest - top))) * kLn2;
}

// Such that a lone token has a probability of exactly 1.
double log_p(double logit, double scale, double lse) { return logit * scale * kLn2 - lse; }

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
void measure_row(const Job<S>& job, int64_t t) {
  const Objective& rule = *job.objective;
  const double scale = kLog2e / job.temperature;
  const S* x = job.logits.data + t * job.logits.stride;
  const int64_t begin = job.entries.begin[t], end = job.entries.end[t];
  const int64_t* ids = job.entries.token_ids;
  LogSum others;
  absorb(x, job.logits.columns, 0, {ids + begin, ids + end}, scale, &others);
  const double lse = job.lse[t] = log_sum_exp(others.reference(), others.sum(),
                                              end - begin, scale, [&](int64_t i) { return widen1(x + ids[begin + i]); });
  const double weight = rule.row_weight[t * rule.row_weight_stride];
  double total = 0;
  for (int64_t e = begin; e < end; ++e) {
    const Term found = term(log_p(widen1(x + ids[e]), scale, lse), rule.policy_logp[e], rule.advantage[e], rule);
    total -= weight * found.value;
    job.coefficients[e] = -weight * found.slope;
  }
  job.row_loss[t] = total;
}

// out = sum_c g_c (1[v = c] - pi_theta(v)) / temperature. Entries' values are made before anything is written: out may be x.
template <class S>
void gradient_row(const Job<S>& job, int64_t t, std::vector<double>& fixed) {
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
  if (!moves) {
    std::memset(static_cast<void*>(out), 0, n * sizeof(S));
    return;
  }
  const double lse = job.lse[t], temperature = job.temperature, scale = kLog2e / temperature;
  const Span inside = within({ids + begin, ids + end}, job.first, n);
  fixed.clear();
  for (const int64_t* id = inside.begin; id != inside.end; ++id)
    fixed.push_back((job.coefficients[id - ids] - total * std::exp(log_p(widen1(x + (*id - job.first)), scale, lse))) / temperature);
  const auto certain = static_cast<float>(lse * temperature);  // the logit of a probability of 1
  slopes(x, n, static_cast<float>(scale), certain, -total / temperature * std::exp(log_p(certain, scale, lse)), out);
  for (const int64_t* id = inside.begin; id != inside.end; ++id) store1(out + (*id - job.first), fixed[id - inside.begin]);
}

template <class S>
void some_rows(const Job<S>& job, int64_t begin, int64_t end) {
  const FlushDenormals flush(Flush::results);  // of inputs not: a float16 subnormal is widened through a float32 one
  std::vector<double> fixed;
  for (int64_t t = begin; t < end; ++t) {
    const bool empty = job.entries.begin[t] == job.entries.end[t];
    if (job.objective != nullptr) {
      if (empty)
        job.lse[t] = job.row_loss[t] = 0;
      else
        measure_row(job, t);
    }
    if (job.out.data != nullptr && std::abs(job.lse[t]) <= std::numeric_limits<double>::max()) gradient_row(job, t, fixed);
  }
}

template <class S>
void run_all(const Job<S>& job, int threads) {
  threads = thread_count(job.logits.rows, job.logits.columns * kWorkPerLogit, threads);
  parallel_rows(job.logits.rows, threads, [&](int, int64_t begin, int64_t end) { some_rows(job, begin, end); });
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

void absorb_block(const Rows<const float>& block, int64_t first, const Entries& entries, double temperature, double* reference,
                  double* sum, float* entry_logits, int threads) {
  const double scale = kLog2e / temperature;
  threads = thread_count(block.rows, block.columns * kWorkPerLogit, threads);
  parallel_rows(block.rows, threads, [&](int, int64_t begin, int64_t end) {
    const FlushDenormals flush(Flush::results);
    const int64_t* ids = entries.token_ids;
    for (int64_t t = begin; t < end; ++t) {
      const float* x = block.data + t * block.stride;
      const Span inside = within({ids + entries.begin[t], ids + entries.end[t]}, first, block.columns);
      for (const int64_t* id = inside.begin; id != inside.end; ++id) entry_logits[id - ids] = x[*id - first];
      LogSum others(reference[t], sum[t]);
      absorb(x, block.columns, first, inside, scale, &others);
      reference[t] = others.reference();
      sum[t] = others.sum();
    }
  });
}

void finish_blocks(const double* reference, const double* sum, int64_t rows, const Entries& entries, const float* entry_logits,
                   double temperature, double* lse) {
  for (int64_t t = 0; t < rows; ++t)
    lse[t] = log_sum_exp(reference[t], sum[t], entries.end[t] - entries.begin[t], kLog2e / temperature,
                         [&](int64_t i) { return entry_logits[entries.begin[t] + i]; });
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
