// Small kernels, right and wrong ones, that say what the emulator does and what it finds.
#include "common/cuda/cluster.cuh"
#include "common/cuda/math.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/mma.cuh"
#include "cuda_fp16.h"
#include "shim.h"

using namespace prmfast::cuda;

namespace {

__global__ void shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32, v = static_cast<int>(threadIdx.x) * 10;
  int* mine = out + threadIdx.x * 6;
  mine[0] = __shfl_xor_sync(0xffffffffu, v, 5);
  mine[1] = __shfl_down_sync(0xffffffffu, v, 3);
  mine[2] = __shfl_up_sync(0xffffffffu, v, 2, 8);
  mine[3] = __shfl_sync(0xffffffffu, v, 9, 16);
  mine[4] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  if (lane < 8) mine[5] = __shfl_xor_sync(0xffu, v, 1) + __any_sync(0xffu, lane == 7);
}

__global__ void block_sum(const float* x, float* out, int votes) {
  auto* held = shared_memory<float>();
  held[threadIdx.x] = load_once(x + blockIdx.x * blockDim.x + threadIdx.x);
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half != 0; half /= 2) {
    if (threadIdx.x < half) held[threadIdx.x] += held[threadIdx.x + half];
    __syncthreads();
  }
  const int many = __syncthreads_count(static_cast<int>(threadIdx.x) < votes);
  if (threadIdx.x == 0) store_once(out + blockIdx.x, held[0] + static_cast<float>(many));
}

__global__ void cluster_gather(int* out) {
  auto* held = shared_memory<int>();
  if (threadIdx.x == 0) held[0] = 100 + static_cast<int>(blockIdx.x);
  cluster_barrier();
  int sum = 0;
  for (unsigned r = 0; r < cluster_blocks(); ++r) sum += *map_shared(held, r) * (r == cluster_rank() ? 2 : 1);
  cluster_barrier();
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void cluster_gone(int* out) {
  auto* held = shared_memory<int>();
  if (threadIdx.x == 0) held[0] = 1;
  cluster_barrier();
  if (cluster_rank() == 0) {
    cluster_arrive();  // and never waits: block 1 may have returned
    cluster_wait();
    out[0] = *map_shared(held, 1);
  } else {
    cluster_arrive();
  }
}

__global__ void product(const uint32_t* a, const uint32_t* b, float* c) {
  const unsigned lane = threadIdx.x;
  const uint32_t fa[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]}, fb[2] = {b[lane * 2], b[lane * 2 + 1]};
  float fc[4] = {1, 2, 3, 4};
  mma_bf16(fc, fa, fb);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = fc[i];
}

__global__ void matrices(const uint16_t* in, uint32_t* out) {
  auto* held = shared_memory<uint16_t>();
  for (unsigned i = threadIdx.x; i < 256; i += 32) held[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  load_matrices(r, held + threadIdx.x * 8);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 8 + i] = r[i];
  load_matrices<true>(r, held + threadIdx.x * 8);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 8 + 4 + i] = r[i];
}

__global__ void copies(const uint4* in, uint4* out, int waits) {
  auto* held = shared_memory<uint4>();
  copy_async_16(held + threadIdx.x, in + threadIdx.x);
  copy_async_commit();
  if (waits) copy_async_wait<0>();
  out[threadIdx.x] = held[threadIdx.x];
}

__global__ void barrier_for_some() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void shuffle_for_some() {
  if (threadIdx.x != 7) __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void outside(int offset) {
  auto* held = shared_memory<volatile float>();
  if (threadIdx.x == 3) held[offset] = 1;
}

__global__ void global_outside(float* p) {
  *reinterpret_cast<volatile float*>(p) = 1;
}

__global__ void misaligned(const float* p, float* out) {
  out[0] = load_once(reinterpret_cast<const float4*>(p + 1)).x;
}

__global__ void race(int* out) {
  auto* held = shared_memory<int>();
  if (threadIdx.x == 0) held[0] = 1;
  out[threadIdx.x] = held[0];
}

template <class... P, class... A>
const char* start(void (*kernel)(P...), Launch how, A... arguments) {
  return emulate::guarded_call([&] { launch(kernel, how, arguments...); });
}

}  // namespace

extern "C" {
const char* case_shuffles(int* out) { return start(shuffles, {1, 64}, out); }
const char* case_block_sum(const float* x, float* out, int64_t votes) {
  return start(block_sum, {2, 128, 128 * sizeof(float)}, x, out, static_cast<int>(votes));
}
const char* case_cluster(int* out) { return start(cluster_gather, {8, 33, 16, 4}, out); }
const char* case_cluster_gone(int* out) { return start(cluster_gone, {2, 32, 16, 2}, out); }
const char* case_product(const uint32_t* a, const uint32_t* b, float* c) { return start(product, {1, 32}, a, b, c); }
const char* case_matrices(const uint16_t* in, uint32_t* out) { return start(matrices, {1, 32, 512}, in, out); }
const char* case_copies(const uint4* in, uint4* out, int64_t waits) {
  return start(copies, {1, 32, 512}, in, out, static_cast<int>(waits));
}
const char* case_barrier_for_some() { return start(barrier_for_some, {1, 64}); }
const char* case_shuffle_for_some() { return start(shuffle_for_some, {1, 32}); }
const char* case_outside(int64_t offset, int64_t bytes) {
  return start(outside, {1, 32, static_cast<size_t>(bytes)}, static_cast<int>(offset));
}
const char* case_global_outside(float* p) { return start(global_outside, {1, 1}, p); }
const char* case_misaligned(const float* p, float* out) { return start(misaligned, {1, 1}, p, out); }
const char* case_race(int* out) { return start(race, {1, 64, 16}, out); }
const char* case_shape(int64_t threads, int64_t bytes, int64_t cluster) {
  return start(outside, {8, static_cast<unsigned>(threads), static_cast<size_t>(bytes), static_cast<int>(cluster)}, 0);
}
void case_narrow(const float* x, uint16_t* bf16, uint16_t* fp16, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    bf16[i] = __float2bfloat16_rn(x[i]).__x;
    fp16[i] = __float2half_rn(x[i]).__x;
  }
}
void case_widen(const uint16_t* bits, float* bf16, float* fp16, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    bf16[i] = __bfloat162float(__ushort_as_bfloat16(bits[i]));
    fp16[i] = __half2float(__ushort_as_half(bits[i]));
  }
}
}
