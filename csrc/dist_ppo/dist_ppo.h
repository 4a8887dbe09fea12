// Room dist_ppo: the clipped distributional policy loss over a few candidate tokens a row, and its gradient to the logits.
//
// S is float, BFloat16 or Float16: storage of the logits and of the gradient; arithmetic is float32 over the vocabulary and
// float64 over the candidates. Rows without candidates are not read. A row without a distribution (NaN, +inf or nothing but
// -inf) gets a log-sum-exp that is not finite and no gradient: the caller says so.
#pragma once
#include <cstdint>

#include "common/logits.h"

namespace prmfast::dist_ppo {

template <class S>
struct Rows {
  S* data;
  int64_t rows, columns, stride;  // stride between rows, in elements; columns are contiguous
};

// Entries begin[t] .. end[t] are row t's, by increasing token id, none twice.
struct Entries {
  const int64_t *begin, *end, *token_ids;
};

struct Objective {
  const double *policy_logp, *advantage;  // of every entry
  const double* row_weight;
  int64_t row_weight_stride;
  double clip_low, clip_high, dual_clip;  // dual_clip: infinity where there is none
  double temperature;
};

// lse[rows], 0 in rows without entries; coefficients[entries] = d loss / d log pi_theta; returns the loss.
template <class S>
double loss(const Rows<const S>& logits, const Entries& entries, const Objective& objective, double* lse, double* coefficients,
            int threads);

// out = d loss / d logits, where d loss / d log pi_theta of the entries and lse are known. Every element of out is written.
// out may be the logits themselves.
template <class S>
void gradient(const Rows<const S>& logits, const Entries& entries, const double* lse, const double* coefficients,
              double temperature, const Rows<S>& out, int threads);

// Both in one go: a row's second reading comes from the cache.
template <class S>
double loss_and_gradient(const Rows<const S>& logits, const Entries& entries, const Objective& objective, double* lse,
                         double* coefficients, const Rows<S>& out, int threads);

// A block of columns first .. first + columns of the logits: (reference, sum) of every row's tokens that are no candidates goes on
// from where the last block left it, starting at (0, 0); logits of entries within the block go to entry_logits.
void absorb_block(const Rows<const float>& block, int64_t first, const Entries& entries, double temperature, double* reference,
                  double* sum, float* entry_logits, int threads);

// lse of the rows after the last block.
void finish_blocks(const double* reference, const double* sum, int64_t rows, const Entries& entries, const float* entry_logits,
                   double temperature, double* lse);

// The block turned into its part of d loss / d logits, in place.
void differentiate_block(const Rows<float>& block, int64_t first, const Entries& entries, const double* lse,
                         const double* coefficients, double temperature, int threads);

}  // namespace prmfast::dist_ppo
