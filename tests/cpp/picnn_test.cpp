// forward against dual numbers in a double loop, backward against central differences of that loop.
#include <algorithm>
#include <string>

#include "check.h"
#include "common/amx.h"
#include "picnn/picnn.h"

using prmfast::picnn::Activation;
using prmfast::picnn::Gate;
using prmfast::picnn::Inputs;
using prmfast::picnn::Shape;
using namespace prmfast::test;

namespace {

struct Dual {
  double value, gradient;
};

double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

Dual respond(const Shape& shape, Dual p, bool square) {
  double s, slope;
  if (shape.activation == Activation::kSoftplus) {
    s = softplus(p.value);
    slope = 1 / (1 + std::exp(-p.value));
  } else {
    slope = p.value > 0 ? 1 : shape.negative_slope;
    s = slope * p.value;
  }
  const Dual z{s, slope * p.gradient};
  return square ? Dual{z.value * z.value, 2 * z.value * z.gradient} : z;
}

// One context, one level.
Dual naive(const Shape& shape, const std::vector<double>& row, const std::vector<std::vector<double>>& wz, double x) {
  std::vector<Dual> z;
  for (int i = 0; i <= shape.layers(); ++i) {
    std::vector<Dual> next;
    for (int64_t j = 0; j < shape.widths[i]; ++j) {
      const double v = row[shape.slope(i) + j];
      Dual p{x * v + row[shape.offset(i) + j], v};
      for (size_t k = 0; k < z.size(); ++k) {
        const double gate = row[shape.gate(i) + k];
        const double w = wz[i - 1][j * z.size() + k] * (shape.gate_activation == Gate::kRelu ? std::max(gate, 0.0) : softplus(gate));
        p.value += w * z[k].value;
        p.gradient += w * z[k].gradient;
      }
      next.push_back(i == shape.layers() ? p : respond(shape, p, i == 0 && shape.square_first));
    }
    z = next;
  }
  const double kappa = shape.curvature ? softplus(row[shape.kappa()]) + shape.curvature_floor : 0;
  return {z[0].value + kappa * x * x / 2, z[0].gradient + kappa * x};
}

template <class T>
std::vector<double> doubles(const T* p, int64_t n) {
  return std::vector<double>(p, p + n);
}

template <class T>
struct Problem {
  Problem(Random& random, const Shape& shape, int64_t rows, int64_t m, int64_t level_stride)
      : coefficients(random.fill<T>(rows * shape.row(), -1, 1)), levels(random.fill<T>(extent(rows, m, level_stride), 0, 1)) {
    for (int i = 0; i < shape.layers(); ++i) wz.push_back(random.fill<T>(shape.widths[i] * shape.widths[i + 1], 0, 0.7));
    in = {coefficients.data(), levels.data(), level_stride, {}, rows, m};
    for (const Exact<T>& w : wz) in.wz.push_back(w.data());
  }
  Exact<T> coefficients, levels;
  std::vector<Exact<T>> wz;
  Inputs<T> in;
};

template <class T>
void test_shape(Random& random, const Shape& shape, int64_t rows, int64_t m, int64_t level_stride, int threads) {
  Problem<T> problem(random, shape, rows, m, level_stride);
  std::vector<std::vector<double>> wz;
  for (const Exact<T>& w : problem.wz) wz.push_back(doubles(w.data(), w.size()));
  Exact<T> value(rows * m), gradient(rows * m);
  prmfast::picnn::forward<T>(shape, problem.in, {0, false}, value.data(), gradient.data(), threads);
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t i = 0; i < m; ++i) {
      const auto row = doubles(problem.coefficients.data() + b * shape.row(), shape.row());
      const Dual expected = naive(shape, row, wz, problem.levels[b * level_stride + i]);
      CHECK(near(value[b * m + i], expected.value, tolerance));
      CHECK(near(gradient[b * m + i], expected.gradient, tolerance));
    }

  const Exact<T> g_value = random.fill<T>(rows * m, -1, 1), g_gradient = random.fill<T>(rows * m, -1, 1);
  Exact<T> d_coefficients(rows * shape.row()), d_levels(rows * m);
  std::vector<Exact<T>> d_wz;
  std::vector<T*> pointers;
  for (const Exact<T>& w : problem.wz) d_wz.emplace_back(w.size());
  for (Exact<T>& w : d_wz) pointers.push_back(w.data());
  prmfast::picnn::backward<T>(shape, problem.in, g_value.data(), g_gradient.data(), d_coefficients.data(), d_levels.data(), pointers, threads);
  const auto loss_of = [&](int64_t b, int64_t i, const std::vector<double>& row, double x) {
    const Dual d = naive(shape, row, wz, x);
    return d.value * g_value[b * m + i] + d.gradient * g_gradient[b * m + i];
  };
  const auto loss_of_row = [&](int64_t b, const std::vector<double>& row) {
    double total = 0;
    for (int64_t i = 0; i < m; ++i) total += loss_of(b, i, row, problem.levels[b * level_stride + i]);
    return total;
  };
  constexpr double kStep = 1e-5;
  const double rough = sizeof(T) == 4 ? 2e-4 : 1e-7;
  for (int64_t b = 0; b < rows; ++b) {
    const auto row = doubles(problem.coefficients.data() + b * shape.row(), shape.row());
    for (int64_t i = 0; i < m; ++i) {
      const double x = problem.levels[b * level_stride + i];
      CHECK(near(d_levels[b * m + i], (loss_of(b, i, row, x + kStep) - loss_of(b, i, row, x - kStep)) / (2 * kStep), rough));
    }
    for (int64_t j = 0; j < shape.row(); ++j) {
      auto up = row, down = row;
      up[j] += kStep;
      down[j] -= kStep;
      CHECK(near(d_coefficients[b * shape.row() + j], (loss_of_row(b, up) - loss_of_row(b, down)) / (2 * kStep), rough));
    }
  }
  for (size_t layer = 0; layer < wz.size(); ++layer)
    for (size_t k = 0; k < wz[layer].size(); ++k) {
      double slope = 0;
      for (const double sign : {1.0, -1.0}) {
        wz[layer][k] += sign * kStep;
        for (int64_t b = 0; b < rows; ++b) slope += sign * loss_of_row(b, doubles(problem.coefficients.data() + b * shape.row(), shape.row()));
        wz[layer][k] -= sign * kStep;
      }
      CHECK(near(d_wz[layer][k], slope / (2 * kStep), rough));
    }
}

template <class T>
void test_type() {
  Random random;
  for (const std::vector<int64_t>& widths : {std::vector<int64_t>{1, 1}, {5, 3, 1}}) {
    const Shape smooth{widths, Activation::kSoftplus, 0, false, Gate::kSoftplus, true, 0.1};
    const Shape leaky{widths, Activation::kLeakyRelu, 0.2, true, Gate::kRelu, false, 0};
    for (const int64_t rows : {0, 1, 3})
      for (const int64_t m : {1, 8, 17}) {
        test_shape<T>(random, smooth, rows, m, rows == 1 ? 0 : m + 2, 1);
        test_shape<T>(random, leaky, rows, m, rows == 1 ? m : 0, 1);
      }
    test_shape<T>(random, smooth, 17, 3, 3, 3);
  }
}

}  // namespace

int main() {
  prmfast::chosen_amx() = prmfast::Amx::kOff;
  each_isa([] {
    test_type<float>();
    test_type<double>();
  });
  prmfast::chosen_amx() = prmfast::Amx::kEmulated;
  test_type<float>();
  prmfast::chosen_amx() = prmfast::Amx::kNative;
  if (prmfast::amx_available()) test_type<float>();
}
