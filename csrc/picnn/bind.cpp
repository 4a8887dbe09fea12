#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/amx.h"
#include "picnn/gemm.h"
#include "picnn/picnn.h"

namespace py = pybind11;

namespace prmfast::picnn {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<T*> out;
  for (uintptr_t a : addresses) out.push_back(pointer<T>(a));
  return out;
}

template <class T>
Inputs<T> inputs(uintptr_t rows, uintptr_t levels, int64_t level_stride, const std::vector<uintptr_t>& wz, int64_t count, int64_t m) {
  return {pointer<const T>(rows), pointer<const T>(levels), level_stride, pointers<const T>(wz), count, m};
}

void bind_shape(py::module_& m) {
  py::class_<Shape>(m, "Shape")
      .def(py::init([](std::vector<int64_t> widths, bool leaky_relu, double negative_slope, bool square_first, bool relu_gate,
                       bool curvature, double curvature_floor) {
             return Shape{std::move(widths), leaky_relu ? Activation::kLeakyRelu : Activation::kSoftplus, negative_slope, square_first,
                          relu_gate ? Gate::kRelu : Gate::kSoftplus, curvature, curvature_floor};
           }),
           py::kw_only(), py::arg("widths"), py::arg("leaky_relu"), py::arg("negative_slope"), py::arg("square_first"),
           py::arg("relu_gate"), py::arg("curvature"), py::arg("curvature_floor"))
      .def_property_readonly("row", &Shape::row);
}

template <class T>
void bind_type(py::module_& m, const char* suffix) {
  m.def((std::string("forward_") + suffix).c_str(),
        [](const Shape& shape, uintptr_t rows, uintptr_t levels, int64_t level_stride, const std::vector<uintptr_t>& wz, int64_t count,
           int64_t m, double tolerance, bool plain_bf16, uintptr_t value, uintptr_t gradient, int threads) {
          py::gil_scoped_release release;
          forward<T>(shape, inputs<T>(rows, levels, level_stride, wz, count, m), {tolerance, plain_bf16}, pointer<T>(value),
                     pointer<T>(gradient), threads);
        });
  m.def((std::string("backward_") + suffix).c_str(),
        [](const Shape& shape, uintptr_t rows, uintptr_t levels, int64_t level_stride, const std::vector<uintptr_t>& wz, int64_t count,
           int64_t m, uintptr_t grad_value, uintptr_t grad_gradient, uintptr_t d_rows, uintptr_t d_levels,
           const std::vector<uintptr_t>& d_wz, int threads) {
          py::gil_scoped_release release;
          backward<T>(shape, inputs<T>(rows, levels, level_stride, wz, count, m), pointer<const T>(grad_value),
                      pointer<const T>(grad_gradient), pointer<T>(d_rows), pointer<T>(d_levels), pointers<T>(d_wz), threads);
        });
}

}  // namespace

void bind(py::module_& m) {
  bind_shape(m);
  bind_type<float>(m, "f32");
  bind_type<double>(m, "f64");
  m.def("has_tiles", [] { return chosen_amx() != Amx::kOff; });
  m.def("gemm", [](uintptr_t a, int64_t a_row, int64_t a_depth, uintptr_t b, int64_t b_row, int64_t b_depth, uintptr_t bias, int64_t m,
                   int64_t n, int64_t depth, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    gemm({pointer<const float>(a), a_row, a_depth}, {pointer<const float>(b), b_row, b_depth}, pointer<const float>(bias), m, n, depth,
         pointer<float>(out), threads);
  });
}

}  // namespace prmfast::picnn
