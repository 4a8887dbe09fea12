#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "candidate_td/candidate_td.h"

namespace py = pybind11;

namespace prmfast::candidate_td {
namespace {

Dtype dtype_of(int code) { return static_cast<Dtype>(code); }

Logits view(uintptr_t data, int dtype, int64_t stride) { return {reinterpret_cast<const void*>(data), dtype_of(dtype), stride}; }

const int64_t* ids_at(uintptr_t data) { return reinterpret_cast<const int64_t*>(data); }

// None, or (row, whether the policy side is at fault, what is wrong).
py::object told(const Invalid& invalid) {
  if (invalid.row < 0) return py::none();
  const char* kind = invalid.fault == Fault::nan ? "NaN" : invalid.fault == Fault::positive_infinity ? "+inf" : "only -inf";
  return py::make_tuple(invalid.row, invalid.policy, kind);
}

template <class Out>
void write(const Result& result, uintptr_t offsets, uintptr_t ids, uintptr_t logp, uintptr_t advantage) {
  result.write(reinterpret_cast<int64_t*>(offsets), reinterpret_cast<int64_t*>(ids), reinterpret_cast<Out*>(logp),
               reinterpret_cast<Out*>(advantage));
}

}  // namespace

void bind(py::module_& m) {
  py::class_<Options>(m, "Options").def(py::init([](double p_min, double beta, double policy_temperature, double reward_temperature) {
    return Options{p_min, beta, policy_temperature, reward_temperature};
  }));
  py::class_<Result>(m, "Result")
      .def("invalid", [](const Result& self) { return told(self.invalid()); })
      .def("entries", &Result::entries)
      .def("write_f32", &write<float>)
      .def("write_f64", &write<double>);
  m.def("run", [](uintptr_t policy, int policy_dtype, int64_t policy_stride, uintptr_t reward, int reward_dtype, int64_t reward_stride,
                  int64_t rows, int64_t columns, const Options& options, uintptr_t sampled, int threads) {
    py::gil_scoped_release release;
    return run(view(policy, policy_dtype, policy_stride), view(reward, reward_dtype, reward_stride), rows, columns, options,
               ids_at(sampled), threads);
  });
  py::class_<Rows>(m, "Rows")
      .def(py::init([](int64_t rows, const Options& options, uintptr_t sampled) {
        return std::make_unique<Rows>(rows, options, ids_at(sampled));
      }))
      .def("add",
           [](Rows& self, uintptr_t policy, int policy_dtype, int64_t policy_stride, uintptr_t reward, int reward_dtype,
              int64_t reward_stride, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns, int threads) {
             py::gil_scoped_release release;
             self.add(view(policy, policy_dtype, policy_stride), view(reward, reward_dtype, reward_stride), first_row, rows,
                      first_column, columns, threads);
           })
      .def("finish", [](const Rows& self) {
        py::gil_scoped_release release;
        return self.finish();
      });
  m.def("token_logprob", [](uintptr_t logits, int dtype, int64_t stride, int64_t rows, int64_t columns, double temperature,
                            uintptr_t ids, uintptr_t logp, uintptr_t norm, int threads) {
    Invalid invalid;
    {
      py::gil_scoped_release release;
      invalid = token_logprob(view(logits, dtype, stride), rows, columns, temperature, ids_at(ids), reinterpret_cast<double*>(logp),
                              reinterpret_cast<Norm*>(norm), threads);
    }
    return told(invalid);
  });
  m.def("token_logprob_backward", [](uintptr_t logits, int dtype, int64_t stride, int64_t rows, int64_t columns, double temperature,
                                     uintptr_t ids, uintptr_t norm, uintptr_t grad, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    token_logprob_backward(view(logits, dtype, stride), rows, columns, temperature, ids_at(ids), reinterpret_cast<const Norm*>(norm),
                           reinterpret_cast<const double*>(grad), reinterpret_cast<void*>(out), threads);
  });
}

}  // namespace prmfast::candidate_td
