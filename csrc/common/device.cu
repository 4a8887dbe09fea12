#include "common/device.h"

#include <cuda_runtime_api.h>

namespace prmfast::cuda {

int runtime_version() { return CUDART_VERSION; }

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // a missing driver is the answer 0, not an error for the next call to find
  return 0;
}

}  // namespace prmfast::cuda
