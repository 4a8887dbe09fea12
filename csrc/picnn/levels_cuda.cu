// A block owns whole contexts, flattens their levels into tiles of 16 rows for its warps, and puts each context's gradients in order.
#include "picnn/levels_cuda.h"

#include "picnn/network.cuh"

namespace prmfast::picnn::cuda {
namespace {

constexpr int kThreads = 128, kManyThreads = 256;  // many where there are too few blocks for all processors
constexpr int kRowsWanted = 256;          // level rows a block: 16 tiles, so that the last round of 4 warps is rarely half empty
constexpr int kContextBytes = 24 * 1024;  // of contexts a block: beside 48 KB of weights, two blocks fit on an sm_80, three on an sm_90

// Blocks of kThreads that a processor is to hold, which bounds the registers: 168, 128 and 80 of a thread.
template <int K>
constexpr int kResident = K == 64 ? 3 : K == 32 ? 4 : 6;

// What all threads of a block know. It lies in shared memory and is read where it is needed, as volatile: 64 wide, the products
// leave no registers for it.
struct Known {
  int convex;
  unsigned group;  // of contexts, the one in work
};

// The contexts in work and their level rows.
struct Span {
  int64_t first;
  int count, rows;

  __device__ Span(const volatile Known* known, const LevelsCall& call, int contexts) {
    first = int64_t{known->group} * contexts;
    count = static_cast<int>(min(static_cast<long long>(contexts), static_cast<long long>(call.count - first)));
    rows = count * call.m;
  }
};

template <int K, bool kSplit>
__global__ void __launch_bounds__(kThreads* kResident<K>, 1)
    levels_kernel(const __grid_constant__ Network network, const __grid_constant__ LevelsCall call, int contexts, unsigned groups) {
  auto* fragments = shared_memory<Fragment<kSplit>>();
  float* last_weight = reinterpret_cast<float*>(fragments) + network.fragment_words[kSplit];
  auto* known = reinterpret_cast<volatile Known*>(last_weight + K);
  float* staged = last_weight + K + sizeof(Known) / sizeof(float);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  bool convex = make_fragments<K, kSplit>(network, fragments, thread, threads);
  convex = load_last<K>(network, last_weight, thread, threads) && convex;
  convex = __syncthreads_and(convex);
  if (thread == 0) {
    known->convex = convex;
    known->group = blockIdx.x;
  }
  __syncthreads();
  while (known->group < groups) {
    {
      const Span span(known, call, contexts);
      load_contexts<K>(network, call.rows + span.first * call.row_stride, call.row_stride, span.count, staged);
    }
    __syncthreads();
    for (int tile = thread / 32;; tile += threads / 32) {
      LaneRows own;
      {
        const Span span(known, call, contexts);
        if (tile * kTileRows >= span.rows) break;
        for (int r = 0; r < 2; ++r) {
          const int row = min(tile * kTileRows + thread % 32 / 4 + 8 * r, span.rows - 1), context = row / call.m;
          own.context[r] = staged + context * network.context_stride;
          own.x[r] = call.levels[(span.first + context) * call.level_stride + (row - context * call.m)];
        }
      }
      Dual found[2];
      level_tile<K, kSplit>(network, fragments, last_weight, own, found);
      const Span span(known, call, contexts);
      const int half = thread % 4, row = tile * kTileRows + thread % 32 / 4 + 8 * half;  // the first two lanes of a row's four write
      if (half < 2 && row < span.rows) {
        call.value[span.first * call.m + row] = half ? found[1].value : found[0].value;
        call.gradient[span.first * call.m + row] = half ? found[1].gradient : found[0].gradient;
      }
    }
    __syncthreads();
    if (known->convex) {
      const Span span(known, call, contexts);
      for (int context = thread / 32; context < span.count; context += threads / 32)
        keep_order(call.levels + (span.first + context) * call.level_stride, call.m, call.gradient + (span.first + context) * call.m);
    }
    __syncthreads();
    if (thread == 0) known->group = known->group + gridDim.x;
    __syncthreads();
  }
}

template <int K, bool kSplit>
void run(const Network& network, const LevelsCall& call, cudaStream_t stream) {
  const prmfast::cuda::Device device = prmfast::cuda::device();
  const int64_t stride = network.context_stride * int64_t{sizeof(float)};
  int64_t contexts = std::min<int64_t>(kContextBytes / stride, (kRowsWanted + call.m - 1) / call.m);
  contexts = std::max<int64_t>(1, std::min(contexts, (call.count + device.multiprocessors - 1) / device.multiprocessors));
  const size_t weights = network.fragment_words[kSplit] * sizeof(uint32_t) + K * sizeof(float) + sizeof(Known);
  while (contexts > 1 && weights + contexts * stride > device.shared_bytes) --contexts;
  const int64_t groups = (call.count + contexts - 1) / contexts, tiles = (contexts * call.m + kTileRows - 1) / kTileRows;
  const bool few = groups <= device.multiprocessors;  // then a group's tiles had better run side by side
  prmfast::cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(std::min<int64_t>(groups, int64_t{kResident<K>} * device.multiprocessors)));
  how.block = dim3(few && tiles > kThreads / 32 ? kManyThreads : kThreads);
  how.shared_bytes = weights + contexts * stride;
  how.stream = stream;
  prmfast::cuda::launch(levels_kernel<K, kSplit>, how, network, call, static_cast<int>(contexts), static_cast<unsigned>(groups));
}

}  // namespace

void forward(const Network& network, const LevelsCall& call, bool split, void* stream) {
  if (call.count == 0 || call.m == 0) return;
  if (split && worth_interpolating(network, call)) return forward_interpolated(network, call, stream);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (network.padded) {
    case 16:
      return split ? run<16, true>(network, call, on) : run<16, false>(network, call, on);
    case 32:
      return split ? run<32, true>(network, call, on) : run<32, false>(network, call, on);
    default:
      return split ? run<64, true>(network, call, on) : run<64, false>(network, call, on);
  }
}

}  // namespace prmfast::picnn::cuda
