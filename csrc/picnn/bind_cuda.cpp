// The CUDA half of the room as _C.cuda.picnn; absent from a build without CUDA.
#ifdef PRMFAST_CUDA
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "picnn/head_cuda.h"
#include "picnn/levels_cuda.h"

namespace py = pybind11;

namespace prmfast::picnn::cuda {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Network with_weights(Network network, const std::vector<uintptr_t>& wz) {
  if (static_cast<int>(wz.size()) != network.layers)
    throw std::invalid_argument("wz must have " + std::to_string(network.layers) + " matrices, got " + std::to_string(wz.size()));
  for (int i = 0; i < network.layers; ++i) network.wz[i] = pointer<const float>(wz[i]);
  return network;
}

void run_forward(const Network& network, const std::vector<uintptr_t>& wz, uintptr_t rows, int64_t row_stride, uintptr_t levels,
                 int64_t level_stride, int64_t count, int m, float tolerance, bool split, uintptr_t value, uintptr_t gradient, uintptr_t stream) {
  const LevelsCall call{pointer<const float>(rows), row_stride, pointer<const float>(levels), level_stride, count, m,
                        tolerance, pointer<float>(value), pointer<float>(gradient)};
  forward(with_weights(network, wz), call, split, pointer<void>(stream));
}

void run_prepare(const Network& network, const std::vector<uintptr_t>& wz, bool split, uintptr_t fragments, uintptr_t stream) {
  prepare(with_weights(network, wz), split, pointer<void>(fragments), pointer<void>(stream));
}

void run_serve(const Network& network, const std::vector<uintptr_t>& wz, uintptr_t fragments, uintptr_t input, int64_t input_stride,
               int inputs, uintptr_t weight, uintptr_t bias, uintptr_t levels, uintptr_t quadrature, int m, uintptr_t target,
               int64_t target_stride, int n_max, bool sigmoid, int64_t count, bool split, uintptr_t quantiles, uintptr_t expected,
               uintptr_t budget, uintptr_t stream) {
  const HeadCall call{pointer<const float>(input), input_stride, pointer<const float>(weight), pointer<const float>(bias), inputs,
                      pointer<const void>(fragments), pointer<const float>(levels), pointer<const double>(quadrature),
                      pointer<const double>(target), target_stride, n_max, sigmoid, count, m, pointer<float>(quantiles),
                      pointer<float>(expected), pointer<int32_t>(budget)};
  serve(with_weights(network, wz), call, split, pointer<void>(stream));
}

}  // namespace

void bind(py::module_& m) {
  py::class_<Network>(m, "Network")
      .def(py::init(&make_network), py::kw_only(), py::arg("widths"), py::arg("softplus"), py::arg("negative_slope"),
           py::arg("square_first"), py::arg("relu_gate"), py::arg("curvature"), py::arg("curvature_floor"))
      .def_readonly("row", &Network::row)
      .def("fragment_bytes", [](const Network& network, bool split) { return fragment_bytes(network, split); });
  m.def("forward", &run_forward, py::kw_only(), py::arg("network"), py::arg("wz"), py::arg("rows"), py::arg("row_stride"),
        py::arg("levels"), py::arg("level_stride"), py::arg("count"), py::arg("m"), py::arg("tolerance"), py::arg("split"),
        py::arg("value"), py::arg("gradient"), py::arg("stream"));
  m.def("prepare", &run_prepare, py::kw_only(), py::arg("network"), py::arg("wz"), py::arg("split"), py::arg("fragments"), py::arg("stream"));
  m.def("serve", &run_serve, py::kw_only(), py::arg("network"), py::arg("wz"), py::arg("fragments"), py::arg("input"),
        py::arg("input_stride"), py::arg("inputs"), py::arg("weight"), py::arg("bias"), py::arg("levels"), py::arg("quadrature"),
        py::arg("m"), py::arg("target"), py::arg("target_stride"), py::arg("n_max"), py::arg("sigmoid"), py::arg("count"),
        py::arg("split"), py::arg("quantiles"), py::arg("expected"), py::arg("budget"), py::arg("stream"));
}

}  // namespace prmfast::picnn::cuda
#endif
