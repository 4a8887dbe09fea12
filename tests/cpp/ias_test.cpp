// budget, curve and allocate against double loops.
#include <algorithm>
#include <limits>

#include "check.h"
#include "ias/ias.h"

using prmfast::ias::Quantiles;
using namespace prmfast::test;

namespace {

template <class T>
double success(const T* p, int64_t columns, int64_t n) {
  double total = 0;
  for (int64_t m = 0; m < columns; ++m) total += 1 - std::pow(1 - std::clamp<double>(p[m], 0, 1), static_cast<double>(n));
  return total / static_cast<double>(columns);
}

// Right, and one off only where the curve touches the target.
template <class T>
void check_budget(const T* p, int64_t columns, double target, int64_t n_max, int32_t got) {
  CHECK(got >= 1 && got <= n_max);
  CHECK(got == n_max || success(p, columns, got) > target - 1e-11);
  CHECK(got == 1 || success(p, columns, got - 1) < target + 1e-11);
}

template <class T>
void test_shape(Random& random, int64_t rows, int64_t columns, int64_t stride, int threads) {
  Exact<T> p = random.fill<T>(extent(rows, columns, stride), -0.1, 1.1);
  for (int64_t row = 0; row < rows; ++row) {  // hard questions too, which need many samples
    const double scale = random.uniform(0, 1);
    if (row % 2)
      for (int64_t m = 0; m < columns; ++m) p[row * stride + m] = static_cast<T>(0.05 * scale * p[row * stride + m]);
  }
  const Quantiles<T> quantiles{p.data(), rows, columns, stride};
  const Exact<double> one(1, 0.9);
  for (const int64_t n_max : {1, 2, 64, 67, 200, 70000}) {
    Exact<int32_t> budgets(rows, -1);
    CHECK(prmfast::ias::budget<T>(quantiles, {one.data(), 0}, n_max, budgets.data(), threads) == -1);
    for (int64_t row = 0; row < rows; ++row) check_budget(p.data() + row * stride, columns, 0.9, n_max, budgets[row]);
    const Exact<double> targets = random.fill<double>(rows, 0.01, 0.99);
    CHECK(prmfast::ias::budget<T>(quantiles, {targets.data(), 1}, n_max, budgets.data(), threads) == -1);
    for (int64_t row = 0; row < rows; ++row) check_budget(p.data() + row * stride, columns, targets[row], n_max, budgets[row]);
    if (n_max > 67) continue;
    Exact<T> curve(rows * n_max, T(-1));
    CHECK(prmfast::ias::curve<T>(quantiles, n_max, curve.data(), threads) == -1);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t n = 1; n <= n_max; ++n) {
        const T got = curve[row * n_max + n - 1];
        CHECK(near(got, success(p.data() + row * stride, columns, n), sizeof(T) == 4 ? 1e-7 : 1e-12));
        CHECK(got >= 0 && got <= 1 && (n == 1 || got >= curve[row * n_max + n - 2]));
      }
    Exact<int32_t> given(rows, -1);
    const int64_t n_min = std::min<int64_t>(1, n_max), total = rows * n_min + 3 * rows / 2;
    CHECK(prmfast::ias::allocate<T>(quantiles, total, n_max, n_min, given.data(), threads) == -1);
    int64_t sum = 0;
    double worst_given = 2, best_refused = -1;
    for (int64_t row = 0; row < rows; ++row) {
      const T* q = p.data() + row * stride;
      CHECK(given[row] >= n_min && given[row] <= n_max);
      sum += given[row];
      if (given[row] > n_min) worst_given = std::min(worst_given, success(q, columns, given[row]) - success(q, columns, given[row] - 1));
      if (given[row] < n_max) best_refused = std::max(best_refused, success(q, columns, given[row] + 1) - success(q, columns, given[row]));
    }
    CHECK(sum == std::min(total, rows * n_max));
    CHECK(worst_given > best_refused - 1e-9);
  }
}

template <class T>
void test_nan(int64_t rows, int64_t columns) {
  Exact<T> p(rows * columns, T(0.5));
  const Exact<double> target(1, 0.9);
  Exact<int32_t> out(rows);
  Exact<T> curve(rows * 70);
  for (const int64_t row : {int64_t{0}, rows / 2, rows - 1}) {
    p[row * columns + columns - 1] = std::numeric_limits<T>::quiet_NaN();
    const Quantiles<T> quantiles{p.data(), rows, columns, columns};
    CHECK(prmfast::ias::budget<T>(quantiles, {target.data(), 0}, 64, out.data(), 1) == row);
    CHECK(prmfast::ias::budget<T>(quantiles, {target.data(), 0}, 1, out.data(), 1) == row);
    CHECK(prmfast::ias::curve<T>(quantiles, 70, curve.data(), 1) == row);
    CHECK(prmfast::ias::allocate<T>(quantiles, rows, 9, 0, out.data(), 1) == row);
    CHECK(prmfast::ias::allocate<T>(quantiles, rows, 9, 1, out.data(), 1) == row);
    p[row * columns + columns - 1] = T(0.5);
  }
}

// Enough rows for three threads: what they give is what one gives.
template <class T>
void test_threads(Random& random) {
  const int64_t rows = 3000, columns = 100, n_max = 64;
  const Exact<T> p = random.fill<T>(rows * columns, 0, 0.2);
  const Exact<double> target(1, 0.9);
  const Quantiles<T> quantiles{p.data(), rows, columns, columns};
  Exact<int32_t> budgets[2] = {Exact<int32_t>(rows), Exact<int32_t>(rows)}, given[2] = {Exact<int32_t>(rows), Exact<int32_t>(rows)};
  Exact<T> curve[2] = {Exact<T>(rows * n_max), Exact<T>(rows * n_max)};
  for (const int i : {0, 1}) {
    const int threads = i == 0 ? 1 : 3;
    prmfast::ias::budget<T>(quantiles, {target.data(), 0}, n_max, budgets[i].data(), threads);
    prmfast::ias::curve<T>(quantiles, n_max, curve[i].data(), threads);
    prmfast::ias::allocate<T>(quantiles, 2 * rows, n_max, 0, given[i].data(), threads);
  }
  for (int64_t i = 0; i < rows; ++i) CHECK(budgets[0][i] == budgets[1][i] && given[0][i] == given[1][i]);
  for (int64_t i = 0; i < rows * n_max; ++i) CHECK(curve[0][i] == curve[1][i]);
}

template <class T>
void test_type() {
  Random random;
  for (const int64_t columns : {1, 7, 8, 9, 15, 16, 17})
    for (const int64_t rows : {0, 1, 5, 17}) test_shape<T>(random, rows, columns, columns + rows % 4, 1);
  for (const int64_t rows : {4, 16, 33}) test_shape<T>(random, rows, 11, rows == 16 ? 0 : 11, 1);
  test_shape<T>(random, 4, 100, 100, 1);
  test_threads<T>(random);
  for (const int64_t rows : {1, 2, 16, 40}) test_nan<T>(rows, 13);
}

}  // namespace

int main() {
  each_isa([] {
    test_type<float>();
    test_type<double>();
  });
}
