"""Room dist_ppo on the compiled CPU backend; float64 logits take the reference, float64 layers torch in blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.common.rows import contiguous_columns
from prmfast.kernels.dist_ppo import reference
from prmfast.kernels.dist_ppo.reference import Rule
from prmfast.ops._cpu._extension import _C
from prmfast.ops._cpu.dist_ppo_blocks import linear_dist_ppo, linear_dist_ppo_backward

__all__ = [
    "dist_ppo",
    "dist_ppo_backward",
    "dist_ppo_with_grad",
    "empty_like",
    "linear_dist_ppo",
    "linear_dist_ppo_backward",
]

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _view(logits: Tensor) -> tuple[int, int, int, int]:
    return logits.data_ptr(), *logits.shape, logits.stride(0)


def _spans(offsets: Tensor, token_ids: Tensor) -> tuple[int, int, int]:
    return offsets.data_ptr(), offsets.data_ptr() + offsets.element_size(), token_ids.data_ptr()


class _Objective:
    """What the extension reads, held as float64 while it does."""

    def __init__(self, candidates: Candidates, row_weight: Tensor, rule: Rule) -> None:
        self.offsets, self.token_ids = candidates.offsets.contiguous(), candidates.token_ids.contiguous()
        self.policy_logp = candidates.policy_logp.double().contiguous()
        self.advantage, self.row_weight = candidates.advantage.double().contiguous(), row_weight.double()
        self.lse = torch.empty(len(self.offsets) - 1, dtype=torch.float64)
        self.coefficients = torch.empty(len(self.token_ids), dtype=torch.float64)
        self.rule = rule

    def arguments(self) -> tuple[tuple[int, ...] | tuple[float, ...] | int, ...]:
        rule, weight = self.rule, self.row_weight
        dual = math.inf if rule.dual_clip is None else rule.dual_clip
        return (
            _spans(self.offsets, self.token_ids),
            (self.policy_logp.data_ptr(), self.advantage.data_ptr(), weight.data_ptr(), weight.stride(0)),
            (rule.clip_low, rule.clip_high, dual, rule.temperature),
            self.lse.data_ptr(),
            self.coefficients.data_ptr(),
        )


def empty_like(logits: Tensor) -> Tensor:
    """See the reference. In large pages where the system leaves the choice: it is about to be written, once."""
    out = torch.empty(logits.shape, dtype=logits.dtype)
    _C.dist_ppo.prefer_large_pages(out.data_ptr(), out.numel() * out.element_size())
    return out


def dist_ppo(logits: Tensor, candidates: Candidates, row_weight: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference."""
    if logits.dtype == torch.float64:
        return reference.dist_ppo(logits, candidates, row_weight, rule)
    held, objective = contiguous_columns(logits), _Objective(candidates, row_weight, rule)
    run = getattr(_C.dist_ppo, f"loss_{_SUFFIX[held.dtype]}")
    loss = run(_view(held), *objective.arguments(), torch.get_num_threads())
    return torch.tensor(loss, dtype=torch.float64), objective.lse, objective.coefficients


def dist_ppo_backward(
    logits: Tensor, offsets: Tensor, token_ids: Tensor, *, lse: Tensor, coefficients: Tensor, temperature: float
) -> Tensor:
    """See the reference."""
    if logits.dtype == torch.float64:
        return reference.dist_ppo_backward(
            logits, offsets, token_ids, lse=lse, coefficients=coefficients, temperature=temperature
        )
    held, offsets, token_ids = contiguous_columns(logits), offsets.contiguous(), token_ids.contiguous()
    out = empty_like(logits)
    getattr(_C.dist_ppo, f"gradient_{_SUFFIX[held.dtype]}")(
        _view(held),
        _spans(offsets, token_ids),
        lse.contiguous().data_ptr(),
        coefficients.data_ptr(),
        temperature,
        _view(out),
        torch.get_num_threads(),
    )
    return out


def dist_ppo_with_grad(
    logits: Tensor, candidates: Candidates, row_weight: Tensor, rule: Rule, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    if logits.dtype == torch.float64:
        return reference.dist_ppo_with_grad(logits, candidates, row_weight, rule, out=out)
    held, objective = contiguous_columns(logits), _Objective(candidates, row_weight, rule)
    run = getattr(_C.dist_ppo, f"loss_and_gradient_{_SUFFIX[held.dtype]}")
    loss = run(_view(held), *objective.arguments(), _view(out), torch.get_num_threads())
    return torch.tensor(loss, dtype=torch.float64), objective.lse
