// Candidates and token log-probabilities against softmaxes in double loops.
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "candidate_td/candidate_td.h"
#include "check.h"
#include "common/sweep.h"

using namespace prmfast::candidate_td;
using namespace prmfast::test;
using prmfast::BFloat16;
using prmfast::Fault;
using prmfast::Float16;
using prmfast::store1;
using prmfast::widen1;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();

template <class S>
constexpr Dtype kDtype = std::is_same_v<S, float>      ? Dtype::float32
                         : std::is_same_v<S, double>   ? Dtype::float64
                         : std::is_same_v<S, BFloat16> ? Dtype::bfloat16
                                                       : Dtype::float16;

// What a sum of float32 terms may be off by; and a gradient's rounding to its storage.
template <class S>
constexpr double kError = std::is_same_v<S, double> ? 1e-12 : 4e-6;
template <class S>
constexpr double kRounding = sizeof(S) == 2 ? 4e-3 : 0;

// A matrix whose rows may lie apart; what lies between them is NaN.
template <class S>
struct Matrix {
  Matrix(int64_t rows, int64_t columns, int64_t stride) : columns(columns), stride(stride), values(extent(rows, columns, stride)) {
    for (int64_t i = 0; i < values.size(); ++i) store1(&values[i], kNan);
  }
  void set(int64_t row, int64_t column, double x) { store1(&values[row * stride + column], x); }
  std::vector<double> row(int64_t t) const {
    std::vector<double> wide;
    for (int64_t v = 0; v < columns; ++v) wide.push_back(widen1(&values[t * stride + v]));
    return wide;
  }
  Logits view() const { return {values.data(), kDtype<S>, stride}; }

  int64_t columns, stride;
  Exact<S> values;
};

// Noise, a few likely tokens, and masked ones; never a row of nothing.
template <class S>
Matrix<S> logits(Random& random, int64_t rows, int64_t columns, int64_t stride) {
  Matrix<S> matrix(rows, columns, stride);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t v = 0; v < columns; ++v) matrix.set(t, v, random.uniform(0, 1) < 0.1 ? -kInf : random.uniform(-4, 4));
    for (int64_t i = 0; i < t % 4; ++i) matrix.set(t, static_cast<int64_t>(random.uniform(0, 1) * columns), random.uniform(11, 14));
    matrix.set(t, columns - 1, t % 2 ? 12.5 : 2.0);  // the last column of the last vector counts
  }
  return matrix;
}

std::vector<double> log_softmax(std::vector<double> x, double temperature) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double v : x) sum += std::exp((v - top) / temperature);
  for (double& v : x) v = (v - top) / temperature - std::log(sum);
  return x;
}

struct Csr {
  explicit Csr(const Result& result, int64_t rows)
      : offsets(rows + 1, -1), ids(result.entries(), -1), logp(result.entries(), kNan), advantage(result.entries(), kNan) {
    CHECK(result.invalid().row == -1);
    result.write(offsets.data(), ids.data(), logp.data(), advantage.data());
  }
  Exact<int64_t> offsets, ids;
  Exact<double> logp, advantage;
};

// Row t of `got` holds the tokens of probability p_min or more, and the sampled one; those within `error` of p_min may be missing.
template <class P, class R>
void check_row(const Csr& got, int64_t t, const Matrix<P>& policy, const Matrix<R>& reward, const Options& options, int64_t sampled) {
  const auto p = log_softmax(policy.row(t), options.policy_temperature), q = log_softmax(reward.row(t), options.reward_temperature);
  const double error = std::max(kError<P>, kError<R>), least = std::log(options.p_min) - kTouch;
  int64_t entry = got.offsets[t];
  for (int64_t v = 0; v < policy.columns; ++v) {
    const bool there = entry < got.offsets[t + 1] && got.ids[entry] == v;
    if (v == sampled || p[v] > least + error) CHECK(there);
    if (!there) continue;
    CHECK(v == sampled || p[v] > least - error);
    CHECK(got.logp[entry] == p[v] || near(got.logp[entry], p[v], error));
    const double advantage = p[v] == q[v] ? 0 : options.beta * (q[v] - p[v]);
    const double allowed = options.beta * 2 * error * (1 + std::abs(p[v]) + std::abs(q[v]));
    CHECK(got.advantage[entry] == advantage || std::abs(got.advantage[entry] - advantage) <= allowed);
    ++entry;
  }
  CHECK(entry == got.offsets[t + 1]);
}

template <class P, class R>
void check_all(const Csr& got, int64_t rows, const Matrix<P>& policy, const Matrix<R>& reward, const Options& options,
               const int64_t* sampled) {
  CHECK(got.offsets[0] == 0 && got.offsets[rows] == got.ids.size());
  for (int64_t t = 0; t < rows; ++t) check_row(got, t, policy, reward, options, sampled == nullptr ? -1 : sampled[t]);
}

void check_same(const Csr& a, const Csr& b) {
  CHECK(a.offsets.size() == b.offsets.size() && a.ids.size() == b.ids.size());
  for (int64_t i = 0; i < a.offsets.size(); ++i) CHECK(a.offsets[i] == b.offsets[i]);
  for (int64_t i = 0; i < a.ids.size(); ++i) CHECK(a.ids[i] == b.ids[i] && a.logp[i] == b.logp[i] && a.advantage[i] == b.advantage[i]);
}

template <class P, class R>
void test_candidates(Random& random, int64_t rows, int64_t columns, int64_t gap, int threads) {
  const Matrix<P> policy = logits<P>(random, rows, columns, columns + gap);
  const Matrix<R> reward = logits<R>(random, rows, columns, columns);
  Exact<int64_t> sampled(rows);
  for (int64_t t = 0; t < rows; ++t) sampled[t] = t % 3 == 0 ? columns - 1 : static_cast<int64_t>(random.uniform(0, 1) * columns);
  for (const Options& options : {Options{0.1, 10, 1, 1}, Options{0.01, 2, 0.7, 1.5}})
    for (const int64_t* forced : {static_cast<const int64_t*>(nullptr), static_cast<const int64_t*>(sampled.data())}) {
      const Csr got(run(policy.view(), reward.view(), rows, columns, options, forced, threads), rows);
      check_all(got, rows, policy, reward, options, forced);
    }
}

// The same rows from blocks of columns, each a buffer of its own, and from blocks of rows.
template <class S>
void test_blocks(Random& random, int64_t rows, int64_t columns, int64_t width, int threads) {
  const Matrix<S> policy = logits<S>(random, rows, columns, columns), reward = logits<S>(random, rows, columns, columns);
  const Exact<int64_t> sampled(rows, columns / 2);
  const Options options{0.05, 3, 1, 0.8};
  Rows parts(rows, options, sampled.data());
  const int64_t height = rows / 2 + 1;
  for (int64_t c = 0; c < columns; c += width)
    for (int64_t first = 0; first < rows; first += height) {
      const int64_t n = std::min(width, columns - c), some = std::min(height, rows - first);
      Matrix<S> p(some, n, n), q(some, n, n);
      for (int64_t i = 0; i < some * n; ++i) {
        const int64_t at = (first + i / n) * columns + c + i % n;
        p.values[i] = policy.values[at];
        q.values[i] = reward.values[at];
      }
      parts.add(p.view(), q.view(), first, some, c, n, threads);
    }
  check_all(Csr(parts.finish(), rows), rows, policy, reward, options, sampled.data());
}

// Ten equal logits touch p_min = 0.1; a token of probability 0 on both sides is forced in.
template <class S>
void test_edges() {
  Matrix<S> flat(1, 10, 10), masked(1, 10, 10);
  for (int64_t v = 0; v < 10; ++v) {
    flat.set(0, v, 1.5);
    masked.set(0, v, v == 4 ? 3.0 : -kInf);
  }
  const Options options{0.1, 10, 1, 1};
  const Csr all(run(flat.view(), flat.view(), 1, 10, options, nullptr, 1), 1);
  CHECK(all.ids.size() == 10 && all.advantage[9] == 0);
  const Exact<int64_t> sampled(1, 7);
  const Csr two(run(masked.view(), masked.view(), 1, 10, options, sampled.data(), 1), 1);
  CHECK(two.ids.size() == 2 && two.ids[0] == 4 && two.ids[1] == 7);
  CHECK(near(two.logp[0], 0, kError<S>) && two.logp[1] == -kInf && two.advantage[1] == 0);
}

// The first row without a distribution, which side, and why; the row's other chunks do not hide it.
template <class S>
void test_invalid(int64_t rows, int64_t columns, int threads) {
  Matrix<S> good(rows, columns, columns), bad(rows, columns, columns);
  const auto set_row = [&](Matrix<S>& matrix, int64_t t, double x) {
    for (int64_t v = 0; v < columns; ++v) matrix.set(t, v, x);
  };
  for (int64_t t = 0; t < rows; ++t) set_row(good, t, 0.5);
  for (int64_t t = 0; t < rows; ++t) set_row(bad, t, 0.5);
  const Options options{0.1, 10, 1, 1};
  const Exact<int64_t> ids(rows, 0);
  Exact<double> logp(rows);
  Exact<Norm> norm(rows);
  for (const auto& [value, fault] : {std::pair{kNan, Fault::nan}, {kInf, Fault::positive_infinity}, {-kInf, Fault::only_negative_infinity}})
    for (const int64_t row : {int64_t{0}, rows / 2, rows - 1})
      for (const int64_t where : {int64_t{0}, columns - 1}) {
        for (const int64_t t : {row, rows - 1}) {
          if (fault == Fault::only_negative_infinity) set_row(bad, t, value);
          bad.set(t, where, value);
        }
        const auto is = [&, fault = fault](const Invalid& found, bool policy) {
          return found.row == row && found.policy == policy && found.fault == fault;
        };
        CHECK(is(run(bad.view(), good.view(), rows, columns, options, nullptr, threads).invalid(), true));
        CHECK(is(run(good.view(), bad.view(), rows, columns, options, nullptr, threads).invalid(), false));
        CHECK(is(token_logprob(bad.view(), rows, columns, 1, ids.data(), logp.data(), norm.data(), threads), true));
        for (const int64_t t : {row, rows - 1}) set_row(bad, t, 0.5);
      }
}

template <class S>
void test_logprob(Random& random, int64_t rows, int64_t columns, int64_t gap, double temperature, int threads) {
  const Matrix<S> matrix = logits<S>(random, rows, columns, columns + gap);
  Exact<int64_t> ids(rows);
  for (int64_t t = 0; t < rows; ++t) ids[t] = t % 3 == 0 ? columns - 1 : static_cast<int64_t>(random.uniform(0, 1) * columns);
  Exact<double> logp(rows, kNan), grad = random.fill<double>(rows, -2, 2);
  Exact<Norm> norm(rows);
  if (rows > 1) grad[1] = 0;
  CHECK(token_logprob(matrix.view(), rows, columns, temperature, ids.data(), logp.data(), norm.data(), threads).row == -1);
  Matrix<S> slope(rows, columns, columns);
  token_logprob_backward(matrix.view(), rows, columns, temperature, ids.data(), norm.data(), grad.data(), slope.values.data(), threads);
  for (int64_t t = 0; t < rows; ++t) {
    const auto expected = log_softmax(matrix.row(t), temperature), got = slope.row(t);
    CHECK(logp[t] == expected[ids[t]] || near(logp[t], expected[ids[t]], kError<S>));
    for (int64_t v = 0; v < columns; ++v) {
      const double exact = grad[t] / temperature * ((v == ids[t]) - std::exp(expected[v]));
      CHECK(std::abs(got[v] - exact) <= (kRounding<S> + kError<S>) * std::abs(grad[t] / temperature));
      if (grad[t] == 0) CHECK(got[v] == 0);
    }
  }
}

// Enough work for three threads: what they give is what one gives. The gradient is too long for the caches, which rows are then
// written past; one row alone is not.
template <class S>
void test_threads(Random& random) {
  const int64_t rows = 520, columns = 4099;
  const Matrix<S> policy = logits<S>(random, 1, columns, 0), reward = logits<S>(random, 1, columns, 0);
  const Options options{0.1, 10, 1, 1};
  Exact<int64_t> ids(rows);
  for (int64_t t = 0; t < rows; ++t) ids[t] = 7 * t;
  check_same(Csr(run(policy.view(), reward.view(), rows, columns, options, ids.data(), 1), rows),
             Csr(run(policy.view(), reward.view(), rows, columns, options, ids.data(), 3), rows));
  const Exact<double> grad(rows, 0.5);
  Exact<double> logp(rows), logp_alone(1);
  Exact<Norm> norm(rows), norm_alone(1);
  Exact<S> slope(rows * columns), alone(columns);
  token_logprob(policy.view(), rows, columns, 1, ids.data(), logp.data(), norm.data(), 3);
  token_logprob_backward(policy.view(), rows, columns, 1, ids.data(), norm.data(), grad.data(), slope.data(), 3);
  for (int64_t t = 0; t < rows; ++t) {
    token_logprob(policy.view(), 1, columns, 1, &ids[t], logp_alone.data(), norm_alone.data(), 1);
    token_logprob_backward(policy.view(), 1, columns, 1, &ids[t], norm_alone.data(), grad.data(), alone.data(), 1);
    CHECK(logp[t] == logp_alone[0]);
    CHECK(std::memcmp(&slope[t * columns], alone.data(), columns * sizeof(S)) == 0);
  }
}

template <class S>
void test_type() {
  Random random;
  for (const int64_t columns : {1, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 4099})
    for (const int64_t rows : {0, 1, 5}) {
      test_candidates<S, S>(random, rows, columns, rows == 5 ? 3 : 0, rows == 5 ? 3 : 1);
      test_logprob<S>(random, rows, columns, rows == 5 ? 3 : 0, rows == 1 ? 1.0 : 0.7, rows == 5 ? 3 : 1);
    }
  test_candidates<S, float>(random, 4, 100, 1, 1);
  test_candidates<float, S>(random, 4, 100, 1, 1);
  for (const int64_t width : {1, 16, 100}) test_blocks<S>(random, 7, 130, width, 1);
  test_blocks<S>(random, 60, 4099, 2500, 3);
  test_edges<S>();
  test_invalid<S>(4, 17, 1);
  test_invalid<S>(60, 2300, 3);
  test_threads<S>(random);
}

}  // namespace

int main() {
  test_type<float>();
  test_type<double>();
  test_type<BFloat16>();
  test_type<Float16>();
}
