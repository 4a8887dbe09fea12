#ifdef PRMFAST_CUDA
#include <pybind11/pybind11.h>

#include "dist_ppo/dist_ppo_cuda.h"

namespace py = pybind11;

namespace prmfast::dist_ppo::cuda {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Shape shape(int64_t rows, int64_t columns, int dtype) { return {rows, columns, static_cast<Dtype>(dtype)}; }

Entries entries(Address offsets, Address token_ids) { return {at<const int64_t>(offsets), at<const int64_t>(token_ids)}; }

Objective objective(Address policy_logp, Address advantage, Address row_weight, int64_t row_weight_stride, double clip_low,
                    double clip_high, double dual_clip, double temperature) {
  return {at<const double>(policy_logp), at<const double>(advantage), at<const double>(row_weight), row_weight_stride,
          clip_low,                      clip_high,                   dual_clip,                    temperature};
}

}  // namespace

void bind(py::module_& m) {
  m.def("workspace_bytes", &workspace_bytes);
  m.def("loss", [](Address logits, int64_t stride, int64_t rows, int64_t columns, int dtype, Address offsets, Address token_ids,
                   Address policy_logp, Address advantage, Address row_weight, int64_t row_weight_stride, double clip_low,
                   double clip_high, double dual_clip, double temperature, Address workspace, Address row_loss, Address lse,
                   Address coefficients, Address stream) {
    loss({at<void>(logits), stride}, shape(rows, columns, dtype), entries(offsets, token_ids),
         objective(policy_logp, advantage, row_weight, row_weight_stride, clip_low, clip_high, dual_clip, temperature),
         at<void>(workspace), at<double>(row_loss), at<double>(lse), at<double>(coefficients), at<void>(stream));
  });
  m.def("gradient", [](Address logits, int64_t stride, int64_t rows, int64_t columns, int dtype, Address offsets, Address token_ids,
                       Address lse, Address coefficients, double temperature, Address out, int64_t out_stride, Address stream) {
    gradient({at<void>(logits), stride}, shape(rows, columns, dtype), entries(offsets, token_ids), at<const double>(lse),
             at<const double>(coefficients), temperature, {at<void>(out), out_stride}, at<void>(stream));
  });
  m.def("loss_and_gradient", [](Address logits, int64_t stride, int64_t rows, int64_t columns, int dtype, Address offsets,
                                Address token_ids, Address policy_logp, Address advantage, Address row_weight,
                                int64_t row_weight_stride, double clip_low, double clip_high, double dual_clip, double temperature,
                                Address settled, Address row_loss, Address lse, Address out, int64_t out_stride, Address stream) {
    loss_and_gradient({at<void>(logits), stride}, shape(rows, columns, dtype), entries(offsets, token_ids),
                      objective(policy_logp, advantage, row_weight, row_weight_stride, clip_low, clip_high, dual_clip, temperature),
                      at<double>(settled), at<double>(row_loss), at<double>(lse), {at<void>(out), out_stride}, at<void>(stream));
  });
}

}  // namespace prmfast::dist_ppo::cuda
#endif
