// The one module: a bind(m) per room.
#include <pybind11/pybind11.h>

namespace prmfast {
namespace picnn {
void bind(pybind11::module_& m);
}
namespace ias {
void bind(pybind11::module_& m);
}
}  // namespace prmfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU backends of prmfast; raw pointers and sizes, no torch.";
  auto picnn = m.def_submodule("picnn");
  prmfast::picnn::bind(picnn);
  auto ias = m.def_submodule("ias");
  prmfast::ias::bind(ias);
}
