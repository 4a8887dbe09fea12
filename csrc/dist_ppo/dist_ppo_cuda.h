// Room dist_ppo on CUDA: what the functions of dist_ppo.h do, on device memory, in the order of a stream. Nothing here allocates or
// waits for the device; an empty set of rows launches nothing. A launch that fails throws std::runtime_error.
#pragma once
#include <cstdint>

namespace prmfast::dist_ppo::cuda {

enum class Dtype { float32, bfloat16, float16 };

// Logits or their gradient: columns contiguous, stride between rows in elements.
struct Rows {
  void* data;
  int64_t stride;
};

struct Shape {
  int64_t rows, columns;
  Dtype dtype;
};

// Entries offsets[t] .. offsets[t + 1] are row t's, by increasing token id, none twice.
struct Entries {
  const int64_t *offsets, *token_ids;
};

struct Objective {
  const double *policy_logp, *advantage;  // of every entry
  const double* row_weight;
  int64_t row_weight_stride;
  double clip_low, clip_high, dual_clip;  // dual_clip: infinity where there is none
  double temperature;
};

// Bytes that loss() needs while it runs.
int64_t workspace_bytes(int64_t rows, int64_t columns);

// row_loss [rows]; lse [rows], 0 in rows without entries, not finite in a row that has no distribution; coefficients [entries] =
// d loss / d log pi_theta. Rows without entries are not read.
void loss(const Rows& logits, Shape shape, const Entries& entries, const Objective& objective, void* workspace, double* row_loss,
          double* lse, double* coefficients, void* stream);

// out = d loss / d logits. Rows whose coefficients are all zero are not read, those of an lse that is not finite not written.
void gradient(const Rows& logits, Shape shape, const Entries& entries, const double* lse, const double* coefficients,
              double temperature, const Rows& out, void* stream);

// Both in one launch, the same bits; out may be the logits. settled [entries]: memory that the call needs while it runs.
void loss_and_gradient(const Rows& logits, Shape shape, const Entries& entries, const Objective& objective, double* settled,
                       double* row_loss, double* lse, const Rows& out, void* stream);

}  // namespace prmfast::dist_ppo::cuda
