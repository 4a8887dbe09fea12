#include <pybind11/pybind11.h>

#include <string>

#include "ias/ias.h"

namespace py = pybind11;

namespace prmfast::ias {
namespace {

template <class T>
Quantiles<T> view(uintptr_t data, int64_t rows, int64_t columns, int64_t stride) {
  return {reinterpret_cast<const T*>(data), rows, columns, stride};
}

// Each returns the first row that holds a NaN, or -1.
template <class T>
void bind_type(py::module_& m, const std::string& suffix) {
  m.def(("budget_" + suffix).c_str(), [](uintptr_t data, int64_t rows, int64_t columns, int64_t stride, uintptr_t target,
                                         int64_t target_stride, int64_t n_max, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    return budget<T>(view<T>(data, rows, columns, stride), {reinterpret_cast<const double*>(target), target_stride}, n_max,
                     reinterpret_cast<int32_t*>(out), threads);
  });
  m.def(("budget_at_" + suffix).c_str(), [](uintptr_t data, int64_t rows, int64_t columns, int64_t stride, double target, int64_t n_max,
                                            uintptr_t out, int threads) {
    py::gil_scoped_release release;
    return budget<T>(view<T>(data, rows, columns, stride), {&target, 0}, n_max, reinterpret_cast<int32_t*>(out), threads);
  });
  m.def(("curve_" + suffix).c_str(), [](uintptr_t data, int64_t rows, int64_t columns, int64_t stride, int64_t n_max,
                                        uintptr_t out, int threads) {
    py::gil_scoped_release release;
    return curve<T>(view<T>(data, rows, columns, stride), n_max, reinterpret_cast<T*>(out), threads);
  });
  m.def(("allocate_" + suffix).c_str(), [](uintptr_t data, int64_t rows, int64_t columns, int64_t stride, int64_t total,
                                           int64_t n_max, int64_t n_min, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    return allocate<T>(view<T>(data, rows, columns, stride), total, n_max, n_min, reinterpret_cast<int32_t*>(out), threads);
  });
}

}  // namespace

void bind(py::module_& m) {
  bind_type<float>(m, "f32");
  bind_type<double>(m, "f64");
}

}  // namespace prmfast::ias
