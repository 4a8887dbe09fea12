// A block owns whole contexts, flattens their levels into tiles of 16 rows for its warps, and puts each context's gradients in order.
#include "picnn/levels_cuda.h"

#include "picnn/network.cuh"

namespace prmfast::picnn::cuda {
namespace {

constexpr int kMostThreads = 256;
constexpr int kRowsWanted = 256;           // level rows a block: 16 tiles, so that the last round of 4 warps is rarely half empty
constexpr int kContextBytes = 32 * 1024;   // of contexts a block: with 48 KB of weights, two blocks fit on an sm_80
constexpr int kBlocksPerProcessor = 3;     // as many as registers allow; each stages the weights once and takes groups in turn


// Blocks of 256 threads that a processor is to hold: without the promise the compiler spills to reach a rounder number of registers.
template <int K>
constexpr int kResident = K == 64 ? 1 : 2;

template <int K, bool kSplit>
__global__ void __launch_bounds__(kMostThreads, kResident<K>)
    levels_kernel(const __grid_constant__ Network network, const __grid_constant__ LevelsCall call, int contexts) {
  auto* fragments = shared_memory<Fragment<kSplit>>();
  float* last_weight = reinterpret_cast<float*>(fragments) + network.fragment_words[kSplit];
  float* staged = last_weight + K;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % 32, warp = thread / 32,
            warps = threads / 32, stride = network.context_stride, m = call.m;
  bool convex = make_fragments<K, kSplit>(network, fragments, thread, threads);
  convex = load_last<K>(network, last_weight, thread, threads) && convex;
  convex = __syncthreads_and(convex);
  for (int64_t first = int64_t{blockIdx.x} * contexts; first < call.count; first += int64_t{gridDim.x} * contexts) {
    const int count = static_cast<int>(min(static_cast<long long>(contexts), static_cast<long long>(call.count - first)));
    load_contexts<K>(network, call.rows + first * call.row_stride, call.row_stride, count, staged);
    __syncthreads();
    const int rows = count * m;
    float *value = call.value + first * m, *gradient = call.gradient + first * m;
    const float* levels = call.levels + first * call.level_stride;
    for (int tile = warp; tile * kTileRows < rows; tile += warps) {
      LaneRows own;
      for (int r = 0; r < 2; ++r) {
        const int row = min(tile * kTileRows + lane / 4 + 8 * r, rows - 1), context = row / m;
        own.context[r] = staged + context * stride;
        own.x[r] = levels[context * call.level_stride + (row - context * m)];
      }
      Dual found[2];
      level_tile<K, kSplit>(network, fragments, last_weight, own, found);
      const int half = lane % 4, row = tile * kTileRows + lane / 4 + 8 * half;  // the first two lanes of a row's four write
      if (half < 2 && row < rows) {
        value[row] = half ? found[1].value : found[0].value;
        gradient[row] = half ? found[1].gradient : found[0].gradient;
      }
    }
    __syncthreads();
    if (convex)
      for (int context = warp; context < count; context += warps)
        keep_order(levels + context * call.level_stride, m, gradient + int64_t{context} * m);
  }
}

template <int K, bool kSplit>
void run(const Network& network, const LevelsCall& call, cudaStream_t stream) {
  const prmfast::cuda::Device device = prmfast::cuda::device();
  const int64_t stride = network.context_stride * int64_t{sizeof(float)};
  int64_t contexts = std::min<int64_t>(kContextBytes / stride, (kRowsWanted + call.m - 1) / call.m);
  contexts = std::max<int64_t>(1, std::min(contexts, (call.count + device.multiprocessors - 1) / device.multiprocessors));
  const int64_t groups = (call.count + contexts - 1) / contexts, tiles = (contexts * call.m + kTileRows - 1) / kTileRows;
  const bool few = groups <= device.multiprocessors;  // then a group's tiles had better run side by side
  prmfast::cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(std::min<int64_t>(groups, int64_t{kBlocksPerProcessor} * device.multiprocessors)));
  how.block = dim3(few && tiles > 4 ? 256 : 128);
  how.shared_bytes = network.fragment_words[kSplit] * sizeof(uint32_t) + K * sizeof(float) + contexts * stride;
  how.stream = stream;
  prmfast::cuda::launch(levels_kernel<K, kSplit>, how, network, call, static_cast<int>(contexts));
}

}  // namespace

void forward(const Network& network, const LevelsCall& call, bool split, void* stream) {
  if (call.count == 0 || call.m == 0) return;
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
