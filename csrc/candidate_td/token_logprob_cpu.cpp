#include <algorithm>
#include <cmath>
#include <limits>

#include "candidate_td/candidate_td.h"
#include "candidate_td/dispatch.h"
#include "common/flush_denormals.h"
#include "common/parallel_for.h"
#include "common/sweep.h"

namespace prmfast::candidate_td {
namespace {

template <class S>
LogSum log_sum_of(const S* x, int64_t columns, double scale) {
  LogSum total;
  for (int64_t c = 0; c < columns; c += kChunk) total.add(x + c, std::min(kChunk, columns - c), scale);
  return total;
}

template <class S>
void backward_row(const S* x, int64_t columns, double temperature, int64_t id, const Norm& norm, double grad, S* out) {
  const double factor = -grad / temperature * std::exp(-norm.log_sum);
  slopes(x, columns, static_cast<Real<S>>(kLog2e / temperature), static_cast<Real<S>>(norm.reference), factor, out);
  const double p = std::exp((widen1(x + id) - norm.reference) / temperature - norm.log_sum);
  store1(out + id, grad / temperature * (1 - p));
}

}  // namespace

Invalid token_logprob(const Logits& logits, int64_t rows, int64_t columns, double temperature, const int64_t* ids, double* logp,
                      Norm* norm, int threads) {
  const double scale = kLog2e / temperature;
  const int used = thread_count(rows, kWorkPerLogit * columns, threads);
  std::vector<Invalid> invalid(std::max(used, 1));
  parallel_rows(rows, used, [&](int thread, int64_t first, int64_t end) {
    const FlushDenormals flush(Flush::results);
    for (int64_t t = first; t < end && invalid[thread].row < 0; ++t) {
      with_row(logits, t, [&](auto* x) {
        const LogSum total = log_sum_of(x, columns, scale);
        if (total.fault() != Fault::none) invalid[thread] = {t, true, total.fault()};
        norm[t] = {total.reference(), kLn2 * total.log2_sum()};
        logp[t] = std::min(0.0, kLn2 * total.log2_p(widen1(x + ids[t]), scale));
      });
    }
  });
  for (const Invalid& found : invalid)
    if (found.row >= 0) return found;
  return {};
}

void token_logprob_backward(const Logits& logits, int64_t rows, int64_t columns, double temperature, const int64_t* ids,
                            const Norm* norm, const double* grad, void* out, int threads) {
  parallel_rows(rows, thread_count(rows, kWorkPerLogit * columns, threads), [&](int, int64_t first, int64_t end) {
    const FlushDenormals flush(Flush::results);
    for (int64_t t = first; t < end; ++t) {
      with_row(logits, t, [&](auto* x) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
        S* row = static_cast<S*>(out) + t * columns;
        if (grad[t] == 0) std::fill(row, row + columns, S{});
        else backward_row(x, columns, temperature, ids[t], norm[t], grad[t], row);
      });
    }
  });
}

}  // namespace prmfast::candidate_td
