// Many levels a context: its map is evaluated at 33 or 65 nested Chebyshev-Lobatto points of its levels' range and interpolated.
//
// With softplus the map is analytic in the level. The trailing coefficients estimate the error by the rule of forward.h, but that an
// end within the noise counts as falling; a context that no rung satisfies is evaluated directly, with the arithmetic of
// levels_cuda.cu to the bit. Every decision is a context's own.
#include <array>
#include <cmath>

#include "picnn/levels_cuda.h"
#include "picnn/network.cuh"

namespace prmfast::picnn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kFinest = 64;              // intervals of the finer rung; the coarser one takes every second of its points
constexpr int kPoints = kFinest + 1, kPeriod = 2 * kFinest;
constexpr int kCoarse = kFinest / 2 + 1; // points of the first rung
constexpr float kWorth = 0.75f;          // a rung is tried where it needs at most this share of the direct evaluations
constexpr float kNoise = 1e-6f;          // of a row's mean magnitude: what three bfloat16 products leave of a coefficient that is zero
constexpr int kRowsWanted = 256;         // points a block, 16 tiles
constexpr int kContextBytes = 24 * 1024; // of contexts and their series a block

// Blocks that a processor is to hold, which bounds the registers; a third block, 64 wide, would spill a few.
template <int K>
constexpr int kResident = K == 64 ? 2 : K == 32 ? 4 : 6;

// cos(pi i / 64).
struct Nodes {
  float at[kPoints];
};

inline const Nodes& nodes() {
  static const Nodes table = [] {
    Nodes made{};
    for (int i = 0; i < kPoints; ++i) made.at[i] = static_cast<float>(std::cos(std::acos(-1.0) * i / kFinest));
    return made;
  }();
  return table;
}

// What all threads of a block know; read where it is needed, as levels_cuda.cu says. Phases: the points of the first rung, those that
// the second one adds, all levels of what is left.
struct Known {
  int convex;
  unsigned group;
  int phase, listed;
  int curves;  // floats from the first context to the first curve
  int unused;  // what follows is read in pairs
};
enum Phase { kFirstRung = 0, kSecondRung = 1, kDirect = 2 };

// A context's values at its points, their series, and where its levels lie.
struct Curve {
  float value_at[kPoints], gradient_at[kPoints], value[kPoints], gradient[kPoints];
  float middle, half;
  int used;    // the highest coefficient, 0 where there is no series
  int listed;  // not of this context: the i-th of those in the phase
};

// What lies in shared memory behind the last layer's weights. The curves, whose place is no constant, are found through `known`.
struct Memory {
  volatile Known* known;
  float* cosines;  // of one period
  float* contexts;

  __device__ explicit Memory(float* first)
      : known(reinterpret_cast<volatile Known*>(first)), cosines(first + sizeof(Known) / sizeof(float)), contexts(cosines + kPeriod) {}
  __device__ Curve* curves() const { return reinterpret_cast<Curve*>(contexts + known->curves); }
};

__device__ inline float warp_sum(float x) {
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(kWholeWarp, x, by);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int by = 16; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, by));
  return x;
}

// One warp.
__device__ inline void find_range(const float* levels, int m, Curve& curve) {
  float low = INFINITY, high = -INFINITY;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < m; i += 32) {
    low = fminf(low, levels[i]);
    high = fmaxf(high, levels[i]);
  }
  low = -warp_max(-low);
  high = warp_max(high);
  if (threadIdx.x % 32 == 0) {
    curve.half = 0.5f * (high - low);
    curve.middle = low + curve.half;
    curve.used = 0;
  }
}

// Coefficient k of the series through n + 1 points, which are every `stride`-th of `at`.
__device__ inline float coefficient(const float* at, const float* cosines, int n, int stride, int k) {
  float sum = 0.0f;
  for (int j = 0; j <= n; ++j) {
    const float half = j == 0 || j == n ? 0.5f : 1.0f;
    sum = fmaf(__fmul_rn(half, cosines[j * k % (2 * n) * stride]), at[j * stride], sum);
  }
  return sum * (k == 0 || k == n ? 1.0f : 2.0f) / static_cast<float>(n);
}

// One warp: the series of n + 1 points, kept where it is cut late enough.
__device__ inline void find_series(const float* cosines, int n, float tolerance, Curve& curve) {
  const int lane = static_cast<int>(threadIdx.x) % 32, stride = kFinest / n;
  float size = 0.0f, middle = 0.0f, fifth = 0.0f, sixth = 0.0f;
  for (int j = lane; j <= n; j += 32) size += fabsf(curve.gradient_at[j * stride]);
  const float scale = warp_sum(size) / static_cast<float>(n + 1);
  for (int k = lane; k <= n; k += 32) {
    const float c = coefficient(curve.gradient_at, cosines, n, stride, k);
    curve.gradient[k] = c;
    float& part = k <= 2 * n / 3 ? middle : k <= 5 * n / 6 ? fifth : sixth;
    if (k > n / 3) part = fmaxf(part, fabsf(c));
  }
  middle = warp_max(middle);
  fifth = warp_max(fifth);
  sixth = warp_max(sixth);
  const float last = fmaxf(fifth, sixth), noise = kNoise * scale;
  const bool falls = (2.0f * sixth <= fifth || sixth <= noise) && 2.0f * last <= middle &&
                     4.0f * static_cast<float>(n) * last * last <= tolerance * scale * middle;
  if (!falls && !(last <= noise)) return;
  for (int k = lane; k <= n; k += 32) curve.value[k] = coefficient(curve.value_at, cosines, n, stride, k);
  if (lane == 0) curve.used = n;
}

// sum_k series[k] T_k(t), Clenshaw.
__device__ inline float interpolated(const float* series, int n, float t) {
  float one = 0.0f, two = 0.0f;
  for (int k = n; k > 0; --k) {
    const float next = fmaf(2.0f * t, one, series[k] - two);
    two = one;
    one = next;
  }
  return fmaf(t, one, series[0] - two);
}

// The contexts in work.
struct Span {
  int64_t first;
  int count;

  __device__ Span(const volatile Known* known, const LevelsCall& call, int contexts) {
    first = int64_t{known->group} * contexts;
    count = static_cast<int>(min(static_cast<long long>(contexts), static_cast<long long>(call.count - first)));
  }
};

// Where a row of the phase's tiles belongs.
struct Place {
  int context, index;

  __device__ Place(const Memory& memory, int phase, int m, int row) {
    const int points = phase == kDirect ? m : kCoarse - phase;
    context = memory.curves()[row / points].listed;
    index = row % points;
  }
};

__device__ inline int rows_of(const volatile Known* known, int m) {
  return known->listed * (known->phase == kDirect ? m : kCoarse - known->phase);
}

// Evaluates the map at the points of the phase, or at all levels, of the contexts that it lists.
template <int K>
__device__ void run_tiles(const Network& network, const LevelsCall& call, int contexts, const Memory& memory, const uint4* fragments,
                          const float* last_weight) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int tile = thread / 32;; tile += kThreads / 32) {
    LaneRows own;
    {
      const int rows = rows_of(memory.known, call.m), phase = memory.known->phase;
      if (tile * kTileRows >= rows) break;
      for (int r = 0; r < 2; ++r) {
        const Place place(memory, phase, call.m, min(tile * kTileRows + thread % 32 / 4 + 8 * r, rows - 1));
        const Curve& curve = memory.curves()[place.context];
        own.context[r] = memory.contexts + place.context * network.context_stride;
        own.x[r] = phase == kDirect
                       ? call.levels[(Span(memory.known, call, contexts).first + place.context) * call.level_stride + place.index]
                       : fmaf(curve.half, memory.cosines[2 * place.index + phase], curve.middle);
      }
    }
    Dual found[2];
    level_tile<K, true>(network, fragments, last_weight, own, found);
    const int half = thread % 4, row = tile * kTileRows + thread % 32 / 4 + 8 * half;  // the first two lanes of a row's four write
    if (half < 2 && row < rows_of(memory.known, call.m)) {
      const int phase = memory.known->phase;
      const Place place(memory, phase, call.m, row);
      const float value = half ? found[1].value : found[0].value, gradient = half ? found[1].gradient : found[0].gradient;
      if (phase == kDirect) {
        const int64_t to = (Span(memory.known, call, contexts).first + place.context) * call.m + place.index;
        call.value[to] = value;
        call.gradient[to] = gradient;
      } else {
        memory.curves()[place.context].value_at[2 * place.index + phase] = value;
        memory.curves()[place.context].gradient_at[2 * place.index + phase] = gradient;
      }
    }
  }
}

// The contexts that a phase still has to evaluate; thread 0.
__device__ inline void list(const Memory& memory, int phase, int count) {
  int listed = 0;
  for (int context = 0; context < count; ++context) {
    const Curve& curve = memory.curves()[context];
    if (curve.used == 0 && (phase == kDirect || curve.half > 0.0f)) memory.curves()[listed++].listed = context;
  }
  memory.known->phase = phase;
  memory.known->listed = listed;
}

template <int K>
__global__ void __launch_bounds__(kThreads* kResident<K>, 1)
    interpolate_kernel(const __grid_constant__ Network network, const __grid_constant__ LevelsCall call, const __grid_constant__ Nodes nodes,
                       int contexts, unsigned groups, int rungs) {
  auto* fragments = shared_memory<uint4>();
  float* last_weight = reinterpret_cast<float*>(fragments) + network.fragment_words[1];
  const Memory memory(last_weight + K);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kPeriod; i += kThreads) memory.cosines[i] = nodes.at[i < kPoints ? i : kPeriod - i];
  bool convex = make_fragments<K, true>(network, fragments, thread, kThreads);
  convex = load_last<K>(network, last_weight, thread, kThreads) && convex;
  convex = __syncthreads_and(convex);
  if (thread == 0) {
    memory.known->convex = convex;
    memory.known->group = blockIdx.x;
    memory.known->curves = contexts * network.context_stride;
  }
  __syncthreads();
  while (memory.known->group < groups) {
    {
      const Span span(memory.known, call, contexts);
      load_contexts<K>(network, call.rows + span.first * call.row_stride, call.row_stride, span.count, memory.contexts);
      for (int context = thread / 32; context < span.count; context += kThreads / 32)
        find_range(call.levels + (span.first + context) * call.level_stride, call.m, memory.curves()[context]);
    }
    __syncthreads();
    if (thread == 0) list(memory, kFirstRung, Span(memory.known, call, contexts).count);
    for (bool more = true; more;) {
      __syncthreads();
      run_tiles<K>(network, call, contexts, memory, fragments, last_weight);
      __syncthreads();
      const int phase = memory.known->phase;
      if (phase != kDirect)
        for (int i = thread / 32; i < memory.known->listed; i += kThreads / 32)
          find_series(memory.cosines, phase == kFirstRung ? kFinest / 2 : kFinest, call.tolerance, memory.curves()[memory.curves()[i].listed]);
      __syncthreads();
      more = phase != kDirect;
      if (thread == 0 && more)
        list(memory, phase == kFirstRung && rungs > 1 ? kSecondRung : kDirect, Span(memory.known, call, contexts).count);
    }
    const Span span(memory.known, call, contexts);
    for (int i = thread; i < span.count * call.m; i += kThreads) {
      const int context = i / call.m;
      const Curve& curve = memory.curves()[context];
      if (curve.used == 0) continue;
      const float x = call.levels[(span.first + context) * call.level_stride + (i - context * call.m)];
      const float t = (x - curve.middle) / curve.half;
      call.value[span.first * call.m + i] = interpolated(curve.value, curve.used, t);
      call.gradient[span.first * call.m + i] = interpolated(curve.gradient, curve.used, t);
    }
    __syncthreads();
    if (memory.known->convex)
      for (int context = thread / 32; context < span.count; context += kThreads / 32)
        keep_order(call.levels + (span.first + context) * call.level_stride, call.m, call.gradient + (span.first + context) * call.m);
    __syncthreads();
    if (thread == 0) memory.known->group = memory.known->group + gridDim.x;
    __syncthreads();
  }
}

template <int K>
void run(const Network& network, const LevelsCall& call, cudaStream_t stream) {
  const prmfast::cuda::Device device = prmfast::cuda::device();
  const int64_t bytes = network.context_stride * int64_t{sizeof(float)} + int64_t{sizeof(Curve)};
  int64_t contexts = std::min<int64_t>(kContextBytes / bytes, kRowsWanted / kCoarse + 1);
  contexts = std::max<int64_t>(1, std::min(contexts, (call.count + device.multiprocessors - 1) / device.multiprocessors));
  const size_t weights = (network.fragment_words[1] + K + kPeriod) * sizeof(float) + sizeof(Known);
  while (contexts > 1 && weights + contexts * bytes > device.shared_bytes) --contexts;
  const int64_t groups = (call.count + contexts - 1) / contexts;
  prmfast::cuda::Launch how;
  how.grid = dim3(static_cast<unsigned>(std::min<int64_t>(groups, int64_t{kResident<K>} * device.multiprocessors)));
  how.block = dim3(kThreads);
  how.shared_bytes = weights + contexts * bytes;
  how.stream = stream;
  prmfast::cuda::launch(interpolate_kernel<K>, how, network, call, nodes(), static_cast<int>(contexts), static_cast<unsigned>(groups),
                        kPoints <= kWorth * static_cast<float>(call.m) ? 2 : 1);
}

}  // namespace

bool worth_interpolating(const Network& network, const LevelsCall& call) {
  return call.tolerance > 0 && network.softplus && kCoarse <= kWorth * static_cast<float>(call.m);
}

void forward_interpolated(const Network& network, const LevelsCall& call, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (network.padded) {
    case 16:
      return run<16>(network, call, on);
    case 32:
      return run<32>(network, call, on);
    default:
      return run<64>(network, call, on);
  }
}

}  // namespace prmfast::picnn::cuda
