// The one module: a bind(m) per room.
#include <pybind11/pybind11.h>

#ifdef PRMFAST_CUDA
#include "common/device.h"
#endif

namespace prmfast {
namespace picnn {
void bind(pybind11::module_& m);
}
namespace ias {
void bind(pybind11::module_& m);
}
namespace dist_ppo {
void bind(pybind11::module_& m);
}
}  // namespace prmfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of prmfast; raw pointers and sizes, no torch.";
  auto picnn = m.def_submodule("picnn");
  prmfast::picnn::bind(picnn);
  auto ias = m.def_submodule("ias");
  prmfast::ias::bind(ias);
  auto dist_ppo = m.def_submodule("dist_ppo");
  prmfast::dist_ppo::bind(dist_ppo);
#ifdef PRMFAST_CUDA
  auto cuda = m.def_submodule("cuda", "Only in a build with PRMFAST_CUDA=1.");
  cuda.def("runtime_version", &prmfast::cuda::runtime_version);
  cuda.def("device_count", &prmfast::cuda::device_count);
#endif
}
