#include <pybind11/pybind11.h>

#include <string>

#include "common/large_pages.h"
#include "dist_ppo/dist_ppo.h"

namespace py = pybind11;

namespace prmfast::dist_ppo {
namespace {

using Address = uintptr_t;
using View = std::tuple<Address, int64_t, int64_t, int64_t>;           // data, rows, columns, stride
using Spans = std::tuple<Address, Address, Address>;                   // begin, end, token_ids
using Wanted = std::tuple<Address, Address, Address, int64_t>;         // policy_logp, advantage, row_weight, its stride
using Limits = std::tuple<double, double, double, double>;             // clip_low, clip_high, dual_clip, temperature

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class S>
Rows<S> rows(const View& view) {
  const auto [data, count, columns, stride] = view;
  return {at<S>(data), count, columns, stride};
}

Entries entries(const Spans& spans) {
  const auto [begin, end, ids] = spans;
  return {at<const int64_t>(begin), at<const int64_t>(end), at<const int64_t>(ids)};
}

Objective objective(const Wanted& wanted, const Limits& limits) {
  const auto [logp, advantage, weight, stride] = wanted;
  const auto [low, high, dual, temperature] = limits;
  return {at<const double>(logp), at<const double>(advantage), at<const double>(weight), stride, low, high, dual, temperature};
}

template <class S>
void bind_type(py::module_& m, const std::string& suffix) {
  m.def(("loss_" + suffix).c_str(), [](const View& logits, const Spans& spans, const Wanted& wanted, const Limits& limits,
                                       Address lse, Address coefficients, int threads) {
    py::gil_scoped_release release;
    return loss<S>(rows<const S>(logits), entries(spans), objective(wanted, limits), at<double>(lse), at<double>(coefficients),
                   threads);
  });
  m.def(("gradient_" + suffix).c_str(), [](const View& logits, const Spans& spans, Address lse, Address coefficients,
                                           double temperature, const View& out, int threads) {
    py::gil_scoped_release release;
    gradient<S>(rows<const S>(logits), entries(spans), at<const double>(lse), at<const double>(coefficients), temperature,
                rows<S>(out), threads);
  });
  m.def(("loss_and_gradient_" + suffix).c_str(),
        [](const View& logits, const Spans& spans, const Wanted& wanted, const Limits& limits, Address lse, Address coefficients,
           const View& out, int threads) {
          py::gil_scoped_release release;
          return loss_and_gradient<S>(rows<const S>(logits), entries(spans), objective(wanted, limits), at<double>(lse),
                                      at<double>(coefficients), rows<S>(out), threads);
        });
}

}  // namespace

void bind(py::module_& m) {
  bind_type<float>(m, "f32");
  bind_type<BFloat16>(m, "bf16");
  bind_type<Float16>(m, "f16");
  m.def("prefer_large_pages", [](Address memory, int64_t bytes) { prefer_large_pages(at<void>(memory), bytes); });
  m.def("absorb_block", [](const View& block, int64_t first, const Spans& spans, double temperature, Address reference,
                           Address sum, Address entry_logits, int threads) {
    py::gil_scoped_release release;
    absorb_block(rows<const float>(block), first, entries(spans), temperature, at<double>(reference), at<double>(sum),
                 at<float>(entry_logits), threads);
  });
  m.def("finish_blocks", [](Address reference, Address sum, int64_t rows, const Spans& spans, Address entry_logits, double temperature,
                            Address lse) {
    finish_blocks(at<const double>(reference), at<const double>(sum), rows, entries(spans), at<const float>(entry_logits), temperature,
                  at<double>(lse));
  });
  m.def("differentiate_block", [](const View& block, int64_t first, const Spans& spans, Address lse, Address coefficients,
                                  double temperature, int threads) {
    py::gil_scoped_release release;
    differentiate_block(rows<float>(block), first, entries(spans), at<const double>(lse), at<const double>(coefficients),
                        temperature, threads);
  });
}

}  // namespace prmfast::dist_ppo
