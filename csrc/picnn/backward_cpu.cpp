// The adjoint of the dual-number forward pass, a row of coefficients in every lane, one level at a time.
//
// The forward pass of a point is run again with a tape that stays in L2. Gradients of the weights are sums over points of outer
// products: a few points wait in a block, then each 16-weight tile reads them once with its sums in registers.
#include "common/parallel_for.h"
#include "common/simd.h"
#include "picnn/engines.h"

namespace prmfast::picnn {
namespace {

constexpr int kPointsTogether = 8;

template <class T>
struct Workspace {
  explicit Workspace(const Plan<T>& plan)
      : units(plan.total_units), memory((4 * kPointsTogether + 7) * units + 3 * plan.lane_row()) {
    Lanes<T>* next = memory.get();
    const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
    a = take(kPointsTogether * units), da = take(kPointsTogether * units);
    p = take(kPointsTogether * units), dp = take(kPointsTogether * units);
    tape = Tape<T>{nullptr, nullptr, take(units), take(units), take(units), take(units), take(units), nullptr};
    z = take(units), dz = take(units);
    tile = take(plan.lane_row()), gate_slopes = take(plan.lane_row()), d_tile = take(plan.lane_row());
  }
  int64_t units;
  LaneBuffer<T> memory;
  Lanes<T>*a, *da;  // of every waiting point: what the next layer read
  Lanes<T>*p, *dp;  // of every waiting point: adjoints of the units
  Tape<T> tape;     // of the present point
  Lanes<T>*z, *dz;  // adjoints of the present layer's inputs
  Lanes<T>*tile, *gate_slopes, *d_tile;
  Lanes<T> last_p[kPointsTogether], last_dp[kPointsTogether];  // adjoints of the output
  int waiting = 0;
};

// kUnits input units at once: z = W^T p, dz = W^T dp.
template <class T, int kUnits>
PRMFAST_INLINE void transposed_tile(const T* weight, int64_t out, int64_t valid, const Lanes<T>* p, const Lanes<T>* dp, Lanes<T>* z,
                                    Lanes<T>* dz) {
  Lanes<T> sum_z[kUnits] = {}, sum_dz[kUnits] = {};
  for (int64_t j = 0; j < out; ++j) {
    const Lanes<T> pj = p[j], dpj = dp[j];
#pragma GCC unroll 8
    for (int k = 0; k < kUnits; ++k) {
      const T w = weight[j * kUnits + k];
      sum_z[k] += w * pj;
      sum_dz[k] += w * dpj;
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kUnits; ++k)
    if (k < valid) {
      z[k] = sum_z[k];
      dz[k] = sum_dz[k];
    }
}

template <class T, int kUnits>
PRMFAST_INLINE void backward_point(const Plan<T>& plan, Lanes<T> x, Lanes<T> g_value, Lanes<T> g_gradient, Workspace<T>& ws,
                                   Lanes<T>& d_x) {
  const Lanes<T>* row = ws.tile;
  Lanes<T>* d_row = ws.d_tile;
  const int64_t slot = ws.waiting * plan.total_units;
  const Lanes<T> kappa = row[plan.kappa];
  d_row[plan.kappa] += T(0.5) * x * x * g_value + x * g_gradient;
  d_x = kappa * x * g_value + kappa * g_gradient;
  const int last = plan.layers;
  d_row[plan.slope[last]] += x * g_value + g_gradient;
  d_row[plan.offset[last]] += g_value;
  d_x += row[plan.slope[last]] * g_value;
  for (int64_t k = 0; k < plan.widths[last - 1]; ++k) {
    ws.z[k] = plan.last[k] * g_value;
    ws.dz[k] = plan.last[k] * g_gradient;
  }
  for (int i = last - 1; i >= 0; --i) {
    const int64_t out = plan.widths[i], base = plan.units[i], gate = plan.gate[i + 1];
    Lanes<T>*p = ws.p + slot + base, *dp = ws.dp + slot + base;
    for (int64_t j = 0; j < out; ++j) {
      const int64_t unit = base + j;
      const Lanes<T> before = ws.z[j], d_before = ws.dz[j];  // adjoints of gate * z and gate * dz
      d_row[gate + j] += before * ws.tape.z[unit] + d_before * ws.tape.dz[unit];
      const Lanes<T> z = row[gate + j] * before, dz = row[gate + j] * d_before;
      p[j] = ws.tape.first[unit] * z + ws.tape.second[unit] * ws.tape.dp[unit] * dz;
      dp[j] = ws.tape.first[unit] * dz;
      d_row[plan.slope[i] + j] += x * p[j] + dp[j];
      d_row[plan.offset[i] + j] += p[j];
      d_x += row[plan.slope[i] + j] * p[j];
    }
    if (i == 0) break;
    const int64_t from = plan.widths[i - 1];
    const T* weight = plan.by_input[i - 1].data();
    for (int64_t k = 0; k < from; k += kUnits, weight += out * kUnits)
      transposed_tile<T, kUnits>(weight, out, std::min<int64_t>(kUnits, from - k), p, dp, ws.z + k, ws.dz + k);
  }
  ws.last_p[ws.waiting] = g_value;
  ws.last_dp[ws.waiting] = g_gradient;
}

// d_weights += sum over the waiting points and their lanes of p a + dp da.
template <class T>
PRMFAST_INLINE void add_weight_gradients(const Plan<T>& plan, Workspace<T>& ws, T* d_weights) {
  constexpr int W = kWidth<T>, kRows = 4, kColumns = W / kRows;
  for (int i = 1; i <= plan.layers; ++i) {
    const int64_t out = plan.widths[i], from = plan.widths[i - 1], inputs = plan.units[i - 1], units = plan.units[i];
    const bool last = i == plan.layers;
    T* target = d_weights + plan.weights[i - 1];
    for (int64_t j = 0; j < out; j += kRows)
      for (int64_t k = 0; k < from; k += kColumns) {
        Lanes<T> sums[W] = {};
        for (int point = 0; point < ws.waiting; ++point) {
          const int64_t slot = point * plan.total_units;
          Lanes<T> a[kColumns], da[kColumns];
#pragma GCC unroll 4
          for (int c = 0; c < kColumns; ++c) {
            const int64_t column = slot + inputs + std::min(k + c, from - 1);
            a[c] = ws.a[column];
            da[c] = ws.da[column];
          }
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const int64_t unit = slot + units + std::min(j + r, out - 1);
            const Lanes<T> p = last ? ws.last_p[point] : ws.p[unit], dp = last ? ws.last_dp[point] : ws.dp[unit];
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) {
              sums[r * kColumns + c] += p * a[c];
              sums[r * kColumns + c] += dp * da[c];
            }
          }
        }
        transpose<T>(sums);
        Lanes<T> total = sums[0];
        for (int l = 1; l < W; ++l) total += sums[l];
        for (int64_t r = 0; r < kRows && j + r < out; ++r)
          for (int64_t c = 0; c < kColumns && k + c < from; ++c) target[(j + r) * from + k + c] += total[r * kColumns + c];
      }
  }
  ws.waiting = 0;
}

template <class T>
struct Gradients {
  const T *value, *gradient;
  T *rows, *levels;
};

template <class T>
PRMFAST_INLINE void store_row_gradients(const Plan<T>& plan, int64_t first, int64_t count, Workspace<T>& ws, T* d_rows) {
  constexpr int W = kWidth<T>;
  for (int64_t p = plan.first_gate; p < plan.raw_row; ++p) ws.d_tile[p] *= ws.gate_slopes[p - plan.first_gate];
  for (int64_t p = 0; p < plan.raw_row; p += W) {
    Lanes<T> block[W];
    for (int l = 0; l < W; ++l) block[l] = ws.d_tile[p + l];
    transpose<T>(block);
    const int64_t n = std::min<int64_t>(W, plan.raw_row - p);
    for (int64_t l = 0; l < count; ++l) std::memcpy(d_rows + (first + l) * plan.raw_row + p, &block[l], n * sizeof(T));
  }
}

template <class T, int kUnits>
PRMFAST_INLINE void backward_tiles(const Plan<T>& plan, const Inputs<T>& in, const Gradients<T>& grads, T* d_weights, int64_t begin,
                                   int64_t end) {
  constexpr int W = kWidth<T>;
  Workspace<T> ws(plan);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * W, count = std::min<int64_t>(W, in.count - first);
    load_tile<T>(plan, in.rows, first, count, ws.tile, ws.gate_slopes);
    for (int64_t p = 0; p < plan.lane_row(); ++p) ws.d_tile[p] = Lanes<T>{};
    for (int64_t m = 0; m < in.m; ++m) {
      Lanes<T> x{}, g_value{}, g_gradient{}, value, gradient, d_x;
      for (int64_t l = 0; l < W; ++l) x[l] = in.levels[(first + std::min<int64_t>(l, count - 1)) * in.level_stride + m];
      for (int64_t l = 0; l < count; ++l) {
        g_value[l] = grads.value[(first + l) * in.m + m];
        g_gradient[l] = grads.gradient[(first + l) * in.m + m];
      }
      const int64_t slot = ws.waiting * plan.total_units;
      ws.tape.a = ws.a + slot;
      ws.tape.da = ws.da + slot;
      forward_point<T, DenseEngine<T, kUnits>, true>(plan, RowInEveryLane<T>{ws.tile}, x, ws.tape, value, gradient);
      backward_point<T, kUnits>(plan, x, g_value, g_gradient, ws, d_x);
      for (int64_t l = 0; l < count; ++l) grads.levels[(first + l) * in.m + m] = d_x[l];
      if (++ws.waiting == kPointsTogether) add_weight_gradients(plan, ws, d_weights);
    }
    store_row_gradients(plan, first, count, ws, grads.rows);
  }
  if (ws.waiting > 0) add_weight_gradients(plan, ws, d_weights);
}

#define PRMFAST_BACKWARD(NAME, TARGET, T, UNITS)                                                                                  \
  TARGET void NAME(const Plan<T>& plan, const Inputs<T>& in, const Gradients<T>& grads, T* d_weights, int64_t begin, int64_t end) { \
    backward_tiles<T, UNITS>(plan, in, grads, d_weights, begin, end);                                                             \
  }
PRMFAST_BACKWARD(run_portable, , float, kUnitsPortable)
PRMFAST_BACKWARD(run_portable, , double, kUnitsPortable)
#if PRMFAST_HAS_ISAS
PRMFAST_BACKWARD(run_avx2, PRMFAST_AVX2, float, kUnitsAvx2)
PRMFAST_BACKWARD(run_avx2, PRMFAST_AVX2, double, kUnitsAvx2)
PRMFAST_BACKWARD(run_avx512, PRMFAST_AVX512, float, kUnitsAvx512)
PRMFAST_BACKWARD(run_avx512, PRMFAST_AVX512, double, kUnitsAvx512)
#endif

}  // namespace

template <class T>
void backward(const Shape& shape, const Inputs<T>& in, const T* grad_value, const T* grad_gradient, T* d_rows, T* d_levels,
              const std::vector<T*>& d_wz, int threads) {
  const Isa isa = chosen_isa();
  const Plan<T> plan(shape, in, units_together(isa));
  const int64_t tiles = (in.count + kWidth<T> - 1) / kWidth<T>;
  const int64_t work = in.m * kWidth<T> * 12 * (plan.total_weights + plan.total_units);
  const int used = std::max(1, thread_count(tiles, work, threads));
  std::vector<T> sums(used * plan.total_weights, T(0));
  const Gradients<T> grads{grad_value, grad_gradient, d_rows, d_levels};
  parallel_rows(tiles, used, [&](int thread, int64_t begin, int64_t end) {
    T* d_weights = sums.data() + thread * plan.total_weights;
#if PRMFAST_HAS_ISAS
    if (isa == Isa::kAvx512) return run_avx512(plan, in, grads, d_weights, begin, end);
    if (isa == Isa::kAvx2) return run_avx2(plan, in, grads, d_weights, begin, end);
#endif
    run_portable(plan, in, grads, d_weights, begin, end);
  });
  for (int i = 0; i < plan.layers; ++i)
    for (int64_t k = 0; k < plan.widths[i] * plan.widths[i + 1]; ++k) {
      T total = 0;
      for (int t = 0; t < used; ++t) total += sums[t * plan.total_weights + plan.weights[i] + k];
      d_wz[i][k] = total;
    }
}

template void backward<float>(const Shape&, const Inputs<float>&, const float*, const float*, float*, float*, const std::vector<float*>&,
                              int);
template void backward<double>(const Shape&, const Inputs<double>&, const double*, const double*, double*, double*,
                               const std::vector<double*>&, int);

}  // namespace prmfast::picnn
