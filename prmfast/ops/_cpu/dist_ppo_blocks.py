"""linear_dist_ppo on the compiled CPU backend: what is done to a block of float32 logits."""

from __future__ import annotations

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.dist_ppo import blocks
from prmfast.kernels.dist_ppo.blocks import Spans
from prmfast.kernels.dist_ppo.reference import Rule, settle
from prmfast.ops._cpu._extension import _C


def _view(block: Tensor) -> tuple[int, int, int, int]:
    return block.data_ptr(), *block.shape, block.stride(0)


class _Folded:
    """Running sums over the tokens that are no candidates, and the logits of the entries."""

    def __init__(self, candidates: Candidates, rule: Rule) -> None:
        self.candidates, self.rule = candidates, rule
        self.offsets, self.token_ids = candidates.offsets.contiguous(), candidates.token_ids.contiguous()
        self.reference = torch.zeros(len(self.offsets) - 1, dtype=torch.float64)
        self.sum = torch.zeros_like(self.reference)
        self.entry_logits = torch.zeros(len(self.token_ids))

    def _spans(self) -> tuple[int, int, int]:
        return self.offsets.data_ptr(), self.offsets.data_ptr() + self.offsets.itemsize, self.token_ids.data_ptr()

    def add(self, block: Tensor, first: int) -> None:
        held = self.reference.data_ptr(), self.sum.data_ptr(), self.entry_logits.data_ptr()
        _C.dist_ppo.absorb_block(
            _view(block), first, self._spans(), self.rule.temperature, *held, torch.get_num_threads()
        )

    def settle(self, row_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lse = torch.empty_like(self.sum)
        held = self.reference.data_ptr(), self.sum.data_ptr(), len(lse)
        entry_logits = self.entry_logits.data_ptr()
        _C.dist_ppo.finish_blocks(*held, self._spans(), entry_logits, self.rule.temperature, lse.data_ptr())
        loss, coefficients = settle(self.entry_logits, lse, self.candidates, row_weight, self.rule)
        return loss, lse, coefficients


def _differentiate(
    block: Tensor, first: int, spans: Spans, *, lse: Tensor, coefficients: Tensor, temperature: float
) -> None:
    entries = spans.begin.data_ptr(), spans.end.data_ptr(), spans.token_ids.data_ptr()
    held = lse.data_ptr(), coefficients.data_ptr()
    _C.dist_ppo.differentiate_block(_view(block), first, entries, *held, temperature, torch.get_num_threads())


def linear_dist_ppo(
    hidden: Tensor, weight: Tensor, candidates: Candidates, *, row_weight: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference. Rows without candidates take no part in any product."""
    return blocks.forward(hidden, weight, candidates, row_weight=row_weight, rule=rule, fold=_Folded)


def linear_dist_ppo_backward(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    token_ids: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    temperature: float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """See the reference. Rows whose coefficients are all zero (clipped, or no candidates) take no part."""
    return blocks.backward(
        hidden,
        weight,
        offsets,
        token_ids=token_ids,
        lse=lse,
        coefficients=coefficients,
        temperature=temperature,
        wanted=wanted,
        differentiate=_differentiate,
    )
