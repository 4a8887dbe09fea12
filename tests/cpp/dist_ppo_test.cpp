// Loss and gradient, whole and in blocks of columns, against the formula in a double loop.
#include <algorithm>
#include <limits>

#include "check.h"
#include "common/sweep.h"
#include "dist_ppo/dist_ppo.h"

using namespace prmfast;
using namespace prmfast::test;
using namespace prmfast::dist_ppo;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Entries of every row, and what the objective knows of them.
struct Problem {
  Exact<int64_t> offsets, ids;
  Exact<double> policy_logp, advantage, weight;
  double temperature;

  Entries entries() const { return {offsets.data(), offsets.data() + 1, ids.data()}; }
  Objective objective() const {
    return {policy_logp.data(), advantage.data(), weight.data(), 1, 0.2, 0.28, kInf, temperature};
  }
  int64_t rows() const { return offsets.size() - 1; }
};

// Two candidates in most rows, the first and the last column among them; none in every third row.
Problem make_problem(Random& random, int64_t rows, int64_t columns, double temperature) {
  Exact<int64_t> offsets(rows + 1), ids(2 * rows);
  int64_t count = 0;
  for (int64_t t = 0; t < rows; ++t) {
    if (t % 3 != 2) ids[count++] = t % 2 ? (columns - 1) / 2 : 0;
    if (t % 3 != 2 && columns > 2) ids[count++] = columns - 1;
    offsets[t + 1] = count;
  }
  Exact<int64_t> used(count);
  for (int64_t e = 0; e < count; ++e) used[e] = ids[e];
  return {std::move(offsets), std::move(used), random.fill<double>(count, -3, -0.1), random.fill<double>(count, -2, -0.1),
          random.fill<double>(rows, 0.5, 2), temperature};
}

struct Truth {
  double loss = 0;
  Exact<double> grad;
};

// A is negative and nothing clips it below: where rho exceeds 1 - clip_low the branch is open.
template <class S>
Truth truth(const Exact<S>& x, int64_t columns, int64_t stride, const Problem& problem) {
  Truth found{0, Exact<double>(problem.rows() * columns, 0.0)};
  for (int64_t t = 0; t < problem.rows(); ++t) {
    const S* row = x.data() + t * stride;
    double top = -kInf, sum = 0;
    for (int64_t v = 0; v < columns; ++v) top = std::max<double>(top, widen1(row + v));
    for (int64_t v = 0; v < columns; ++v) sum += std::exp((widen1(row + v) - top) / problem.temperature);
    const auto p = [&](int64_t v) { return std::exp((widen1(row + v) - top) / problem.temperature) / sum; };
    for (int64_t e = problem.offsets[t]; e < problem.offsets[t + 1]; ++e) {
      const double now = p(problem.ids[e]), old = std::exp(problem.policy_logp[e]), weight = problem.weight[t];
      const double a = problem.advantage[e], shut = std::clamp(now, 0.8 * old, 1.28 * old) * a;
      found.loss -= weight * std::min(now * a, shut);
      if (now * a > shut) continue;
      const double g = -weight * now * a;
      for (int64_t v = 0; v < columns; ++v)
        found.grad[t * columns + v] += g * ((v == problem.ids[e]) - p(v)) / problem.temperature;
    }
  }
  return found;
}

template <class S>
constexpr double kStep = 3e-6;
template <>
constexpr double kStep<BFloat16> = 0x1p-8;
template <>
constexpr double kStep<Float16> = 0x1p-10;

template <class S>
void check_gradient(const Exact<S>& got, int64_t columns, int64_t stride, const Truth& expected) {
  const int64_t rows = expected.grad.size() / columns;
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t v = 0; v < columns; ++v) {
      const double e = expected.grad[t * columns + v];
      CHECK(std::abs(widen1(got.data() + t * stride + v) - e) <= kStep<S> * std::abs(e) + (sizeof(S) == 2 ? 3e-7 : 1e-11));
    }
}

template <class S>
Exact<S> make_logits(Random& random, int64_t rows, int64_t columns, int64_t stride, double away) {
  Exact<S> x(extent(rows, columns, stride), S{});
  for (int64_t i = 0; i < x.size(); ++i) store1(x.data() + i, away + random.uniform(-4, 4));
  for (int64_t t = 0; t < rows && columns > 4; ++t) {
    store1(x.data() + t * stride + 1, -kInf);
    store1(x.data() + t * stride + columns - 2, away + 6);
  }
  return x;
}

template <class S>
void test_shape(Random& random, int64_t rows, int64_t columns, int64_t gap, double away, double temperature, int threads) {
  const Problem problem = make_problem(random, rows, columns, temperature);
  const int64_t stride = columns + gap, out_stride = columns + 3 - gap;
  Exact<S> x = make_logits<S>(random, rows, columns, stride, away);
  const Truth expected = truth(x, columns, stride, problem);
  Exact<double> lse(rows), coefficients(problem.ids.size());
  Exact<S> out(extent(rows, columns, out_stride), S{}), again(extent(rows, columns, out_stride), S{});
  const double tolerance = 1e-6;
  const Rows<const S> logits{x.data(), rows, columns, stride};
  const Rows<S> target{out.data(), rows, columns, out_stride};
  CHECK(near(loss<S>(logits, problem.entries(), problem.objective(), lse.data(), coefficients.data(), threads), expected.loss, tolerance));
  gradient<S>(logits, problem.entries(), lse.data(), coefficients.data(), temperature, {again.data(), rows, columns, out_stride}, threads);
  check_gradient(again, columns, out_stride, expected);
  const auto both = [&](const Rows<S>& to) {
    return loss_and_gradient<S>(logits, problem.entries(), problem.objective(), lse.data(), coefficients.data(), to, threads);
  };
  CHECK(near(both(target), expected.loss, tolerance));
  CHECK(out.size() == 0 || std::equal(out.data(), out.data() + out.size(), again.data(), [](const S& a, const S& b) { return widen1(&a) == widen1(&b); }));
  CHECK(near(both({x.data(), rows, columns, stride}), expected.loss, tolerance));
  check_gradient(x, columns, stride, expected);
}

void test_blocks(Random& random, int64_t rows, int64_t columns, int64_t width, int threads) {
  const double temperature = 0.7;
  const Problem problem = make_problem(random, rows, columns, temperature);
  const Exact<float> x = make_logits<float>(random, rows, columns, columns, 3);
  const Truth expected = truth(x, columns, columns, problem);
  Exact<double> reference(rows, 0.0), sum(rows, 0.0), lse(rows), whole(rows), coefficients(problem.ids.size());
  Exact<float> entry_logits(problem.ids.size()), grad(rows * columns);
  loss<float>({x.data(), rows, columns, columns}, problem.entries(), problem.objective(), whole.data(), coefficients.data(), threads);
  const auto each_block = [&](const auto& use) {
    for (int64_t first = 0; first < columns; first += width) {
      const int64_t n = std::min(width, columns - first);
      Exact<float> block(rows * n);
      for (int64_t i = 0; i < rows * n; ++i) block[i] = x[i / n * columns + first + i % n];
      use(block, first, n);
    }
  };
  each_block([&](Exact<float>& block, int64_t first, int64_t n) {
    absorb_block({block.data(), rows, n, n}, first, problem.entries(), temperature, reference.data(), sum.data(), entry_logits.data(), threads);
  });
  finish_blocks(reference.data(), sum.data(), rows, problem.entries(), entry_logits.data(), temperature, lse.data());
  for (int64_t t = 0; t < rows; ++t)
    if (problem.offsets[t] < problem.offsets[t + 1]) CHECK(near(lse[t], whole[t], 1e-7));
  each_block([&](Exact<float>& block, int64_t first, int64_t n) {
    differentiate_block({block.data(), rows, n, n}, first, problem.entries(), lse.data(), coefficients.data(), temperature, threads);
    for (int64_t i = 0; i < rows * n; ++i) grad[i / n * columns + first + i % n] = block[i];
  });
  check_gradient(grad, columns, columns, expected);
}

// NaN, +inf or nothing above -inf, beside a candidate or at it: the log-sum-exp says so, and no row is written.
template <class S>
void test_no_distribution(int64_t columns) {
  for (const double bad : {std::nan(""), kInf, -kInf})
    for (const int64_t at : {int64_t{0}, columns - 1}) {
      Exact<S> x(columns, S{}), out(columns, S{});
      store1(x.data() + at, bad);
      for (int64_t v = 0; v < columns && bad == -kInf; ++v) store1(x.data() + v, bad);
      const Exact<int64_t> offsets = [] { Exact<int64_t> o(2, 1); o[0] = 0; return o; }();
      const Exact<int64_t> ids(1, 0);
      const Exact<double> one(1, -1.0);
      Exact<double> lse(1), coefficients(1);
      loss_and_gradient<S>({x.data(), 1, columns, columns}, {offsets.data(), offsets.data() + 1, ids.data()},
                           {one.data(), one.data(), one.data(), 0, 0.2, 0.2, kInf, 1}, lse.data(), coefficients.data(),
                           {out.data(), 1, columns, columns}, 1);
      CHECK(!std::isfinite(lse[0]));
      for (int64_t v = 0; v < columns; ++v) CHECK(widen1(out.data() + v) == 0);
    }
}

template <class S>
void test_storage(Random& random) {
  for (const int64_t columns : {1, 2, 15, 16, 31, 63, 64, 65, 127, 2047, 2048, 2049, 4160})
    for (const int64_t gap : {0, 3}) test_shape<S>(random, columns < 100 ? 7 : 3, columns, gap, 0, 1, gap ? 3 : 1);
  for (const double away : {-300.0, 12.0, 3000.0}) test_shape<S>(random, 3, 130, 1, away, 0.3, 1);
  test_shape<S>(random, 0, 10, 0, 0, 1, 2);
  for (const int64_t columns : {1, 64, 70, 2100}) test_no_distribution<S>(columns);
}

}  // namespace

int main() {
  each_isa([] {
    Random random;
    test_storage<float>(random);
    test_storage<BFloat16>(random);
    test_storage<Float16>(random);
    for (const int64_t width : {1, 17, 64, 2049}) test_blocks(random, 5, 2100 / (width == 1 ? 30 : 1), width, 2);
  });
}
