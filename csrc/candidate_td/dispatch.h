// From a dtype that is known at run time to a pointer of its type.
#pragma once
#include "candidate_td/candidate_td.h"

namespace prmfast::candidate_td {

constexpr int64_t kChunk = LogSum::kChunk;
constexpr int64_t kWorkPerLogit = 3;  // for thread_count: its unit is a scalar operation, of which a vector does many

template <class Use>
void with_row(const Logits& logits, int64_t row, const Use& use) {
  const auto at = [&](auto* base) { use(base + row * logits.stride); };
  switch (logits.dtype) {
    case Dtype::float32: return at(static_cast<const float*>(logits.data));
    case Dtype::float64: return at(static_cast<const double*>(logits.data));
    case Dtype::bfloat16: return at(static_cast<const BFloat16*>(logits.data));
    case Dtype::float16: return at(static_cast<const Float16*>(logits.data));
  }
}

template <class Use>
void with_rows(const Logits& first, const Logits& second, int64_t row, const Use& use) {
  with_row(first, row, [&](auto* a) { with_row(second, row, [&](auto* b) { use(a, b); }); });
}

}  // namespace prmfast::candidate_td
