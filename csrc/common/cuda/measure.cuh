// The pass over whole rows: a warp per segment, its state to memory.
#pragma once
#include "common/cuda/segment.cuh"

namespace prmfast::cuda {

constexpr int kMeasureThreads = 256;

// What a warp of a one-dimensional grid of kMeasureThreads works on; row >= rows: nothing.
struct Unit {
  int64_t row, segment, first;  // first column of the segment
};

__device__ inline Unit unit_of(int64_t rows, int64_t columns) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kMeasureThreads / 32) + warp_id(), segments = segments_of(columns);
  const int64_t row = unit / segments, segment = unit - row * segments;
  return {row < rows ? row : rows, segment, segment * kSegment};
}

inline Launch warp_a_segment(int64_t rows, int64_t columns, cudaStream_t stream) {
  constexpr int kWarps = kMeasureThreads / 32;
  return {static_cast<unsigned>((rows * segments_of(columns) + kWarps - 1) / kWarps), kMeasureThreads, 0, 1, stream};
}

// Entries ids[begin] .. ids[end] of a row, by increasing id.
struct Span {
  int64_t begin, end;
};

// Those of them in columns [first, first + kSegment).
__device__ inline Span within(const int64_t* ids, Span all, int64_t first) {
  int64_t low = all.begin, high = all.end;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ids[middle] < first)
      low = middle + 1;
    else
      high = middle;
  }
  int64_t end = low;
  while (end < all.end && ids[end] < first + kSegment) ++end;
  return {low, end};
}

// The lane's elements of the segment that begins at column `first` that are entries of the row, as bits.
template <class S>
__device__ uint64_t elements_within(const int64_t* ids, Span row, int64_t first) {
  const Span inside = within(ids, row, first);
  uint64_t mine = 0;
  for (int64_t e = inside.begin; e < inside.end; ++e) {
    const auto offset = static_cast<int>(ids[e] - first);
    if (Segment<S>::lane_of(offset) == lane_id()) mine |= uint64_t{1} << Segment<S>::element_of(offset);
  }
  return mine;
}

template <class S>
__global__ void __launch_bounds__(kMeasureThreads)
    measure(const S* logits, int64_t stride, int64_t rows, int64_t columns, float scale, State* states) {
  const Unit unit = unit_of(rows, columns);
  if (unit.row >= rows) return;
  Segment<S> segment;
  segment.template load<false>(logits + unit.row * stride + unit.first, columns - unit.first);
  const State state = state_of(segment, scale);
  if (lane_id() == 0) states[unit.row * segments_of(columns) + unit.segment] = state;
}

// states [rows, segments] of logits / temperature, scale being log2(e) / temperature.
template <class S>
void measure_rows(const S* logits, int64_t stride, int64_t rows, int64_t columns, double scale, State* states, cudaStream_t stream) {
  launch(measure<S>, warp_a_segment(rows, columns, stream), logits, stride, rows, columns, static_cast<float>(scale), states);
}

}  // namespace prmfast::cuda
