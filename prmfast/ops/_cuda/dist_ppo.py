"""Room dist_ppo on the compiled CUDA backend: float32, bfloat16 and float16 logits.

The linear variants are the reference's: no call of them is resolved to this backend.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.common.rows import contiguous_columns
from prmfast.kernels.dist_ppo.reference import Rule, empty_like, linear_dist_ppo, linear_dist_ppo_backward
from prmfast.ops._cuda._extension import _C, stream_of

__all__ = [
    "dist_ppo",
    "dist_ppo_backward",
    "dist_ppo_with_grad",
    "empty_like",
    "linear_dist_ppo",
    "linear_dist_ppo_backward",
]

_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _view(logits: Tensor) -> tuple[int, int, int, int, int]:
    """Pointer, row stride, T, V, dtype code."""
    return logits.data_ptr(), logits.stride(0), *logits.shape, _CODE[logits.dtype]


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.float64, device=like.device)


class _Objective:
    """What the kernels read of the candidates and the rule, held as float64 while they do."""

    def __init__(self, candidates: Candidates, row_weight: Tensor, rule: Rule) -> None:
        self.offsets, self.token_ids = candidates.offsets.contiguous(), candidates.token_ids.contiguous()
        self.policy_logp = candidates.policy_logp.double().contiguous()
        self.advantage, self.row_weight = candidates.advantage.double().contiguous(), row_weight.double()
        self.rule = rule

    def arguments(self) -> tuple[int | float, ...]:
        held = (self.offsets, self.token_ids, self.policy_logp, self.advantage, self.row_weight)
        dual = math.inf if self.rule.dual_clip is None else self.rule.dual_clip
        limits = (self.rule.clip_low, self.rule.clip_high, dual, self.rule.temperature)
        return *(field.data_ptr() for field in held), self.row_weight.stride(0), *limits


def dist_ppo(logits: Tensor, candidates: Candidates, row_weight: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference."""
    held, objective = contiguous_columns(logits), _Objective(candidates, row_weight, rule)
    row_loss, lse = _numbers(len(held), held), _numbers(len(held), held)
    coefficients = _numbers(len(objective.token_ids), held)
    size = _C.cuda.dist_ppo.workspace_bytes(*held.shape)
    workspace = torch.empty(size, dtype=torch.uint8, device=held.device)
    outputs = (row_loss, lse, coefficients)
    with stream_of(held) as stream:
        pointers = [tensor.data_ptr() for tensor in (workspace, *outputs)]
        _C.cuda.dist_ppo.loss(*_view(held), *objective.arguments(), *pointers, stream)
    return row_loss.sum(), lse, coefficients


def dist_ppo_backward(
    logits: Tensor, offsets: Tensor, token_ids: Tensor, *, lse: Tensor, coefficients: Tensor, temperature: float
) -> Tensor:
    """See the reference."""
    held = contiguous_columns(logits)
    state = [tensor.contiguous() for tensor in (offsets, token_ids, lse, coefficients)]
    out = torch.empty(held.shape, dtype=held.dtype, device=held.device)
    with stream_of(held) as stream:
        pointers = [tensor.data_ptr() for tensor in state]
        _C.cuda.dist_ppo.gradient(*_view(held), *pointers, temperature, out.data_ptr(), out.stride(0), stream)
    return out


def dist_ppo_with_grad(
    logits: Tensor, candidates: Candidates, row_weight: Tensor, rule: Rule, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """See the reference. One launch."""
    held, objective = contiguous_columns(logits), _Objective(candidates, row_weight, rule)
    settled = _numbers(len(objective.token_ids), held)
    row_loss, lse = _numbers(len(held), held), _numbers(len(held), held)
    with stream_of(held) as stream:
        pointers = [tensor.data_ptr() for tensor in (settled, row_loss, lse, out)]
        _C.cuda.dist_ppo.loss_and_gradient(*_view(held), *objective.arguments(), *pointers, out.stride(0), stream)
    return row_loss.sum(), lse
