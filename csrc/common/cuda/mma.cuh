// Tensor cores: bfloat16 products with float32 sums, a warp at a time (sm_80).
//
// Fragments of mma.m16n8k16, for lane = 4 g + t: A[16][16] by rows: a[0] = A[g][2t, 2t + 1], a[1] = A[g + 8][..], a[2] =
// A[g][2t + 8, 2t + 9], a[3] = A[g + 8][..]; B[16][8] by columns: b[0] = B[2t, 2t + 1][g], b[1] = B[2t + 8, 2t + 9][g];
// C[16][8]: c[0], c[1] = C[g][2t, 2t + 1], c[2], c[3] = C[g + 8][..]. The lower half of a register is the lower index.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "common/cuda/launch.cuh"

namespace prmfast::cuda {

#ifdef PRMFAST_EMULATE

struct MmaOperands {
  uint32_t a[4], b[2];
  float c[4];
};

inline float bfloat16_half(uint32_t pair, int upper) { return __uint_as_float(upper ? pair & 0xffff0000u : pair << 16); }

inline void mma_all(const void* const* in, void* const* out, uint32_t mask) {
  if (mask != 0xffffffffu) emulate::fail("mma without all lanes");
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const MmaOperands*>(in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int upper = 0; upper < 2; ++upper) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + i / 2 * 8 + upper] = bfloat16_half(own.a[i], upper);
      for (int i = 0; i < 2; ++i) b[2 * t + i * 8 + upper][g] = bfloat16_half(own.b[i], upper);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const MmaOperands*>(in[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = own.c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      static_cast<float*>(out[lane])[i] = sum;
    }
  }
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperands in;
  std::memcpy(in.a, a, sizeof a);
  std::memcpy(in.b, b, sizeof b);
  std::memcpy(in.c, c, sizeof c);
  emulate::warp_operation(0xffffffffu, &in, c, mma_all, "mma");
}

template <bool transposed>
void load_matrices_all(const void* const* in, void* const* out, uint32_t mask) {
  if (mask != 0xffffffffu) emulate::fail("ldmatrix without all lanes");
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](int row, int column) {
        return uint32_t{static_cast<const uint16_t*>(*static_cast<const void* const*>(in[8 * matrix + row]))[column]};
      };
      const int g = lane / 4, t = lane % 4 * 2;
      static_cast<uint32_t*>(out[lane])[matrix] =
          transposed ? element(t, g) | element(t + 1, g) << 16 : element(g, t) | element(g, t + 1) << 16;
    }
}

template <bool transposed = false>
void load_matrices(uint32_t (&r)[4], const void* row) {
  emulate::check_aligned(row, 16);
  emulate::warp_operation(0xffffffffu, &row, r, load_matrices_all<transposed>, "ldmatrix");
}

#else

// c += A B.
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane 8 m + i names row i of matrix m (16 bytes, aligned). Lane
// 4 g + t gets r[m] = M[g][2t, 2t + 1], transposed M[2t, 2t + 1][g].
template <bool transposed = false>
__device__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

#endif

}  // namespace prmfast::cuda
