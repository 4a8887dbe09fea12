#include "candidate_td/candidate_td.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "candidate_td/dispatch.h"
#include "common/flush_denormals.h"
#include "common/parallel_for.h"
#include "common/sweep.h"

namespace prmfast::candidate_td {
namespace {

constexpr double kSlack = 1e-4;     // in powers of two, of the running threshold; the final rule is exact

// Slots that the current sum rules out leave.
void refilter(Row* row) {
  const auto gone = [row](const Slot& slot) { return !(slot.policy >= row->threshold); };
  row->slots.erase(std::remove_if(row->slots.begin(), row->slots.end(), gone), row->slots.end());
}

struct Scales {
  double policy, reward, log2_p_min;
};

Scales scales_of(const Options& options) {
  return {kLog2e / options.policy_temperature, kLog2e / options.reward_temperature, std::log2(options.p_min)};
}

// The next n <= kChunk columns, of which the first is `column`.
template <class P, class R>
void add_chunk(const P* policy, const R* reward, int64_t n, int64_t column, const Scales& scales, Row* row) {
  const double top = row->policy.add(policy, n, scales.policy);
  row->reward.add(reward, n, scales.reward);
  if (row->sampled.id >= column && row->sampled.id < column + n) {
    row->sampled.policy = widen1(policy + (row->sampled.id - column));
    row->sampled.reward = widen1(reward + (row->sampled.id - column));
  }
  if (!(top >= row->threshold) || !row->policy.started()) return;
  row->threshold = std::max(row->threshold, row->policy.logit_of(scales.log2_p_min - kSlack, scales.policy));
  if (!(top >= row->threshold)) return;
  int32_t found[kChunk];
  Real<P> lowest = static_cast<Real<P>>(row->threshold);
  if (lowest > row->threshold) lowest = std::nextafter(lowest, -std::numeric_limits<Real<P>>::infinity());
  const int64_t count = reach(policy, n, lowest, found);
  // What passes now adds up to a probability of at most 1, so the row never holds more than twice 1 / p_min.
  refilter(row);
  for (int64_t i = 0; i < count; ++i)
    row->slots.push_back({column + found[i], static_cast<double>(widen1(policy + found[i])), static_cast<double>(widen1(reward + found[i]))});
}

template <class P, class R>
void add_columns(const P* policy, const R* reward, int64_t columns, int64_t first_column, const Scales& scales, Row* row) {
  for (int64_t c = 0; c < columns; c += kChunk)
    add_chunk(policy + c, reward + c, std::min(kChunk, columns - c), first_column + c, scales, row);
}

void emit(const Slot& slot, const Row& row, const Scales& scales, double beta, Part* part) {
  const double p = row.policy.log2_p(slot.policy, scales.policy), q = row.reward.log2_p(slot.reward, scales.reward);
  part->ids.push_back(slot.id);
  part->logp.push_back(std::min(0.0, p * kLn2));
  part->advantage.push_back(p == q ? 0.0 : beta * kLn2 * (std::min(0.0, q) - std::min(0.0, p)));
}

void finish_row(const Row& row, int64_t index, const Scales& scales, double beta, Part* part) {
  if (part->invalid.row >= 0) return;
  if (row.policy.fault() != Fault::none) part->invalid = {index, true, row.policy.fault()};
  else if (row.reward.fault() != Fault::none) part->invalid = {index, false, row.reward.fault()};
  if (part->invalid.row >= 0) return;
  const size_t before = part->ids.size();
  bool forced = row.sampled.id >= 0;
  const double lowest = scales.log2_p_min - kTouch * kLog2e;
  for (const Slot& slot : row.slots) {
    if (!(row.policy.log2_p(slot.policy, scales.policy) >= lowest) && slot.id != row.sampled.id) continue;
    if (forced && row.sampled.id < slot.id) emit(row.sampled, row, scales, beta, part);
    forced = forced && row.sampled.id > slot.id;
    emit(slot, row, scales, beta, part);
  }
  if (forced) emit(row.sampled, row, scales, beta, part);
  part->counts.push_back(static_cast<int64_t>(part->ids.size() - before));
}

}  // namespace

Invalid Result::invalid() const {
  for (const Part& part : parts_)
    if (part.invalid.row >= 0) return part.invalid;
  return {};
}

int64_t Result::entries() const {
  int64_t total = 0;
  for (const Part& part : parts_) total += static_cast<int64_t>(part.ids.size());
  return total;
}

template <class Out>
void Result::write(int64_t* offsets, int64_t* ids, Out* logp, Out* advantage) const {
  int64_t entry = 0;
  *offsets++ = 0;
  for (const Part& part : parts_) {
    std::copy(part.ids.begin(), part.ids.end(), ids + entry);
    for (size_t i = 0; i < part.ids.size(); ++i) {
      logp[entry + i] = static_cast<Out>(part.logp[i]);
      advantage[entry + i] = static_cast<Out>(part.advantage[i]);
    }
    for (int64_t count : part.counts) *offsets++ = entry += count;
  }
}

template void Result::write<float>(int64_t*, int64_t*, float*, float*) const;
template void Result::write<double>(int64_t*, int64_t*, double*, double*) const;

Result run(const Logits& policy, const Logits& reward, int64_t rows, int64_t columns, const Options& options, const int64_t* sampled,
           int threads) {
  const Scales scales = scales_of(options);
  const int used = thread_count(rows, 2 * kWorkPerLogit * columns, threads);
  std::vector<Part> parts(std::max(used, 1));
  parallel_rows(rows, used, [&](int thread, int64_t first, int64_t end) {
    const FlushDenormals flush(Flush::results);  // of exponentials; inputs stay: widening a small float16 passes through a denormal
    Part& part = parts[thread];
    Row row;
    for (int64_t t = first; t < end && part.invalid.row < 0; ++t) {
      std::vector<Slot> slots = std::move(row.slots);
      slots.clear();
      row = Row{};
      row.slots = std::move(slots);
      if (sampled != nullptr) row.sampled.id = sampled[t];
      with_rows(policy, reward, t, [&](auto* p, auto* r) { add_columns(p, r, columns, 0, scales, &row); });
      finish_row(row, t, scales, options.beta, &part);
    }
  });
  return Result(std::move(parts));
}

Rows::Rows(int64_t rows, const Options& options, const int64_t* sampled) : rows_(rows), options_(options) {
  for (int64_t t = 0; t < rows && sampled != nullptr; ++t) rows_[t].sampled.id = sampled[t];
}

void Rows::add(const Logits& policy, const Logits& reward, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
               int threads) {
  const Scales scales = scales_of(options_);
  parallel_rows(rows, thread_count(rows, 2 * kWorkPerLogit * columns, threads), [&](int, int64_t first, int64_t end) {
    const FlushDenormals flush(Flush::results);
    for (int64_t t = first; t < end; ++t)
      with_rows(policy, reward, t,
                [&](auto* p, auto* r) { add_columns(p, r, columns, first_column, scales, &rows_[first_row + t]); });
  });
}

Result Rows::finish() const {
  const Scales scales = scales_of(options_);
  std::vector<Part> parts(1);
  for (size_t t = 0; t < rows_.size(); ++t) finish_row(rows_[t], static_cast<int64_t>(t), scales, options_.beta, &parts[0]);
  return Result(std::move(parts));
}

}  // namespace prmfast::candidate_td
