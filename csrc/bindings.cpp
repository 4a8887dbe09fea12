// The one module: a bind(m) per room.
#include <pybind11/pybind11.h>

#include "common/isa.h"

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
namespace candidate_td {
void bind(pybind11::module_& m);
}
namespace dist_ppo {
void bind(pybind11::module_& m);
}
#ifdef PRMFAST_CUDA
namespace picnn::cuda {
void bind(pybind11::module_& m);
}
namespace candidate_td::cuda {
void bind(pybind11::module_& m);
}
namespace dist_ppo::cuda {
void bind(pybind11::module_& m);
}
#endif
}  // namespace prmfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of prmfast; raw pointers and sizes, no torch.";
  // For tests and bug reports: what the kernels that have a function per instruction set run on, in this process.
  m.def("isa", [] { return prmfast::chosen_name(); });
  m.def("set_isa", &prmfast::choose, pybind11::arg("isa"));
  auto picnn = m.def_submodule("picnn");
  prmfast::picnn::bind(picnn);
  auto ias = m.def_submodule("ias");
  prmfast::ias::bind(ias);
  auto candidate_td = m.def_submodule("candidate_td");
  prmfast::candidate_td::bind(candidate_td);
  auto dist_ppo = m.def_submodule("dist_ppo");
  prmfast::dist_ppo::bind(dist_ppo);
#ifdef PRMFAST_CUDA
  auto cuda = m.def_submodule("cuda", "Only in a build with PRMFAST_CUDA=1.");
  cuda.def("runtime_version", &prmfast::cuda::runtime_version);
  cuda.def("device_count", &prmfast::cuda::device_count);
  auto cuda_picnn = cuda.def_submodule("picnn");
  prmfast::picnn::cuda::bind(cuda_picnn);
  auto cuda_candidate_td = cuda.def_submodule("candidate_td");
  prmfast::candidate_td::cuda::bind(cuda_candidate_td);
  auto cuda_dist_ppo = cuda.def_submodule("dist_ppo");
  prmfast::dist_ppo::cuda::bind(cuda_dist_ppo);
#endif
}
