// The functions of csrc/candidate_td/bind_cuda.cpp, flat, for ctypes.
#include "candidate_td/candidate_td_cuda.h"

#include "shim.h"

using namespace prmfast::candidate_td::cuda;

namespace {
Logits logits(const void* data, int64_t dtype, int64_t stride) { return {data, static_cast<Dtype>(dtype), stride}; }
}  // namespace

extern "C" {
int64_t candidate_td_workspace_bytes(int64_t rows, int64_t columns) { return workspace_bytes({rows, columns}); }

const char* candidate_td_candidates(const void* policy, int64_t policy_dtype, int64_t policy_stride, const void* reward,
                                    int64_t reward_dtype, int64_t reward_stride, int64_t rows, int64_t columns, double p_min,
                                    double beta, double policy_temperature, double reward_temperature, const int64_t* sampled,
                                    void* workspace, int32_t* ids, float* logp, float* advantage, int32_t* counts, void* stream) {
  return emulate::guarded_call([&] {
    candidates(logits(policy, policy_dtype, policy_stride), logits(reward, reward_dtype, reward_stride), {rows, columns},
               {p_min, beta, policy_temperature, reward_temperature}, sampled, workspace, {ids, logp, advantage, counts}, stream);
  });
}

const char* candidate_td_compact(int32_t* padded_ids, float* padded_logp, float* padded_advantage, int32_t* counts, int64_t rows,
                                 const int64_t* offsets, int64_t* ids, float* logp, float* advantage, void* stream) {
  return emulate::guarded_call(
      [&] { compact({padded_ids, padded_logp, padded_advantage, counts}, rows, offsets, ids, logp, advantage, stream); });
}

const char* candidate_td_token_logprob(const void* data, int64_t dtype, int64_t stride, int64_t rows, int64_t columns,
                                       double temperature, const int64_t* ids, void* workspace, float* logp, double* norm,
                                       void* stream) {
  return emulate::guarded_call([&] {
    token_logprob(logits(data, dtype, stride), {rows, columns}, temperature, ids, workspace, logp, norm, stream);
  });
}

const char* candidate_td_token_logprob_backward(const void* data, int64_t dtype, int64_t stride, int64_t rows, int64_t columns,
                                                double temperature, const int64_t* ids, const double* norm, const double* grad,
                                                void* out, void* stream) {
  return emulate::guarded_call([&] {
    token_logprob_backward(logits(data, dtype, stride), {rows, columns}, temperature, ids, norm, grad, out, stream);
  });
}
}
