// The functions of csrc/dist_ppo/bind_cuda.cpp, flat, for ctypes.
#include "dist_ppo/dist_ppo_cuda.h"

#include "shim.h"

using namespace prmfast::dist_ppo::cuda;

namespace {
Shape shape(int64_t rows, int64_t columns, int64_t dtype) { return {rows, columns, static_cast<Dtype>(dtype)}; }
}  // namespace

extern "C" {
int64_t dist_ppo_workspace_bytes(int64_t rows, int64_t columns) { return workspace_bytes(rows, columns); }

const char* dist_ppo_loss(void* logits, int64_t stride, int64_t rows, int64_t columns, int64_t dtype, const int64_t* offsets,
                          const int64_t* token_ids, const double* policy_logp, const double* advantage, const double* row_weight,
                          int64_t row_weight_stride, double clip_low, double clip_high, double dual_clip, double temperature,
                          void* workspace, double* row_loss, double* lse, double* coefficients, void* stream) {
  return emulate::guarded_call([&] {
    loss({logits, stride}, shape(rows, columns, dtype), {offsets, token_ids},
         {policy_logp, advantage, row_weight, row_weight_stride, clip_low, clip_high, dual_clip, temperature}, workspace, row_loss, lse,
         coefficients, stream);
  });
}

const char* dist_ppo_gradient(void* logits, int64_t stride, int64_t rows, int64_t columns, int64_t dtype, const int64_t* offsets,
                              const int64_t* token_ids, const double* lse, const double* coefficients, double temperature, void* out,
                              int64_t out_stride, void* stream) {
  return emulate::guarded_call([&] {
    gradient({logits, stride}, shape(rows, columns, dtype), {offsets, token_ids}, lse, coefficients, temperature, {out, out_stride},
             stream);
  });
}

const char* dist_ppo_loss_and_gradient(void* logits, int64_t stride, int64_t rows, int64_t columns, int64_t dtype,
                                       const int64_t* offsets, const int64_t* token_ids, const double* policy_logp,
                                       const double* advantage, const double* row_weight, int64_t row_weight_stride, double clip_low,
                                       double clip_high, double dual_clip, double temperature, double* settled, double* row_loss,
                                       double* lse, void* out, int64_t out_stride, void* stream) {
  return emulate::guarded_call([&] {
    loss_and_gradient({logits, stride}, shape(rows, columns, dtype), {offsets, token_ids},
                      {policy_logp, advantage, row_weight, row_weight_stride, clip_low, clip_high, dual_clip, temperature}, settled,
                      row_loss, lse, {out, out_stride}, stream);
  });
}
}
