// Contract of the levels stage on a GPU: value and gradient of every level, float32 in and out.
#pragma once
#include "picnn/network_cuda.h"

namespace prmfast::picnn::cuda {

// rows [count, network.row] with row stride row_stride, levels [count, m] with row stride level_stride (0: shared); columns contiguous.
// tolerance as in picnn.h; with one product only, nothing is interpolated: its noise hides the trailing coefficients.
struct LevelsCall {
  const float* rows;
  int64_t row_stride;
  const float* levels;
  int64_t level_stride;
  int64_t count;
  int m;
  float tolerance;
  float *value, *gradient;
};

// Writes value and gradient [count, m], contiguous. split: float32 from three products of bfloat16 parts; else one, plain bfloat16.
// A gradient never falls from a level to a higher one of its row where every wz is >= 0. A row's result does not depend on the others.
// Launches on `stream` (a cudaStream_t) of the current device; neither allocates nor waits.
void forward(const Network& network, const LevelsCall& call, bool split, void* stream);

// Of interpolate_cuda.cu; `forward` decides.
bool worth_interpolating(const Network& network, const LevelsCall& call);
void forward_interpolated(const Network& network, const LevelsCall& call, void* stream);

}  // namespace prmfast::picnn::cuda
