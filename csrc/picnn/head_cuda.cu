// A block serves one context, or up to four where there are more contexts than processors; nothing leaves it between the stages.
#include "picnn/head_cuda.h"

#include "common/cuda/memory.cuh"
#include "picnn/network.cuh"

namespace prmfast::picnn::cuda {
namespace {

constexpr int kThreads = 256;  // 8 warps: the 7 tiles of 100 levels run side by side
constexpr int kMostContexts = 4;
constexpr int kPrepareThreads = 128, kPrepareBlocks = 32;

// What lies in shared memory behind the fragments, in floats.
struct Layout {
  int last_weight, contexts, quantiles, raw, input, end;

  __host__ __device__ Layout(const Network& network, bool split, int rows, int m, int inputs) {
    last_weight = network.fragment_words[split];
    contexts = last_weight + network.padded;
    quantiles = contexts + rows * network.context_stride;
    raw = quantiles + rows * m;
    input = raw + (inputs > 0 ? rows * network.row : 0);
    end = input + rows * inputs;
  }
};

template <int K, bool kSplit>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ Network network, Fragment<kSplit>* fragments) {
  make_fragments<K, kSplit>(network, fragments, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x),
                            static_cast<int>(gridDim.x * blockDim.x));
}

// raw[r] = bias + W input[r] for all rows at once, so that W is read once a block; every row sums in the same order.
__device__ inline void affine_head(const HeadCall& call, int width, int count, const float* input, float* raw) {
  for (int p = static_cast<int>(threadIdx.x); p < width; p += kThreads) {
    float sum[kMostContexts];
    for (int r = 0; r < kMostContexts; ++r) sum[r] = call.bias[p];
#pragma unroll 16
    for (int k = 0; k < call.inputs; ++k) {
      const float w = call.weight[k * width + p];
#pragma unroll
      for (int r = 0; r < kMostContexts; ++r)
        if (r < count) sum[r] = fmaf(w, input[r * call.inputs + k], sum[r]);
    }
    for (int r = 0; r < kMostContexts; ++r)
      if (r < count) raw[r * width + p] = sum[r];
  }
}

__device__ inline double warp_sum(double x) {
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(kWholeWarp, x, by);
  return x;
}

__device__ inline double power(double base, unsigned n) {
  double result = 1;
  for (;; base *= base) {
    if (n & 1) result *= base;
    n >>= 1;
    if (n == 0) return result;
  }
}

// One warp. The bits of N - 1 from the highest down: a bit is set where N - 1 samples still miss the target, in which S is monotone.
__device__ inline int smallest_budget(const float* quantiles, int m, double target, int n_max) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  bool nan = false;
  for (int i = lane; i < m; i += 32) nan = nan || quantiles[i] != quantiles[i];
  if (__any_sync(kWholeWarp, nan)) return 0;
  const double wanted = target - 1e-12;  // where the curve touches the target, the order of a sum must not decide
  unsigned missing = 0, bit = 1;
  while (bit <= static_cast<unsigned>(n_max - 1) / 2) bit *= 2;
  for (; bit > 0 && n_max > 1; bit /= 2) {
    double failing = 0;
    for (int i = lane; i < m; i += 32) failing += power(1 - static_cast<double>(quantiles[i]), missing + bit);
    if (1 - warp_sum(failing) / m < wanted) missing += bit;
  }
  return static_cast<int>(min(missing + 1, static_cast<unsigned>(n_max)));
}

// One warp.
__device__ inline double weighted_sum(const float* quantiles, const double* weights, int m) {
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < m; i += 32) sum = fma(weights[i], static_cast<double>(quantiles[i]), sum);
  return warp_sum(sum);
}

template <int K, bool kSplit>
__global__ void __launch_bounds__(kThreads, 1)
    head_kernel(const __grid_constant__ Network network, const __grid_constant__ HeadCall call, int contexts) {
  float* const shared = shared_memory<float>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, warps = kThreads / 32, m = call.m;
  const Layout at(network, kSplit, contexts, m, call.weight ? call.inputs : 0);
  const int64_t first = int64_t{blockIdx.x} * contexts;
  const int count = static_cast<int>(min(static_cast<long long>(contexts), static_cast<long long>(call.count - first)));

  for (int i = 4 * thread; i < at.last_weight; i += 4 * kThreads)
    prmfast::cuda::copy_async_16(shared + i, static_cast<const float*>(call.fragments) + i);
  prmfast::cuda::copy_async_commit();
  load_last<K>(network, shared + at.last_weight, thread, kThreads);
  const float* raw = call.input + first * call.input_stride;
  int64_t raw_stride = call.input_stride;
  if (call.weight) {
    for (int i = thread; i < count * call.inputs; i += kThreads)
      shared[at.input + i] = raw[i / call.inputs * raw_stride + i % call.inputs];
    __syncthreads();
    affine_head(call, network.row, count, shared + at.input, shared + at.raw);
    __syncthreads();
    raw = shared + at.raw;
    raw_stride = network.row;
  }
  load_contexts<K>(network, raw, raw_stride, count, shared + at.contexts);
  prmfast::cuda::copy_async_wait<0>();
  __syncthreads();

  const int rows = count * m, stride = network.context_stride;
  for (int tile = warp; tile * kTileRows < rows; tile += warps) {
    LaneRows own;
    for (int r = 0; r < 2; ++r) {
      const int row = min(tile * kTileRows + lane / 4 + 8 * r, rows - 1), context = row / m;
      own.context[r] = shared + at.contexts + context * stride;
      own.x[r] = call.levels[row - context * m];
    }
    Dual found[2];
    level_tile<K, kSplit>(network, reinterpret_cast<const Fragment<kSplit>*>(shared), shared + at.last_weight, own, found);
    const int half = lane % 4, row = tile * kTileRows + lane / 4 + 8 * half;  // the first two lanes of a row's four write
    if (half < 2 && row < rows) {
      const float map = half ? found[1].gradient : found[0].gradient, q = call.sigmoid ? softplus(map).slope : map;
      shared[at.quantiles + row] = q < 0.0f ? 0.0f : q > 1.0f ? 1.0f : q;
    }
  }
  __syncthreads();

  for (int context = warp; context < count; context += warps) keep_order(call.levels, m, shared + at.quantiles + context * m);
  __syncthreads();
  for (int task = warp; task < 2 * count; task += warps) {
    const int context = task / 2;
    const int64_t to = first + context;
    const float* quantiles = shared + at.quantiles + context * m;
    if (task % 2 == 0) {
      const int n = smallest_budget(quantiles, m, call.target[to * call.target_stride], call.n_max);
      if (lane == 0) call.budget[to] = n;
    } else {
      for (int i = lane; i < m; i += 32) call.quantiles[to * m + i] = quantiles[i];
      const double mean = weighted_sum(quantiles, call.quadrature, m);
      if (lane == 0) call.expected[to] = static_cast<float>(mean);
    }
  }
}

template <int K, bool kSplit>
void run_prepare(const Network& network, void* fragments, cudaStream_t stream) {
  if (network.layers == 1) return;  // the one layer's weights are no matrix
  prmfast::cuda::Launch how;
  how.grid = dim3(kPrepareBlocks);
  how.block = dim3(kPrepareThreads);
  how.stream = stream;
  prmfast::cuda::launch(prepare_kernel<K, kSplit>, how, network, static_cast<Fragment<kSplit>*>(fragments));
}

template <int K, bool kSplit>
void run(const Network& network, const HeadCall& call, cudaStream_t stream) {
  const prmfast::cuda::Device device = prmfast::cuda::device();
  const auto bytes = [&](int64_t rows) {
    return sizeof(float) * Layout(network, kSplit, static_cast<int>(rows), call.m, call.weight ? call.inputs : 0).end;
  };
  int64_t contexts = std::clamp<int64_t>((call.count + device.multiprocessors - 1) / device.multiprocessors, 1, kMostContexts);
  while (contexts > 1 && bytes(contexts) > device.shared_bytes) --contexts;
  prmfast::cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>((call.count + contexts - 1) / contexts));
  how.block = dim3(kThreads);
  how.shared_bytes = bytes(contexts);
  how.stream = stream;
  prmfast::cuda::launch(head_kernel<K, kSplit>, how, network, call, static_cast<int>(contexts));
}

}  // namespace

void prepare(const Network& network, bool split, void* fragments, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (network.padded) {
    case 16:
      return split ? run_prepare<16, true>(network, fragments, on) : run_prepare<16, false>(network, fragments, on);
    case 32:
      return split ? run_prepare<32, true>(network, fragments, on) : run_prepare<32, false>(network, fragments, on);
    default:
      return split ? run_prepare<64, true>(network, fragments, on) : run_prepare<64, false>(network, fragments, on);
  }
}

void serve(const Network& network, const HeadCall& call, bool split, void* stream) {
  if (call.m < 1 || call.m > kMostHeadLevels)
    throw std::invalid_argument("levels must be 1 to " + std::to_string(kMostHeadLevels) + ", got " + std::to_string(call.m));
  if (call.weight != nullptr && (call.inputs < 1 || call.inputs > kMostHeadInputs))
    throw std::invalid_argument("inputs must be 1 to " + std::to_string(kMostHeadInputs) + ", got " + std::to_string(call.inputs));
  if (call.count == 0) return;
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
