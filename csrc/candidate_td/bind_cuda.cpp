#ifdef PRMFAST_CUDA
#include <pybind11/pybind11.h>

#include "candidate_td/candidate_td_cuda.h"

namespace py = pybind11;

namespace prmfast::candidate_td::cuda {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Logits logits(Address data, int dtype, int64_t stride) { return {at<const void>(data), static_cast<Dtype>(dtype), stride}; }

}  // namespace

void bind(py::module_& m) {
  m.attr("SLOTS") = kSlots;
  m.def("workspace_bytes", [](int64_t rows, int64_t columns) { return workspace_bytes({rows, columns}); });
  m.def("candidates", [](Address policy, int policy_dtype, int64_t policy_stride, Address reward, int reward_dtype, int64_t reward_stride,
                         int64_t rows, int64_t columns, double p_min, double beta, double policy_temperature,
                         double reward_temperature, Address sampled, Address workspace, Address ids, Address policy_logp,
                         Address advantage, Address counts, Address stream) {
    const Padded out{at<int32_t>(ids), at<float>(policy_logp), at<float>(advantage), at<int32_t>(counts)};
    candidates(logits(policy, policy_dtype, policy_stride), logits(reward, reward_dtype, reward_stride), {rows, columns},
               {p_min, beta, policy_temperature, reward_temperature}, at<const int64_t>(sampled), at<void>(workspace), out,
               at<void>(stream));
  });
  m.def("compact", [](Address padded_ids, Address padded_logp, Address padded_advantage, Address counts, int64_t rows, Address offsets,
                      Address ids, Address policy_logp, Address advantage, Address stream) {
    const Padded padded{at<int32_t>(padded_ids), at<float>(padded_logp), at<float>(padded_advantage), at<int32_t>(counts)};
    compact(padded, rows, at<const int64_t>(offsets), at<int64_t>(ids), at<float>(policy_logp), at<float>(advantage), at<void>(stream));
  });
  m.def("token_logprob", [](Address data, int dtype, int64_t stride, int64_t rows, int64_t columns, double temperature, Address ids,
                            Address workspace, Address logp, Address norm, Address stream) {
    token_logprob(logits(data, dtype, stride), {rows, columns}, temperature, at<const int64_t>(ids), at<void>(workspace), at<float>(logp),
                  at<double>(norm), at<void>(stream));
  });
  m.def("token_logprob_backward", [](Address data, int dtype, int64_t stride, int64_t rows, int64_t columns, double temperature,
                                     Address ids, Address norm, Address grad, Address out, Address stream) {
    token_logprob_backward(logits(data, dtype, stride), {rows, columns}, temperature, at<const int64_t>(ids), at<const double>(norm),
                           at<const double>(grad), at<void>(out), at<void>(stream));
  });
}

}  // namespace prmfast::candidate_td::cuda
#endif
