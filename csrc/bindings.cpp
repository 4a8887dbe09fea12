// The one module: a bind(m) per room.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/simd.h"

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
}  // namespace prmfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of prmfast; raw pointers and sizes, no torch.";
  // For tests and bug reports: what the kernels that have a function per instruction set run on, in this process.
  m.def("isa", [] { return std::string(prmfast::name(prmfast::chosen_isa())); });
  m.def("set_isa", [](const std::string& wanted) {
    for (const auto isa : {prmfast::Isa::kPortable, prmfast::Isa::kAvx2, prmfast::Isa::kAvx512})
      if (wanted == prmfast::name(isa) && isa <= prmfast::best_isa()) {
        prmfast::chosen_isa() = isa;
        return;
      }
    throw std::invalid_argument("isa must be one that this CPU has, at most " + std::string(prmfast::name(prmfast::best_isa())) +
                                ", got " + wanted);
  });
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
#endif
}
