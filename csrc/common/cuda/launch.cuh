// The one way in which kernels are launched, and what they may ask of the device. Nothing here synchronises or allocates, so
// all of it can be captured into a CUDA graph.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace prmfast::cuda {

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;  // of dynamic shared memory, which is all that kernels here use
  int cluster = 1;          // blocks along x that run together; more than one needs sm_90
  cudaStream_t stream = nullptr;
};

struct Device {
  int capability;       // 80 is 8.0
  size_t shared_bytes;  // most a block may take
  int multiprocessors;

  // The cluster code is built for sm_90a alone; later architectures run what is built for sm_80.
  bool clusters() const { return capability == 90; }
};

#ifdef PRMFAST_EMULATE

inline Device device() {
  return {emulate::device.capability, emulate::device.shared_bytes, emulate::device.multiprocessors};
}

template <class... P, class... A>
void launch(void (*kernel)(P...), const Launch& how, A&&... arguments) {
  const std::tuple<P...> held(std::forward<A>(arguments)...);
  emulate::run(how.grid, how.block, static_cast<unsigned>(how.cluster), how.shared_bytes, [&] { std::apply(kernel, held); });
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulate::current->block->shared.data());
}

#else

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not find it again
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// The current device.
inline Device device() {
  const auto attribute = [](cudaDeviceAttr which) {
    int index, value;
    check(cudaGetDevice(&index));
    check(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)), attribute(cudaDevAttrMultiProcessorCount)};
}

inline void launch_pointers(const void* kernel, const Launch& how, void** arguments) {
  if (how.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared_bytes)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(how.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = &cluster;
  config.numAttrs = how.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelExC(&config, kernel, arguments));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), const Launch& how, A&&... arguments) {
  std::tuple<P...> held(std::forward<A>(arguments)...);
  std::apply(
      [&](auto&... each) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&each))...};
        launch_pointers(reinterpret_cast<const void*>(kernel), how, pointers);
      },
      held);
}

// All of the block's shared memory, aligned to 16 bytes.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char prmfast_shared_memory[];
  return reinterpret_cast<T*>(prmfast_shared_memory);
}

#endif

}  // namespace prmfast::cuda
