// Blocks that run together and read each other's shared memory (sm_90).
#pragma once
#include "common/cuda/launch.cuh"

namespace prmfast::cuda {

#if defined(PRMFAST_EMULATE)

inline unsigned cluster_rank() { return emulate::current->block->rank; }
inline unsigned cluster_blocks() { return static_cast<unsigned>(emulate::current->block->cluster->blocks.size()); }
inline void cluster_arrive() { emulate::cluster_arrive(); }
inline void cluster_wait() { emulate::cluster_wait(); }
template <class T>
T* map_shared(T* own, unsigned rank) {
  return emulate::map_shared(own, rank);
}

#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline unsigned cluster_blocks() {
  unsigned blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

// What was written before is seen behind the wait by every thread of the cluster. Every thread calls both, in turn.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The address of `own`, which lies in this block's shared memory, in that of block `rank`. That block must not have returned.
template <class T>
__device__ T* map_shared(T* own, unsigned rank) {
  T* mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(own), "r"(rank));
  return mapped;
}

#else  // a block alone: the host launches clusters on sm_90 only

__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_blocks() { return 1; }
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() { __syncthreads(); }
template <class T>
__device__ T* map_shared(T* own, unsigned) {
  return own;
}

#endif

__device__ inline void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace prmfast::cuda
