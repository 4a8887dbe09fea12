// Room candidate_td: the likely next tokens of every row under a policy, and the advantage a reward model gives each of them.
//
// Rows hold V logits, columns contiguous; -inf is a token of probability 0. The softmax is that of logits / temperature. A row
// with NaN or +inf, or with nothing above -inf, has none: the functions say so and write nothing of use.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "common/log_sum.h"
#include "common/logits.h"

namespace prmfast::candidate_td {

constexpr double kTouch = 1e-5;  // log p >= log p_min - kTouch counts as p >= p_min

enum class Dtype { float32, float64, bfloat16, float16 };

struct Logits {
  const void* data;
  Dtype dtype;
  int64_t stride;  // between rows, in elements
};

struct Invalid {
  int64_t row = -1;  // the first one, -1 if every row is fine
  bool policy = true;
  Fault fault = Fault::none;
};

struct Options {
  double p_min, beta, policy_temperature, reward_temperature;
};

struct Slot {
  int64_t id;
  double policy, reward;  // logits
};

// What is known of a row after some of its columns.
struct Row {
  LogSum policy, reward;
  double threshold = -__builtin_inf();  // candidates lie at or above: it only rises, as the sum only grows
  std::vector<Slot> slots;              // by increasing id
  Slot sampled{-1, -__builtin_inf(), -__builtin_inf()};
};

// The candidates of consecutive rows.
struct Part {
  std::vector<int64_t> counts, ids;
  std::vector<double> logp, advantage;
  Invalid invalid;
};

// Compressed rows, in as many parts as there were threads.
class Result {
 public:
  explicit Result(std::vector<Part> parts) : parts_(std::move(parts)) {}
  Invalid invalid() const;
  int64_t entries() const;
  template <class Out>
  void write(int64_t* offsets, int64_t* ids, Out* logp, Out* advantage) const;

 private:
  std::vector<Part> parts_;
};

// One pass over both matrices. sampled: one id per row that is added to its candidates, or null.
Result run(const Logits& policy, const Logits& reward, int64_t rows, int64_t columns, const Options& options, const int64_t* sampled,
           int threads);

// The same from logits that come in blocks of columns, from left to right for each row.
class Rows {
 public:
  Rows(int64_t rows, const Options& options, const int64_t* sampled);
  // Logits of rows [first_row, first_row + rows) and columns [first_column, first_column + columns).
  void add(const Logits& policy, const Logits& reward, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
           int threads);
  Result finish() const;

 private:
  std::vector<Row> rows_;
  Options options_;
};

// log softmax(x / temperature) = (x - reference) / temperature - log_sum, reference being a logit near the row's largest.
struct Norm {
  double reference, log_sum;
};

// logp[row] = log softmax(logits / temperature)[ids[row]], and the norm of every row.
Invalid token_logprob(const Logits& logits, int64_t rows, int64_t columns, double temperature, const int64_t* ids, double* logp,
                      Norm* norm, int threads);

// out[row * columns + v] = grad[row] (1[v = ids[row]] - softmax(logits / temperature)) / temperature, out in the logits' dtype; rows of
// grad 0 are zeros whatever they hold.
void token_logprob_backward(const Logits& logits, int64_t rows, int64_t columns, double temperature, const int64_t* ids,
                            const Norm* norm, const double* grad, void* out, int threads);

}  // namespace prmfast::candidate_td
