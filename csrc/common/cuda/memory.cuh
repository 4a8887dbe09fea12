// Loads and stores that say what the caches are to keep.
#pragma once
#include <cstdint>

#include "common/cuda/launch.cuh"

namespace prmfast::cuda {

#ifdef PRMFAST_EMULATE

template <class V>
V load_once(const V* p) {
  emulate::check_aligned(p, sizeof(V));
  emulate::traffic.bytes_read += sizeof(V);
  return *p;
}
template <class V>
V load_kept(const V* p) {
  return load_once(p);
}
template <class V>
void store_once(V* p, V value) {
  emulate::check_aligned(p, sizeof(V));
  emulate::traffic.bytes_written += sizeof(V);
  *p = value;
}
inline void copy_async_16(void* shared, const void* global) {
  emulate::traffic.bytes_read += 16;
  emulate::copy_async(shared, global);
}
inline void copy_async_commit() { emulate::copy_async_commit(); }
template <int pending>
void copy_async_wait() {
  emulate::copy_async_wait(pending);
}

#else

// Nobody reads it again: it leaves the caches first. The memory may be written later in the same kernel.
template <class V>
__device__ V load_once(const V* p) {
  return __ldcs(p);
}

// It is read again soon, by this or another thread: kept in L2, past L1.
template <class V>
__device__ V load_kept(const V* p) {
  return __ldcg(p);
}

template <class V>
__device__ void store_once(V* p, V value) {
  __stcs(p, value);
}

// 16 bytes from global into shared memory, both aligned, without registers. A thread's copies are there behind its own
// copy_async_wait<n>, which leaves the n newest groups in flight; other threads see them behind the next barrier.
__device__ inline void copy_async_16(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#endif

}  // namespace prmfast::cuda
