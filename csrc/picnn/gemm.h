// Matrix products of float32 on AMX tiles: each number is split into two bfloat16 parts, three of four products are added up.
#pragma once
#include <cstdint>

namespace prmfast::picnn {

// rows x depth numbers; one of the two strides is 1.
struct Matrix {
  const float* data;
  int64_t row_stride, depth_stride;
};

// out [m, n] = a [m, depth] times b [n, depth] transposed, plus bias [n] unless that is null. Runs on the tiles or their emulation,
// whichever is chosen; float32 to 1e-6 of |a| |b|.
void gemm(const Matrix& a, const Matrix& b, const float* bias, int64_t m, int64_t n, int64_t depth, float* out, int threads);

}  // namespace prmfast::picnn
