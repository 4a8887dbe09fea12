#include "candidate_td/candidate_td_cuda.h"

#include <cmath>
#include <type_traits>

#include "common/cuda/measure.cuh"

namespace prmfast::candidate_td::cuda {

using namespace prmfast::cuda;

constexpr double kTouch = 1e-5;  // log p >= log p_min - kTouch counts as p >= p_min
constexpr int kFindThreads = 128, kCompactThreads = 256;

// A side of the softmax once its segments are measured.
struct Measured {
  Logits logits;
  const State* states;  // [rows, segments]
  double scale;
};

struct Rule {
  double lowest_log2_p, beta;
};

__device__ inline float logit(const Logits& x, int64_t row, int64_t column) {
  const int64_t at = row * x.stride + column;
  switch (x.dtype) {
    case Dtype::float32: return static_cast<const float*>(x.data)[at];
    case Dtype::bfloat16: return widen(static_cast<const __nv_bfloat16*>(x.data)[at]);
    default: return widen(static_cast<const __half*>(x.data)[at]);
  }
}

// The slots of a row while a warp fills them: lane i holds slot i.
struct Slots {
  int count = 0, id = -1;
  float logit = 0;

  __device__ void add(int new_id, float new_logit) {
    if (lane_id() == count) {
      id = new_id;
      logit = new_logit;
    }
    count += count < kSlots;
  }
};

// Every logit of the row's segments whose maximum reaches `lowest` is looked at again; about as many segments as candidates.
template <class S>
__device__ void search(const Measured& policy, int64_t row, int64_t columns, float lowest, const RowSum& sum, double log2_sum,
                       const Rule& rule, Slots* slots) {
  const int64_t segments = segments_of(columns);
  const S* x = static_cast<const S*>(policy.logits.data) + row * policy.logits.stride;
  for (int64_t base = 0; base < segments; base += 32) {
    const int64_t mine = base + lane_id();
    unsigned left = __ballot_sync(kAllLanes, mine < segments && policy.states[row * segments + mine].top >= lowest);
    for (; left != 0; left &= left - 1) {
      const int64_t first = (base + __ffs(static_cast<int>(left)) - 1) * kSegment;
      Segment<S> segment;
      segment.template load<true>(x + first, columns - first);
      uint64_t hits = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) hits |= static_cast<uint64_t>(segment.value(j) >= lowest) << j;
      for (unsigned lanes = __ballot_sync(kAllLanes, hits != 0); lanes != 0; lanes = __ballot_sync(kAllLanes, hits != 0)) {
        const int from = __ffs(static_cast<int>(lanes)) - 1;
        const int j = hits == 0 ? 0 : __ffsll(static_cast<long long>(hits)) - 1;
        const int own = Segment<S>::offset(j / Segment<S>::kPerVector, lane_id()) + j % Segment<S>::kPerVector;
        const int offset = __shfl_sync(kAllLanes, own, from);
        if (lane_id() == from) hits &= hits - 1;
        const float value = widen(x[first + offset]);
        if (sum.log2_p(value, policy.scale, log2_sum) >= rule.lowest_log2_p) slots->add(static_cast<int>(first + offset), value);
      }
    }
  }
}

// A warp per row: both sums, the candidates, their advantages.
template <class S>
__global__ void __launch_bounds__(kFindThreads)
    find(Measured policy, Measured reward, Shape shape, Rule rule, const int64_t* sampled, Padded out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kFindThreads / 32) + warp_id();
  if (row >= shape.rows) return;
  const int64_t segments = segments_of(shape.columns);
  const auto sum_of = [&](const Measured& side) {
    return merge(segments, side.scale, [&](int64_t s) { return side.states[row * segments + s]; });
  };
  const RowSum p = sum_of(policy), q = sum_of(reward);
  const int lane = lane_id();
  if (!p.valid() || !q.valid()) {
    if (lane == 0) out.counts[row] = p.valid() ? -2 : -1;
    return;
  }
  const double log2_p = log2(p.sum), log2_q = log2(q.sum);
  // The slack covers the rounding of this line; -inf is never a candidate by its probability.
  const double lowest = static_cast<double>(p.top) + (rule.lowest_log2_p - 1e-6 + log2_p) / policy.scale;
  Slots slots;
  search<S>(policy, row, shape.columns, fmaxf(__double2float_rd(lowest), -FLT_MAX), p, log2_p, rule, &slots);
  if (sampled != nullptr) {
    const int id = static_cast<int>(sampled[row]);
    if (__ballot_sync(kAllLanes, lane < slots.count && slots.id == id) == 0) slots.add(id, logit(policy.logits, row, id));
  }
  int place = 0;  // of the lane's slot among all by id
  for (int i = 0; i < slots.count; ++i) place += __shfl_sync(kAllLanes, slots.id, i) < slots.id;
  if (lane == 0) out.counts[row] = slots.count;
  if (lane >= kSlots) return;
  const bool taken = lane < slots.count;
  const int64_t at = row * kSlots + (taken ? place : lane);
  double logp = -INFINITY, advantage = 0;
  if (taken) {
    logp = fmin(0.0, p.log2_p(slots.logit, policy.scale, log2_p) * kLn2);
    const double logq = fmin(0.0, q.log2_p(logit(reward.logits, row, slots.id), reward.scale, log2_q) * kLn2);
    advantage = logp == logq ? 0.0 : rule.beta * (logq - logp);
  }
  out.ids[at] = taken ? slots.id : -1;
  out.policy_logp[at] = static_cast<float>(logp);
  out.advantage[at] = static_cast<float>(advantage);
}

__global__ void __launch_bounds__(kCompactThreads)
    pack(Padded padded, int64_t rows, const int64_t* offsets, int64_t* ids, float* policy_logp, float* advantage) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCompactThreads + threadIdx.x, row = i / kSlots;
  if (row >= rows || i % kSlots >= padded.counts[row]) return;
  const int64_t to = offsets[row] + i % kSlots;
  ids[to] = padded.ids[i];
  policy_logp[to] = padded.policy_logp[i];
  advantage[to] = padded.advantage[i];
}

// A warp per row: the sum, and the token's log-probability.
__global__ void __launch_bounds__(kFindThreads) token(Measured side, Shape shape, const int64_t* ids, float* logp, double2* norm) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kFindThreads / 32) + warp_id();
  if (row >= shape.rows) return;
  const int64_t segments = segments_of(shape.columns);
  const RowSum sum = merge(segments, side.scale, [&](int64_t s) { return side.states[row * segments + s]; });
  if (lane_id() != 0) return;
  const double log2_sum = log2(sum.sum);
  logp[row] = static_cast<float>(fmin(0.0, sum.log2_p(logit(side.logits, row, ids[row]), side.scale, log2_sum) * kLn2));
  norm[row] = make_double2(sum.top, sum.valid() ? log2_sum * kLn2 : NAN);
}

template <class S>
__global__ void __launch_bounds__(kMeasureThreads)
    token_slopes(const S* logits, int64_t stride, Shape shape, double temperature, const int64_t* ids, const double2* norm,
                 const double* grad, S* out) {
  const Unit unit = unit_of(shape.rows, shape.columns);
  if (unit.row >= shape.rows) return;
  const double weight = grad[unit.row];
  Segment<S> segment;
  S* to = out + unit.row * shape.columns + unit.first;
  const int64_t left = shape.columns - unit.first;
  const S* x = logits + unit.row * stride;
  const double2 known = norm[unit.row];
  const auto factor = static_cast<float>(-weight / temperature * exp(-known.y));
  if (weight == 0) {
    segment.zero();
  } else {
    segment.template load<false>(x + unit.first, left);
    segment.become_slopes(static_cast<float>(kLog2e / temperature), static_cast<float>(known.x), factor);
  }
  segment.store(to, left);
  const int64_t id = ids[unit.row] - unit.first;
  __syncwarp();  // behind the vector that holds the token's element
  if (lane_id() != 0 || id < 0 || id >= kSegment || weight == 0) return;
  const double p = exp(fmin(0.0, (static_cast<double>(widen(x[unit.first + id])) - known.x) / temperature - known.y));
  narrow(static_cast<float>(weight * (1 - p) / temperature), to + id);
}

namespace {

cudaStream_t at(void* stream) { return static_cast<cudaStream_t>(stream); }

template <class F>
void with_type(const Logits& logits, const F& run) {
  switch (logits.dtype) {
    case Dtype::float32: return run(static_cast<const float*>(logits.data));
    case Dtype::bfloat16: return run(static_cast<const __nv_bfloat16*>(logits.data));
    case Dtype::float16: return run(static_cast<const __half*>(logits.data));
  }
}

Measured measured(const Logits& logits, Shape shape, double temperature, void* workspace, void* stream) {
  auto* states = static_cast<State*>(workspace);
  const double scale = kLog2e / temperature;
  with_type(logits, [&](auto* x) { measure_rows(x, logits.stride, shape.rows, shape.columns, scale, states, at(stream)); });
  return {logits, states, scale};
}

Launch warp_a_row(int64_t rows, void* stream) {
  constexpr int kRows = kFindThreads / 32;
  return {static_cast<unsigned>((rows + kRows - 1) / kRows), kFindThreads, 0, 1, at(stream)};
}

}  // namespace

int64_t workspace_bytes(Shape shape) { return shape.rows * segments_of(shape.columns) * static_cast<int64_t>(sizeof(State)); }

void candidates(const Logits& policy, const Logits& reward, Shape shape, const Options& options, const int64_t* sampled,
                void* workspace, const Padded& out, void* stream) {
  if (shape.rows == 0) return;
  const Measured p = measured(policy, shape, options.policy_temperature, workspace, stream);
  void* second = static_cast<char*>(workspace) + workspace_bytes(shape);
  const Measured q = measured(reward, shape, options.reward_temperature, second, stream);
  const Rule rule{std::log2(options.p_min) - kTouch * kLog2e, options.beta};
  with_type(policy, [&](auto* x) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    launch(find<S>, warp_a_row(shape.rows, stream), p, q, shape, rule, sampled, out);
  });
}

void compact(const Padded& padded, int64_t rows, const int64_t* offsets, int64_t* ids, float* policy_logp, float* advantage,
             void* stream) {
  if (rows == 0) return;
  const int64_t blocks = (rows * kSlots + kCompactThreads - 1) / kCompactThreads;
  const Launch how{static_cast<unsigned>(blocks), kCompactThreads, 0, 1, at(stream)};
  launch(pack, how, padded, rows, offsets, ids, policy_logp, advantage);
}

void token_logprob(const Logits& logits, Shape shape, double temperature, const int64_t* ids, void* workspace, float* logp,
                   double* norm, void* stream) {
  if (shape.rows == 0) return;
  const Measured side = measured(logits, shape, temperature, workspace, stream);
  launch(token, warp_a_row(shape.rows, stream), side, shape, ids, logp, reinterpret_cast<double2*>(norm));
}

void token_logprob_backward(const Logits& logits, Shape shape, double temperature, const int64_t* ids, const double* norm,
                            const double* grad, void* out, void* stream) {
  if (shape.rows == 0) return;
  with_type(logits, [&](auto* x) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    launch(token_slopes<S>, warp_a_segment(shape.rows, shape.columns, at(stream)), x, logits.stride, shape, temperature, ids,
           reinterpret_cast<const double2*>(norm), grad, static_cast<S*>(out));
  });
}

}  // namespace prmfast::candidate_td::cuda
