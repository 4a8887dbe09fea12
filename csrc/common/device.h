// What the CUDA half of the build knows about this machine; device.cu is absent from a build without CUDA.
#pragma once

namespace prmfast::cuda {

int runtime_version();  // of the toolkit this was compiled with: 13000 is 13.0
int device_count();     // 0 without a driver or a device; never throws

}  // namespace prmfast::cuda
