#include "dist_ppo/dist_ppo_cuda.h"

#include <algorithm>
#include <cmath>

#include "common/cuda/cluster.cuh"
#include "dist_ppo/settle.cuh"

namespace prmfast::dist_ppo::cuda {

constexpr int kSettleThreads = 128, kFusedThreads = 256, kFusedWarps = kFusedThreads / 32;

template <class S>
struct View {
  S* data;
  int64_t stride;

  __device__ S* row(int64_t t) const { return data + t * stride; }
};

struct Problem {
  Shape shape;
  Entries entries;
  Objective objective;

  __device__ Span span(int64_t row) const { return {entries.offsets[row], entries.offsets[row + 1]}; }
  __device__ double weight(int64_t row) const { return objective.row_weight[row * objective.row_weight_stride]; }
};

// A warp per segment of every row that has entries. The entries themselves are left out and added to the sum in float64: what is
// left of 1 - p beside a certain one then keeps its digits.
template <class S>
__global__ void __launch_bounds__(kMeasureThreads)
    measure_others(View<const S> logits, Shape shape, Entries entries, float scale, State* states) {
  const Unit unit = unit_of(shape.rows, shape.columns);
  if (unit.row >= shape.rows) return;
  const Span row{entries.offsets[unit.row], entries.offsets[unit.row + 1]};
  if (row.begin == row.end) return;
  Segment<S> segment;
  segment.template load<false>(logits.row(unit.row) + unit.first, shape.columns - unit.first);
  segment.exclude(elements_within<S>(entries.token_ids, row, unit.first));
  const State state = state_of(segment, scale);
  if (lane_id() == 0) states[unit.row * segments_of(shape.columns) + unit.segment] = state;
}

// A warp per row: log-sum-exp, loss and coefficients.
template <class S>
__global__ void __launch_bounds__(kSettleThreads)
    settle_rows(View<const S> logits, Problem problem, const State* states, double* row_loss, double* lse, double* coefficients) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kSettleThreads / 32) + warp_id();
  if (row >= problem.shape.rows) return;
  const Span span = problem.span(row);
  Settled settled{0, 0};
  if (span.begin != span.end) {
    const int64_t segments = segments_of(problem.shape.columns);
    const double scale = kLog2e / problem.objective.temperature;
    const RowSum others = merge(segments, scale, [&](int64_t s) { return states[row * segments + s]; });
    const S* x = logits.row(row);
    settled = settle(
        others, span, problem.weight(row), problem.objective, [&](int64_t e) { return widen(x[problem.entries.token_ids[e]]); },
        [&](int64_t e, double coefficient) { coefficients[e] = coefficient; });
  }
  if (lane_id() != 0) return;
  row_loss[row] = settled.loss;
  lse[row] = settled.lse;
}

// A warp per segment.
template <class S>
__global__ void __launch_bounds__(kMeasureThreads)
    differentiate(View<const S> logits, Shape shape, Entries entries, const double* lse, const double* coefficients,
                  double temperature, View<S> out) {
  const Unit unit = unit_of(shape.rows, shape.columns);
  if (unit.row >= shape.rows) return;
  const Span row{entries.offsets[unit.row], entries.offsets[unit.row + 1]};
  const Pull pull = pull_of(row, [&](int64_t e) { return coefficients[e]; });
  const double norm = lse[unit.row];
  if (!isfinite(norm)) return;
  const S* x = logits.row(unit.row);
  S* to = out.row(unit.row);
  const int64_t left = shape.columns - unit.first;
  const Slopes slopes = slopes_of(pull.total, norm, temperature);
  Segment<S> segment;
  if (pull.moves) {
    segment.template load<false>(x + unit.first, left);
    segment.become_slopes(slopes.scale, slopes.certain, slopes.factor);
  } else {
    segment.zero();
  }
  segment.store(to + unit.first, left);
  __syncwarp();  // entries come behind the vectors that hold them
  const Span inside = pull.moves ? within(entries.token_ids, row, unit.first) : Span{0, 0};
  for (int64_t e = inside.begin + lane_id(); e < inside.end; e += 32) {
    const int64_t id = entries.token_ids[e];
    narrow(static_cast<float>(entry_slope(coefficients[e], pull.total, widen(x[id]), norm, temperature)), to + id);
  }
}

// --- loss and gradient in one launch: a block or a cluster of blocks holds the row in shared memory

// Shared memory of a block: what all of its warps know, a state per segment of its own, then the segments that it keeps.
struct Message {
  Slopes slopes;
  bool finite, moves;  // of the log-sum-exp; of a coefficient
};

__host__ __device__ inline int64_t segments_at(int64_t share) {
  return (static_cast<int64_t>(sizeof(Message)) + share * static_cast<int64_t>(sizeof(State)) + 15) / 16 * 16;
}

// Segments first .. first + count of a row's are block `rank`'s.
struct Share {
  int64_t segments;
  unsigned blocks;

  __device__ int64_t first(unsigned rank) const { return segments * rank / blocks; }
  __device__ unsigned owner(int64_t segment) const { return static_cast<unsigned>(((segment + 1) * blocks - 1) / segments); }
};

// Waits until `pending` of the warp's copies are in flight at the most.
__device__ inline void wait_for_copies(int pending) {
  switch (pending) {
    case 0: return copy_async_wait<0>();
    case 1: return copy_async_wait<1>();
    case 2: return copy_async_wait<2>();
    default: return copy_async_wait<3>();
  }
}

// What a warp has of the row: segments first + warp, first + warp + kFusedWarps, ... of its block.
template <class S>
struct Own {
  const S* x;
  S* shared;  // of the block
  int64_t columns;
  int first, count, kept;  // segments

  __device__ int64_t column(int i) const { return static_cast<int64_t>(first + i) * kSegment; }
  // Whether segment i comes to shared memory by itself.
  __device__ bool copied(int i) const { return i < kept && aligned16(x) && column(i) + kSegment <= columns; }
};

// States of the warp's segments; those that are kept are in shared memory afterwards.
template <class S>
__device__ void measure_own(const Own<S>& own, const int64_t* ids, Span row, float scale, State* states) {
  int pending = 0;
  for (int i = warp_id(); i < own.count; i += kFusedWarps) {
    if (!own.copied(i)) continue;
    Segment<S>::copy_async(own.shared + i * kSegment, own.x + own.column(i));
    ++pending;
  }
  for (int i = warp_id(); i < own.count; i += kFusedWarps) {
    const uint64_t entries = elements_within<S>(ids, row, own.column(i));  // while the segment is on its way
    Segment<S> segment;
    if (own.copied(i)) {
      wait_for_copies(--pending);
      segment.load_shared(own.shared + i * kSegment);
    } else {
      segment.template load<true>(own.x + own.column(i), own.columns - own.column(i));
      if (i < own.kept) segment.store_shared(own.shared + i * kSegment);
    }
    segment.exclude(entries);
    const State state = state_of(segment, scale);
    if (lane_id() == 0) states[i] = state;
  }
}

// The warp's segments of the gradient, a part of one at a time; the entries' own values are in `settled`.
template <class S>
__device__ void write_own(const Own<S>& own, const int64_t* ids, Span row, const Message& message, const double* settled,
                          S* out) {
  constexpr int kPart = kSegment / 2;
  for (int i = warp_id(); i < own.count; i += kFusedWarps) {
    const int64_t end = min(own.column(i + 1), own.columns);
    for (int64_t column = own.column(i); column < end; column += kPart) {
      Segment<S, kPart> part;
      if (!message.moves)
        part.zero();
      else if (i < own.kept)
        part.load_shared(own.shared + (column - own.column(0)));
      else
        part.template load<true>(own.x + column, end - column);
      if (message.moves) part.become_slopes(message.slopes.scale, message.slopes.certain, message.slopes.factor);
      part.store(out + column, end - column);
    }
    __syncwarp();  // entries come behind the vectors that hold them
    const Span inside = message.moves ? within(ids, row, own.column(i)) : Span{0, 0};
    for (int64_t e = inside.begin + lane_id(); e < inside.end; e += 32) narrow(static_cast<float>(settled[e]), out + ids[e]);
  }
}

template <class S>
__global__ void __launch_bounds__(kFusedThreads, 2)
    fused(View<const S> logits, Problem problem, int kept, double* settled, double* row_loss, double* lse, View<S> out) {
  const Share share{segments_of(problem.shape.columns), cluster_blocks()};
  const unsigned rank = cluster_rank();
  const int64_t row = blockIdx.x / share.blocks;
  const int first = static_cast<int>(share.first(rank)), count = static_cast<int>(share.first(rank + 1)) - first;
  auto* message = shared_memory<Message>();
  auto* states = reinterpret_cast<State*>(message + 1);
  const S* x = logits.row(row);
  char* segments = shared_memory<char>() + segments_at((share.segments + share.blocks - 1) / share.blocks);
  const Own<S> own{x, reinterpret_cast<S*>(segments), problem.shape.columns, first, count, kept};
  const Span span = problem.span(row);
  const int64_t* ids = problem.entries.token_ids;
  const bool speaks = rank == 0 && threadIdx.x == 0;
  if (span.begin == span.end) {
    if (speaks) row_loss[row] = lse[row] = 0;
    write_own(own, ids, span, Message{{}, true, false}, settled, out.row(row));
    return;
  }
  const double temperature = problem.objective.temperature, scale = kLog2e / temperature;
  measure_own(own, ids, span, static_cast<float>(scale), states);
  cluster_barrier();
  if (warp_id() == 0) {
    const RowSum others = merge(share.segments, scale, [&](int64_t s) {
      const unsigned owner = share.owner(s);
      return *map_shared(states + (s - share.first(owner)), owner);
    });
    const auto logit = [&](int64_t e) { return widen(x[ids[e]]); };
    // Every block settles the row; what it keeps of it, a coefficient and then the entry's slope, it keeps of its own columns.
    const int64_t begin = own.column(0), end = own.column(count);
    double total = 0;
    bool moves = false;
    const auto keep = [&](int64_t e, double coefficient) {
      total += coefficient;
      moves |= coefficient != 0;
      if (ids[e] >= begin && ids[e] < end) settled[e] = coefficient;
    };
    const Settled row_settled = settle(others, span, problem.weight(row), problem.objective, logit, keep);
    total = warp_sum(total);
    moves = __any_sync(kAllLanes, moves) != 0;
    for (int64_t e = span.begin + lane_id(); e < span.end; e += 32)
      if (ids[e] >= begin && ids[e] < end) settled[e] = entry_slope(settled[e], total, logit(e), row_settled.lse, temperature);
    if (lane_id() == 0) *message = {slopes_of(total, row_settled.lse, temperature), isfinite(row_settled.lse) != 0, moves};
    if (speaks) {
      row_loss[row] = row_settled.loss;
      lse[row] = row_settled.lse;
    }
  }
  cluster_barrier();  // nobody reads states or entries' logits any more: out may be the logits
  const Message told = *message;
  if (told.finite) write_own(own, ids, span, told, settled, out.row(row));
}

namespace {

cudaStream_t at(void* stream) { return static_cast<cudaStream_t>(stream); }

template <class F>
void with_type(Dtype dtype, const F& run) {
  switch (dtype) {
    case Dtype::float32: return run(float{});
    case Dtype::bfloat16: return run(__nv_bfloat16{});
    case Dtype::float16: return run(__half{});
  }
}

template <class S>
View<const S> read(const Rows& rows) { return {static_cast<const S*>(rows.data), rows.stride}; }
template <class S>
View<S> write(const Rows& rows) { return {static_cast<S*>(rows.data), rows.stride}; }

struct Plan {
  int cluster;
  int kept;  // segments of a block's share that stay in shared memory
  size_t shared_bytes;
};

// The fewest blocks that hold a row while two of them fit on a multiprocessor, so that one row is read while another is written;
// more of them where rows are so few that multiprocessors would have nothing to do; else as much of a row as one block can hold.
// The bits of the result do not depend on it.
Plan plan_of(const Device& device, int64_t rows, int64_t segments, int64_t segment_bytes) {
  constexpr int64_t kReserved = 1024;  // of a block, by the system
  const auto all = static_cast<int64_t>(device.shared_bytes), half = (all + kReserved) / 2 - kReserved;
  const int most = device.clusters() ? 8 : 1;
  for (int cluster = 1;; cluster *= 2) {
    const int64_t share = (segments + cluster - 1) / cluster, states = segments_at(share);
    const bool last = 2 * cluster > most || 2 * cluster > segments, busy = rows * cluster >= device.multiprocessors;
    if (!last && !(busy && states + share * segment_bytes <= half)) continue;
    const int64_t kept = std::min(share, (all - states) / segment_bytes);
    return {cluster, static_cast<int>(kept), static_cast<size_t>(states + kept * segment_bytes)};
  }
}

}  // namespace

int64_t workspace_bytes(int64_t rows, int64_t columns) { return rows * segments_of(columns) * static_cast<int64_t>(sizeof(State)); }

void loss(const Rows& logits, Shape shape, const Entries& entries, const Objective& objective, void* workspace, double* row_loss,
          double* lse, double* coefficients, void* stream) {
  if (shape.rows == 0) return;
  auto* states = static_cast<State*>(workspace);
  constexpr int kRows = kSettleThreads / 32;
  const Launch warp_a_row{static_cast<unsigned>((shape.rows + kRows - 1) / kRows), kSettleThreads, 0, 1, at(stream)};
  with_type(shape.dtype, [&](auto type) {
    using S = decltype(type);
    const auto scale = static_cast<float>(kLog2e / objective.temperature);
    launch(measure_others<S>, warp_a_segment(shape.rows, shape.columns, at(stream)), read<S>(logits), shape, entries, scale, states);
    launch(settle_rows<S>, warp_a_row, read<S>(logits), Problem{shape, entries, objective}, states, row_loss, lse, coefficients);
  });
}

void gradient(const Rows& logits, Shape shape, const Entries& entries, const double* lse, const double* coefficients,
              double temperature, const Rows& out, void* stream) {
  if (shape.rows == 0) return;
  with_type(shape.dtype, [&](auto type) {
    using S = decltype(type);
    launch(differentiate<S>, warp_a_segment(shape.rows, shape.columns, at(stream)), read<S>(logits), shape, entries, lse, coefficients,
           temperature, write<S>(out));
  });
}

void loss_and_gradient(const Rows& logits, Shape shape, const Entries& entries, const Objective& objective, double* settled,
                       double* row_loss, double* lse, const Rows& out, void* stream) {
  if (shape.rows == 0) return;
  with_type(shape.dtype, [&](auto type) {
    using S = decltype(type);
    const Plan plan = plan_of(device(), shape.rows, segments_of(shape.columns), Segment<S>::kBytes);
    const Launch how{static_cast<unsigned>(shape.rows * plan.cluster), kFusedThreads, plan.shared_bytes, plan.cluster, at(stream)};
    launch(fused<S>, how, read<S>(logits), Problem{shape, entries, objective}, plan.kept, settled, row_loss, lse, write<S>(out));
  });
}

}  // namespace prmfast::dist_ppo::cuda
