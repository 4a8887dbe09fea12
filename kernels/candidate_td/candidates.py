"""The ragged set of likely next tokens, in the one layout that every backend writes and reads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Candidates(NamedTuple):
    """CSR rows: the candidates of row t are the entries offsets[t] .. offsets[t + 1], by increasing token id.

    offsets: int64 [T + 1], offsets[0] = 0.
    token_ids: int64 [nnz], no id twice in a row.
    policy_logp: [nnz] log pi_old(y | s_t) of the policy that sampled.
    advantage: [nnz] A_TD(s_t, y).
    """

    offsets: Tensor
    token_ids: Tensor
    policy_logp: Tensor
    advantage: Tensor
