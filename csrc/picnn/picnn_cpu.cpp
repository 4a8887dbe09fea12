// Dual numbers in registers: eight levels of one context at a time, value and tangent side by side.
#include <algorithm>
#include <numeric>

#include "common/parallel_for.h"
#include "common/simd.h"
#include "common/vec.h"
#include "picnn/picnn.h"

namespace prmfast::picnn {

int64_t Shape::slope(int i) const { return 2 * std::accumulate(widths.begin(), widths.begin() + i, int64_t{0}); }
int64_t Shape::offset(int i) const { return slope(i) + widths[i]; }
int64_t Shape::gate(int i) const {
  return slope(layers() + 1) + std::accumulate(widths.begin(), widths.begin() + (i - 1), int64_t{0});
}
int64_t Shape::row() const { return gate(layers() + 1) + 1; }

namespace {

// The offsets of one row, computed once per call.
struct Plan {
  explicit Plan(const Shape& s) : widths(s.widths), layers(s.layers()), row(s.row()) {
    for (int i = 0; i <= layers; ++i) {
      slope.push_back(s.slope(i));
      offset.push_back(s.offset(i));
      gate.push_back(i ? s.gate(i) : -1);
      units.push_back(total_units);
      if (i < layers) total_units += widths[i];
    }
    widest = *std::max_element(widths.begin(), widths.end());
    for (int i = 0; i < layers; ++i) {
      weights.push_back(total_weights);
      total_weights += widths[i] * widths[i + 1];
    }
  }
  std::vector<int64_t> widths, slope, offset, gate, units, weights;
  int layers;
  int64_t row, total_units = 0, total_weights = 0, widest = 0;
};

template <class T>
struct Response {
  Vec<T> value, first, second;  // s(p), s'(p), s''(p)
};

template <class T>
PRMFAST_INLINE Response<T> respond(Vec<T> p, Activation activation, T slope, bool square) {
  Response<T> r;
  const auto positive = p > 0;
  if (activation == Activation::kSoftplus) {
    const Vec<T> e = exp_negative(positive ? p : -p), inverse = T(1) / (T(1) + e);
    r.value = (positive ? p : Vec<T>{}) + log1p_unit(e);
    r.first = positive ? inverse : e * inverse;
    r.second = e * inverse * inverse;
  } else {
    r.first = positive ? broadcast(T(1)) : broadcast(slope);
    r.value = p * r.first;
    r.second = Vec<T>{};
  }
  if (square) {
    r.second = T(2) * (r.first * r.first + r.value * r.second);
    r.first = T(2) * r.value * r.first;
    r.value = r.value * r.value;
  }
  return r;
}

// What one block of eight levels leaves behind for its backward pass, [total_units] each.
template <class T>
struct Tape {
  explicit Tape(const Plan& plan)
      : z(plan.total_units), dz(plan.total_units), first(plan.total_units), second(plan.total_units), dp(plan.total_units),
        a(plan.total_units), da(plan.total_units) {}
  VecBuffer<T> z, dz, first, second, dp, a, da;  // a = gate * z, da = gate * dz: the next layer's inputs
};

// kUnits output units of layer i at once, all accumulators in registers: p = x v + c + W a, dp = v + W da.
template <class T, int kUnits>
PRMFAST_INLINE void dense_tile(const T* v, const T* c, const T* weight, int64_t from, const Vec<T>* a, const Vec<T>* da, Vec<T> x,
                               Vec<T>* out_p, Vec<T>* out_dp) {
  Vec<T> p[kUnits], dp[kUnits];
#pragma GCC unroll 8
  for (int j = 0; j < kUnits; ++j) {
    dp[j] = broadcast(v[j]);
    p[j] = x * v[j] + c[j];
  }
  for (int64_t k = 0; k < from; ++k) {
    const Vec<T> ak = a[k], dak = da[k];
#pragma GCC unroll 8
    for (int j = 0; j < kUnits; ++j) {
      const T w = weight[j * from + k];
      p[j] += w * ak;
      dp[j] += w * dak;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kUnits; ++j) {
    out_p[j] = p[j];
    out_dp[j] = dp[j];
  }
}

template <class T>
PRMFAST_INLINE void block_forward(const Plan& plan, const Shape& shape, const Inputs<T>& in, const T* row, Vec<T> x, Tape<T>& tape,
                                  Vec<T>& value, Vec<T>& gradient) {
  const T slope = static_cast<T>(shape.negative_slope);
  for (int i = 0; i <= plan.layers; ++i) {
    const int64_t out = plan.widths[i], from = i ? plan.widths[i - 1] : 0, base = i < plan.layers ? plan.units[i] : 0;
    const T *v = row + plan.slope[i], *c = row + plan.offset[i], *weight = i ? in.wz[i - 1] : nullptr;
    const Vec<T>*a = i ? &tape.a[plan.units[i - 1]] : nullptr, *da = i ? &tape.da[plan.units[i - 1]] : nullptr;
    if (i == plan.layers) {
      dense_tile<T, 1>(v, c, weight, from, a, da, x, &value, &gradient);
      break;
    }
    Vec<T>*p = &tape.z[base], *dp = &tape.dp[base];
    int64_t j = 0;
    for (; j + 4 <= out; j += 4) dense_tile<T, 4>(v + j, c + j, weight + j * from, from, a, da, x, p + j, dp + j);
    for (; j < out; ++j) dense_tile<T, 1>(v + j, c + j, weight + j * from, from, a, da, x, p + j, dp + j);
    const T* next_gate = row + plan.gate[i + 1];
    const bool square = i == 0 && shape.square_first;
    for (j = 0; j < out; ++j) {
      const Response<T> r = respond<T>(p[j], shape.activation, slope, square);
      const Vec<T> dz = r.first * dp[j];
      p[j] = r.value;
      tape.dz[base + j] = dz;
      tape.first[base + j] = r.first;
      tape.second[base + j] = r.second;
      tape.a[base + j] = next_gate[j] * r.value;
      tape.da[base + j] = next_gate[j] * dz;
    }
  }
  const T kappa = row[plan.row - 1];
  value += T(0.5) * kappa * x * x;
  gradient += kappa * x;
}

// The adjoints of one block; d_row gets scalars, weight_sums keeps one lane-wise sum per weight.
template <class T>
struct Adjoints {
  explicit Adjoints(const Plan& plan) : p(plan.widest), dp(plan.widest), z(plan.widest), dz(plan.widest), weight_sums(plan.total_weights) {}
  VecBuffer<T> p, dp, z, dz, weight_sums;
};

// kUnits input units at once: z = W^T p, dz = W^T dp, and the lane-wise sums p a + dp da of every weight.
template <class T, int kUnits>
PRMFAST_INLINE void transposed_tile(const T* weight, int64_t out, int64_t stride, const Vec<T>* p, const Vec<T>* dp, const Vec<T>* a,
                                    const Vec<T>* da, Vec<T>* z, Vec<T>* dz, Vec<T>* weight_sum) {
  Vec<T> sum_z[kUnits] = {}, sum_dz[kUnits] = {}, own_a[kUnits], own_da[kUnits];
#pragma GCC unroll 8
  for (int k = 0; k < kUnits; ++k) {
    own_a[k] = a[k];
    own_da[k] = da[k];
  }
  for (int64_t j = 0; j < out; ++j) {
    const Vec<T> pj = p[j], dpj = dp[j];
#pragma GCC unroll 8
    for (int k = 0; k < kUnits; ++k) {
      const T w = weight[j * stride + k];
      sum_z[k] += w * pj;
      sum_dz[k] += w * dpj;
      weight_sum[j * stride + k] += pj * own_a[k] + dpj * own_da[k];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kUnits; ++k) {
    z[k] = sum_z[k];
    dz[k] = sum_dz[k];
  }
}

template <class T>
PRMFAST_INLINE void block_backward(const Plan& plan, const Inputs<T>& in, const T* row, Vec<T> x, const Tape<T>& tape, Vec<T> g_value,
                                   Vec<T> g_gradient, Adjoints<T>& adj, T* d_row, Vec<T>& d_x) {
  const T kappa = row[plan.row - 1];
  d_row[plan.row - 1] += sum<T>(T(0.5) * x * x * g_value + x * g_gradient);
  d_x = kappa * x * g_value + kappa * g_gradient;
  adj.p[0] = g_value;
  adj.dp[0] = g_gradient;
  for (int i = plan.layers; i >= 0; --i) {
    const int64_t out = plan.widths[i];
    const T* v = row + plan.slope[i];
    if (i < plan.layers)
      for (int64_t j = 0; j < out; ++j) {
        const int64_t unit = plan.units[i] + j;
        adj.p[j] = tape.first[unit] * adj.z[j] + tape.second[unit] * tape.dp[unit] * adj.dz[j];
        adj.dp[j] = tape.first[unit] * adj.dz[j];
      }
    for (int64_t j = 0; j < out; ++j) {
      d_row[plan.slope[i] + j] += sum<T>(x * adj.p[j] + adj.dp[j]);
      d_row[plan.offset[i] + j] += sum<T>(adj.p[j]);
      d_x += v[j] * adj.p[j];
    }
    if (i == 0) break;
    const int64_t from = plan.widths[i - 1], base = plan.units[i - 1];
    const T *weight = in.wz[i - 1], *gate = row + plan.gate[i];
    Vec<T>* weight_sum = &adj.weight_sums[plan.weights[i - 1]];
    int64_t k = 0;
    for (; k + 4 <= from; k += 4)
      transposed_tile<T, 4>(weight + k, out, from, &adj.p[0], &adj.dp[0], &tape.a[base + k], &tape.da[base + k], &adj.z[k], &adj.dz[k],
                            weight_sum + k);
    for (; k < from; ++k)
      transposed_tile<T, 1>(weight + k, out, from, &adj.p[0], &adj.dp[0], &tape.a[base + k], &tape.da[base + k], &adj.z[k], &adj.dz[k],
                            weight_sum + k);
    for (k = 0; k < from; ++k) {
      d_row[plan.gate[i] + k] += sum<T>(adj.z[k] * tape.z[base + k] + adj.dz[k] * tape.dz[base + k]);
      adj.z[k] = gate[k] * adj.z[k];
      adj.dz[k] = gate[k] * adj.dz[k];
    }
  }
}

template <class T>
PRMFAST_INLINE void forward_rows(const Plan& plan, const Shape& shape, const Inputs<T>& in, T* value, T* gradient, int64_t begin,
                                 int64_t end) {
  Tape<T> tape(plan);
  for (int64_t b = begin; b < end; ++b) {
    const T *row = in.coefficients + b * plan.row, *levels = in.levels + b * in.level_stride;
    for (int64_t m = 0; m < in.m; m += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, in.m - m);
      Vec<T> v{}, g{};
      block_forward<T>(plan, shape, in, row, load_n(levels + m, n), tape, v, g);
      store_n(value + b * in.m + m, v, n);
      store_n(gradient + b * in.m + m, g, n);
    }
  }
}

template <class T>
struct Gradients {
  const T *value, *gradient;
  T *coefficients, *levels;
};

template <class T>
PRMFAST_INLINE void backward_rows(const Plan& plan, const Shape& shape, const Inputs<T>& in, const Gradients<T>& grads, T* d_weights,
                                  int64_t begin, int64_t end) {
  Tape<T> tape(plan);
  Adjoints<T> adj(plan);
  for (int64_t b = begin; b < end; ++b) {
    const T *row = in.coefficients + b * plan.row, *levels = in.levels + b * in.level_stride;
    T* d_row = grads.coefficients + b * plan.row;
    std::fill(d_row, d_row + plan.row, T(0));
    for (int64_t m = 0; m < in.m; m += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, in.m - m), at = b * in.m + m;
      const Vec<T> x = load_n(levels + m, n);
      Vec<T> v{}, g{}, d_x{};
      block_forward<T>(plan, shape, in, row, x, tape, v, g);
      block_backward<T>(plan, in, row, x, tape, load_zero(grads.value + at, n), load_zero(grads.gradient + at, n), adj, d_row, d_x);
      store_n(grads.levels + at, d_x, n);
    }
  }
  for (int64_t i = 0; i < plan.total_weights; ++i) d_weights[i] = sum<T>(adj.weight_sums[i]);
}

// target_clones wants plain functions, one per type.
PRMFAST_MULTIVERSION void run_forward(const Plan& plan, const Shape& shape, const Inputs<float>& in, float* value, float* gradient,
                                      int64_t begin, int64_t end) {
  forward_rows<float>(plan, shape, in, value, gradient, begin, end);
}
PRMFAST_MULTIVERSION void run_forward(const Plan& plan, const Shape& shape, const Inputs<double>& in, double* value, double* gradient,
                                      int64_t begin, int64_t end) {
  forward_rows<double>(plan, shape, in, value, gradient, begin, end);
}
PRMFAST_MULTIVERSION void run_backward(const Plan& plan, const Shape& shape, const Inputs<float>& in, const Gradients<float>& grads,
                                       float* d_weights, int64_t begin, int64_t end) {
  backward_rows<float>(plan, shape, in, grads, d_weights, begin, end);
}
PRMFAST_MULTIVERSION void run_backward(const Plan& plan, const Shape& shape, const Inputs<double>& in, const Gradients<double>& grads,
                                       double* d_weights, int64_t begin, int64_t end) {
  backward_rows<double>(plan, shape, in, grads, d_weights, begin, end);
}

}  // namespace

template <class T>
void forward(const Shape& shape, const Inputs<T>& in, T* value, T* gradient, int threads) {
  const Plan plan(shape);
  const int used = thread_count(in.rows, in.m * 4 * (plan.total_weights + plan.total_units), threads);
  parallel_rows(in.rows, used, [&](int, int64_t begin, int64_t end) { run_forward(plan, shape, in, value, gradient, begin, end); });
}

template <class T>
void backward(const Shape& shape, const Inputs<T>& in, const T* grad_value, const T* grad_gradient, T* d_coefficients, T* d_levels,
              const std::vector<T*>& d_wz, int threads) {
  const Plan plan(shape);
  const int used = std::max(1, thread_count(in.rows, in.m * 12 * (plan.total_weights + plan.total_units), threads));
  std::vector<T> sums(used * plan.total_weights, T(0));
  const Gradients<T> grads{grad_value, grad_gradient, d_coefficients, d_levels};
  parallel_rows(in.rows, used, [&](int thread, int64_t begin, int64_t end) {
    run_backward(plan, shape, in, grads, sums.data() + thread * plan.total_weights, begin, end);
  });
  for (int i = 0; i < plan.layers; ++i)
    for (int64_t k = 0; k < plan.widths[i] * plan.widths[i + 1]; ++k) {
      T total = 0;
      for (int t = 0; t < used; ++t) total += sums[t * plan.total_weights + plan.weights[i] + k];
      d_wz[i][k] = total;
    }
}

template void forward<float>(const Shape&, const Inputs<float>&, float*, float*, int);
template void forward<double>(const Shape&, const Inputs<double>&, double*, double*, int);
template void backward<float>(const Shape&, const Inputs<float>&, const float*, const float*, float*, float*, const std::vector<float*>&,
                              int);
template void backward<double>(const Shape&, const Inputs<double>&, const double*, const double*, double*, double*,
                               const std::vector<double*>&, int);

}  // namespace prmfast::picnn
