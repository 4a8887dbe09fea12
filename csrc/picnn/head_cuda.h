// Contract of the serving head: one launch from contexts, or from raw coefficient rows, to quantiles, their mean and a budget.
#pragma once
#include "picnn/network_cuda.h"

namespace prmfast::picnn::cuda {

constexpr int kMostHeadInputs = 512;  // of the affine head that the launch may hold
constexpr int kMostHeadLevels = 1024;

struct HeadCall {
  const float* input;       // [count, inputs], or raw rows [count, network.row] where weight is null; columns contiguous
  int64_t input_stride;     // from row to row
  const float* weight;      // of the affine head, transposed: [inputs, network.row]; or null
  const float* bias;        // [network.row]
  int inputs;
  const void* fragments;    // what `prepare` wrote, aligned to 16 bytes
  const float* levels;      // [m], ascending
  const double* quadrature; // [m]: the mean is the sum of these times the quantiles
  const double* target;     // [count] with stride 1, or one with stride 0
  int64_t target_stride;
  int n_max;
  bool sigmoid;             // quantile = sigmoid(T), or T itself; clipped to [0, 1] either way
  int64_t count;
  int m;
  float* quantiles;         // [count, m], never falling from a level to the next
  float* expected;          // [count]
  int32_t* budget;          // [count]: smallest N with mean_m 1 - (1 - q_m)^N >= target - 1e-12 in float64, else n_max; 0 with NaN
};

// Bytes of the weights as tensor-core fragments.
inline int64_t fragment_bytes(const Network& network, bool split) { return int64_t{4} * network.fragment_words[split]; }

// network.wz -> fragments; once for a network, before `serve` on the same stream or synchronised with it.
void prepare(const Network& network, bool split, void* fragments, void* stream);

// Launches on `stream` (a cudaStream_t) of the current device; neither allocates nor waits, so that a CUDA graph can hold it. A
// row's result does not depend on the others. Throws std::invalid_argument for more levels or inputs than it takes.
void serve(const Network& network, const HeadCall& call, bool split, void* stream);

}  // namespace prmfast::picnn::cuda
