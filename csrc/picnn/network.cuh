// What the kernels of the room share: weights as tensor-core fragments, contexts in shared memory, dual numbers through all layers.
//
// A warp takes 16 level rows through the network. Lane 4 g + t holds columns 2 t, 2 t + 1 of every 8 of rows g and g + 8: value and
// tangent stay in registers, and what a layer leaves is, split into bfloat16 parts, the A operand of the next one as it stands.
// Every row sees the same operations in the same order, whatever tile, warp or block it is in; products that the compiler could
// contract differently in different places are written as fmaf or __fmul_rn.
#pragma once
#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"
#include "picnn/network_cuda.h"

namespace prmfast::picnn::cuda {

using prmfast::cuda::mma_bf16;
using prmfast::cuda::shared_memory;

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kTileRows = 16;

// --- activations

struct Response {
  float value, slope;  // s(p), s'(p)
};

// log(1 + e^p) and its derivative, within 3e-7: one exp2, one reciprocal, and e times a polynomial fitted to log(1 + e) / e.
__device__ inline Response softplus(float p) {
  const float e = prmfast::cuda::exp2_approx(-1.44269504f * fabsf(p));
  float y = 0.00538386516f;
  y = fmaf(y, e, -0.0301101852f);
  y = fmaf(y, e, 0.0792094866f);
  y = fmaf(y, e, -0.137465175f);
  y = fmaf(y, e, 0.191450681f);
  y = fmaf(y, e, -0.248529337f);
  y = fmaf(y, e, 0.333203421f);
  y = fmaf(y, e, -0.499995525f);
  y = fmaf(y, e, 0.999999975f);
  const float inverse = prmfast::cuda::reciprocal_approx(1.0f + e);
  return {fmaf(y, e, fmaxf(p, 0.0f)), p > 0.0f ? inverse : __fmul_rn(e, inverse)};
}

__device__ inline Response leaky_relu(float p, float negative_slope) {
  const float slope = p > 0.0f ? 1.0f : negative_slope;
  return {__fmul_rn(p, slope), slope};
}

// --- bfloat16 parts

__device__ inline uint32_t bf16_pair(float even, float odd) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(even, odd);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

struct Parts {
  uint32_t high, low;  // of two neighbours: their bfloat16, and that of what it leaves
};

template <bool kSplit>
__device__ Parts bf16_parts(float even, float odd) {
  const uint32_t high = bf16_pair(even, odd);
  if constexpr (!kSplit) return {high, 0};
  return {high, bf16_pair(even - __uint_as_float(high << 16), odd - __uint_as_float(high & 0xffff0000u))};
}

// --- weights

// A lane's B operand: both parts of both registers in one load, or the high parts alone.
template <bool kSplit>
struct FragmentOf;
template <>
struct FragmentOf<true> {
  using type = uint4;  // high 0, high 1, low 0, low 1
};
template <>
struct FragmentOf<false> {
  using type = uint2;
};
template <bool kSplit>
using Fragment = typename FragmentOf<kSplit>::type;

// Writes the fragments of all layers but the last as [layer][k / 16][n / 8][lane], zeros beyond the widths. True where this
// thread saw weights >= 0 only.
template <int K, bool kSplit>
__device__ bool make_fragments(const Network& network, Fragment<kSplit>* out, int first, int step) {
  constexpr int kOfLayer = K / 16 * (K / 8) * 32;
  bool convex = true;
  for (int i = 0; i + 1 < network.layers; ++i) {
    const int inputs = network.width[i], units = network.width[i + 1];
    const float* weight = network.wz[i];
    for (int at = first; at < kOfLayer; at += step) {
      const int lane = at % 32, tile = at / 32 % (K / 8), k = at / 32 / (K / 8) * 16 + lane % 4 * 2, n = tile * 8 + lane / 4;
      float w[4];
      for (int j = 0; j < 4; ++j) {
        const int from = k + j / 2 * 8 + j % 2;
        w[j] = n < units && from < inputs ? weight[n * inputs + from] : 0.0f;
        convex = convex && w[j] >= 0.0f;
      }
      const Parts one = bf16_parts<kSplit>(w[0], w[1]), two = bf16_parts<kSplit>(w[2], w[3]);
      if constexpr (kSplit)
        out[i * kOfLayer + at] = make_uint4(one.high, two.high, one.low, two.low);
      else
        out[i * kOfLayer + at] = make_uint2(one.high, two.high);
    }
  }
  return convex;
}

// The last layer's weights, zeros beyond its width. True where this thread saw weights >= 0 only.
template <int K>
__device__ bool load_last(const Network& network, float* out, int first, int step) {
  const float* weight = network.wz[network.layers - 1];
  bool convex = true;
  for (int k = first; k < K; k += step) {
    out[k] = k < network.width[network.layers - 1] ? weight[k] : 0.0f;
    convex = convex && out[k] >= 0.0f;
  }
  return convex;
}

// --- contexts

// Raw rows [count, ..] -> contexts in shared memory, gates and curvature through their activations, zeros beyond the widths.
template <int K>
__device__ void load_contexts(const Network& network, const float* rows, int64_t row_stride, int count, float* out) {
  const int stride = network.context_stride, last = network.layers, threads = static_cast<int>(blockDim.x);
  for (int i = 0; i < last; ++i) {
    const int width = network.width[i], slope = network.slope[i], gate = network.gate[i];
    for (int at = static_cast<int>(threadIdx.x); at < count * 3 * K; at += threads) {
      const int context = at / (3 * K), part = at / K % 3, column = at % K;
      const float* row = rows + context * row_stride;
      float value = 0.0f;
      if (column < width) {
        value = part < 2 ? row[slope + part * width + column] : row[gate + column];
        if (part == 2) value = network.relu_gate ? fmaxf(value, 0.0f) : softplus(value).value;
      }
      out[context * stride + i * 3 * K + at % (3 * K)] = value;
    }
  }
  for (int context = static_cast<int>(threadIdx.x); context < count; context += threads) {
    const float* row = rows + context * row_stride;
    float* tail = out + context * stride + last * 3 * K;
    tail[0] = row[network.slope[last]];
    tail[1] = row[network.slope[last] + 1];
    tail[2] = network.curvature ? softplus(row[network.row - 1]).value + network.curvature_floor : 0.0f;
  }
}

// --- the layers

template <int K, bool kSplit>
struct Operand {
  uint32_t high[K / 16][4], low[kSplit ? K / 16 : 1][4];
};

template <int K>
using Accumulator = float[K / 8][4];

template <int K, bool kSplit>
__device__ void make_operand(const Accumulator<K>& from, Operand<K, kSplit>& to) {
#pragma unroll
  for (int s = 0; s < K / 16; ++s)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const Parts parts = bf16_parts<kSplit>(from[2 * s + r / 2][r % 2 * 2], from[2 * s + r / 2][r % 2 * 2 + 1]);
      to.high[s][r] = parts.high;
      if constexpr (kSplit) to.low[s][r] = parts.low;
    }
}

// z = W a and dz = W da; the smaller products first. Value and tangent alternate: a product does not wait for the one before it.
template <int K, bool kSplit>
__device__ void multiply(const Fragment<kSplit>* weights, const Operand<K, kSplit>& a, const Operand<K, kSplit>& da, Accumulator<K>& z,
                         Accumulator<K>& dz) {
#pragma unroll
  for (int j = 0; j < K / 8; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) z[j][c] = dz[j][c] = 0.0f;
#pragma unroll
  for (int s = 0; s < K / 16; ++s)
#pragma unroll
    for (int j = 0; j < K / 8; ++j) {
      const Fragment<kSplit> w = weights[(s * (K / 8) + j) * 32];
      const uint32_t high[2] = {w.x, w.y};
      if constexpr (kSplit) {
        const uint32_t low[2] = {w.z, w.w};
        mma_bf16(z[j], a.low[s], high);
        mma_bf16(dz[j], da.low[s], high);
        mma_bf16(z[j], a.high[s], low);
        mma_bf16(dz[j], da.high[s], low);
      }
      mma_bf16(z[j], a.high[s], high);
      mma_bf16(dz[j], da.high[s], high);
    }
}

// A lane's two level rows: their contexts, advanced to the layer and the lane's columns, and their levels.
struct LaneRows {
  const float* context[2];
  float x[2];
};

// Adds what the context adds, applies the activation and multiplies by the gate of the layer's output. kPlain: softplus, not squared.
template <int K, bool kPlain>
__device__ void activate(const Network& network, bool square, const LaneRows& rows, Accumulator<K>& z, Accumulator<K>& dz) {
#pragma unroll
  for (int j = 0; j < K / 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* at = rows.context[r] + 8 * j;
      const float2 slope = *reinterpret_cast<const float2*>(at), offset = *reinterpret_cast<const float2*>(at + K),
                   gate = *reinterpret_cast<const float2*>(at + 2 * K);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float &value = z[j][2 * r + c], &tangent = dz[j][2 * r + c];
        const float v = c ? slope.y : slope.x, g = c ? gate.y : gate.x;
        const float p = value + fmaf(rows.x[r], v, c ? offset.y : offset.x), dp = tangent + v;
        Response s = kPlain || network.softplus ? softplus(p) : leaky_relu(p, network.negative_slope);
        if (!kPlain && square) s = {__fmul_rn(s.value, s.value), __fmul_rn(2.0f * s.value, s.slope)};
        value = __fmul_rn(g, s.value);
        tangent = __fmul_rn(g, __fmul_rn(s.slope, dp));
      }
    }
}

struct Dual {
  float value, gradient;
};

// Sums over the four lanes that share a row; all of them get it.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

// g and dg/dx of the warp's 16 level rows: of row lane / 4 and of row lane / 4 + 8, in each of the four lanes that share them.
// rows.context: where the contexts of this lane's two rows begin in shared memory.
template <int K, bool kSplit>
__device__ void level_tile(const Network& network, const Fragment<kSplit>* fragments, const float* last_weight, LaneRows rows,
                           Dual (&out)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, column = lane % 4 * 2;
  for (int r = 0; r < 2; ++r) rows.context[r] += column;
  const Fragment<kSplit>* weights = fragments + lane;
  Accumulator<K> z, dz;
#pragma unroll
  for (int j = 0; j < K / 8; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) z[j][c] = dz[j][c] = 0.0f;
  for (int i = 0;; ++i) {
    const bool square = i == 0 && network.square_first;
    if (network.softplus && !square)
      activate<K, true>(network, square, rows, z, dz);
    else
      activate<K, false>(network, square, rows, z, dz);
    if (i + 1 == network.layers) break;
    Operand<K, kSplit> a, da;
    make_operand<K, kSplit>(z, a);
    make_operand<K, kSplit>(dz, da);
    multiply<K, kSplit>(weights, a, da, z, dz);
    weights += K / 16 * (K / 8) * 32;
    for (int r = 0; r < 2; ++r) rows.context[r] += 3 * K;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float value = 0.0f, gradient = 0.0f;
#pragma unroll
    for (int j = 0; j < K / 8; ++j) {
      const float2 w = *reinterpret_cast<const float2*>(last_weight + column + 8 * j);
      value = fmaf(w.y, z[j][2 * r + 1], fmaf(w.x, z[j][2 * r], value));
      gradient = fmaf(w.y, dz[j][2 * r + 1], fmaf(w.x, dz[j][2 * r], gradient));
    }
    const float* tail = rows.context[r] - column + 3 * K;  // the context stands at its last hidden layer
    const float x = rows.x[r], slope = tail[0], offset = tail[1], kappa = tail[2];
    out[r].value = fmaf(0.5f * kappa, __fmul_rn(x, x), row_sum(value) + fmaf(x, slope, offset));
    out[r].gradient = fmaf(kappa, x, row_sum(gradient) + slope);
  }
}

// --- order

// One warp: every gradient of a row becomes the largest of those at levels that are no higher. NaN stays where it is, and is
// passed over elsewhere. Where levels are not sorted, the lanes read while others write: what they read has been raised to such a
// maximum already, or not, and the result is the same.
__device__ inline void keep_order(const float* levels, int m, float* gradient) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  bool sorted = true;
  for (int i = lane; i + 1 < m; i += 32) sorted = sorted && levels[i] <= levels[i + 1];
  if (!__all_sync(kWholeWarp, sorted)) {
    for (int i = lane; i < m; i += 32) {
      float best = gradient[i];
      for (int j = 0; j < m; ++j)
        if (levels[j] <= levels[i] && gradient[j] > best) best = gradient[j];
      gradient[i] = best;
    }
    return;
  }
  float before = -INFINITY;
  for (int start = 0; start < m; start += 32) {
    const int i = start + lane;
    const float own = i < m ? gradient[i] : -INFINITY;
    float best = fmaxf(own, before);
    for (int by = 1; by < 32; by *= 2) {
      const float other = __shfl_up_sync(kWholeWarp, best, by);
      if (lane >= by) best = fmaxf(best, other);
    }
    if (i < m && best > own) gradient[i] = best;
    before = __shfl_sync(kWholeWarp, best, 31);
  }
}

}  // namespace prmfast::picnn::cuda
