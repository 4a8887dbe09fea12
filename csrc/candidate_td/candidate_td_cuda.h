// Room candidate_td on CUDA: what the functions of candidate_td.h do, on device memory, in the order of a stream. Nothing here
// allocates or waits for the device; an empty set of rows launches nothing. A launch that fails throws std::runtime_error.
#pragma once
#include <cstdint>

namespace prmfast::candidate_td::cuda {

constexpr int kSlots = 16;  // of a row: at most 15 candidates where p_min >= 1 / 15, and one that is forced

enum class Dtype { float32, bfloat16, float16 };

// [rows, columns], columns contiguous.
struct Logits {
  const void* data;
  Dtype dtype;
  int64_t stride;  // between rows, in elements
};

struct Shape {
  int64_t rows, columns;
};

struct Options {
  double p_min, beta, policy_temperature, reward_temperature;
};

// What a row has, in slots by increasing id; a slot that is not taken holds id -1 and log-probability -inf.
struct Padded {
  int32_t* ids;                   // [rows, kSlots]
  float *policy_logp, *advantage; // [rows, kSlots]
  int32_t* counts;                // [rows]; -1: the policy's logits of the row have no softmax, -2: the reward model's have none
};

// Bytes that a call needs for a side of this shape while it runs.
int64_t workspace_bytes(Shape shape);

// sampled: one id per row that joins its candidates, or null. workspace: of both sides.
void candidates(const Logits& policy, const Logits& reward, Shape shape, const Options& options, const int64_t* sampled,
                void* workspace, const Padded& out, void* stream);

// The slots in use, row after row; row t begins at offsets[t].
void compact(const Padded& padded, int64_t rows, const int64_t* offsets, int64_t* ids, float* policy_logp, float* advantage,
             void* stream);

// logp[row] = log softmax(logits / temperature)[ids[row]]; norm [rows, 2]: the row's largest logit and log sum exp((x - it) /
// temperature), not finite in a row that has no softmax.
void token_logprob(const Logits& logits, Shape shape, double temperature, const int64_t* ids, void* workspace, float* logp,
                   double* norm, void* stream);

// out [rows, columns] = grad[row] (1[v = ids[row]] - softmax(logits / temperature)) / temperature in the logits' dtype, rows packed;
// rows of grad 0 are not read.
void token_logprob_backward(const Logits& logits, Shape shape, double temperature, const int64_t* ids, const double* norm,
                            const double* grad, void* out, void* stream);

}  // namespace prmfast::candidate_td::cuda
