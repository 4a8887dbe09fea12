"""Room dist_ppo in Triton; float64 logits take the reference, float64 layers torch in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.common.launch import INTERPRETED, POINTERS, Variant, check_device, pointers_of
from prmfast.kernels.common.rows import contiguous_columns
from prmfast.kernels.dist_ppo import blocks, reference, tuning
from prmfast.kernels.dist_ppo import triton_kernels as kernels
from prmfast.kernels.dist_ppo.blocks import Spans
from prmfast.kernels.dist_ppo.reference import Rule

__all__ = [
    "dist_ppo",
    "dist_ppo_backward",
    "dist_ppo_with_grad",
    "empty_like",
    "linear_dist_ppo",
    "linear_dist_ppo_backward",
    "variants",
]

_ENTRY_KERNELS = (kernels.settle_kernel, kernels.share_kernel)
"""Those that read the entries of a row alone."""
_BLOCK_KERNELS = (kernels.fold_kernel, kernels.write_kernel)
"""Those that a block of the linear variant passes through, besides."""
_MULTIPLE = 16
"""Of which triton has to know that a number is one, to load several logits at once."""


# --- launches


def _form(kernel: Any, dtype: torch.dtype, columns: int) -> tuple[dict[str, Any], int]:
    """Constants and warps of a kernel on rows of ``columns`` logits."""
    few = columns <= tuning.FEW_COLUMNS and kernel in _BLOCK_KERNELS
    warps = tuning.FEW_WARPS if few else tuning.WARPS
    logits = tuning.LOGITS if columns % _MULTIPLE == 0 else tuning.ODD_LOGITS
    vector = tuning.LOAD_BYTES // dtype.itemsize
    constants = {
        "SLICE": tuning.SLICE,
        "STEPS": logits // vector,
        "THREADS": 32 * warps,
        "VECTOR": vector,
        "BLOCK": 32 * warps * logits,
        "ENTRIES": tuning.ENTRIES,
        "ROUND": INTERPRETED,
    }
    used = {name: constants[name] for name in kernel.arg_names if name in constants}
    return used, tuning.ENTRY_WARPS if kernel in _ENTRY_KERNELS else warps


def _launch(kernel: Any, logits: Tensor, *, slices: int = 1, **arguments: Any) -> None:
    """A program for every row and slice, on the device of the logits; a kernel takes of the arguments what it names."""
    rows, columns = logits.shape
    if rows == 0:
        return
    check_device((logits,))
    constants, warps = _form(kernel, logits.dtype, columns)
    arguments |= {"logits": logits, "stride": logits.stride(0), "columns": columns}
    taken = {name: arguments[name] for name in kernel.arg_names if name not in constants}
    with torch.cuda.device_of(logits):
        kernel[(rows, slices)](**taken, **constants, num_warps=warps)


_TYPES = {
    "stride": "i64",
    "out_stride": "i64",
    "columns": "i32",
    "first": "i32",
    "weight_stride": "i32",
    "begin": "*i64",
    "end": "*i64",
    "token_ids": "*i64",
    "entry_logits": "*fp32",
    "entry_slopes": "*fp32",
    "factors": "*fp32",
    "certains": "*fp32",
    "references": "*fp64",
    "totals": "*fp64",
    "policy_logp": "*fp64",
    "advantage": "*fp64",
    "row_weight": "*fp64",
    "lse": "*fp64",
    "losses": "*fp64",
    "coefficients": "*fp64",
    "clip_low": "fp64",
    "clip_high": "fp64",
    "dual_clip": "fp64",
    "inverse": "fp64",
}
"""Of every argument of a kernel that is neither a constant nor a pointer to logits."""


def _variant(kernel: Any, dtype: torch.dtype, columns: int) -> Variant:
    constants, warps = _form(kernel, dtype, columns)
    kinds = _TYPES | {"logits": POINTERS[dtype], "out": POINTERS[dtype]}
    types = {name: kinds[name] for name in kernel.arg_names if name not in constants}
    aligned = [name for name in pointers_of(types) if name != "end"]  # which is one element behind begin
    if columns % _MULTIPLE == 0:
        aligned += [name for name in ("stride", "out_stride", "columns") if name in types]
    return Variant(kernel, types, constants, num_warps=warps, aligned=tuple(aligned))


def variants() -> Iterator[Variant]:
    """Every kernel that is launched, at the widths where its form changes."""
    few, many = tuning.FEW_COLUMNS, 4 * tuning.FEW_COLUMNS
    yield _variant(kernels.settle_kernel, torch.float32, many)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield _variant(kernels.share_kernel, dtype, many)
        for columns in (many, many - 1):
            yield _variant(kernels.loss_kernel, dtype, columns)
            yield _variant(kernels.loss_and_gradient_kernel, dtype, columns)
        for columns in (few, few - 1, many, many - 1):
            yield _variant(kernels.write_kernel, dtype, columns)
    for columns in (few, few - 1, many, many - 1):
        yield _variant(kernels.fold_kernel, torch.float32, columns)


# --- what the kernels read and write


class _Objective(NamedTuple):
    """The candidates of some rows in float64, and room for what is found of them."""

    begin: Tensor
    end: Tensor
    token_ids: Tensor
    policy_logp: Tensor
    advantage: Tensor
    entry_logits: Tensor
    coefficients: Tensor
    lse: Tensor
    losses: Tensor

    @classmethod
    def of(cls, candidates: Candidates) -> _Objective:
        offsets, token_ids = candidates.offsets.contiguous(), candidates.token_ids.contiguous()
        policy_logp, advantage = (t.double().contiguous() for t in candidates[2:])
        lse = torch.empty(len(offsets) - 1, dtype=torch.float64, device=offsets.device)
        return cls(
            begin=offsets[:-1],
            end=offsets[1:],
            token_ids=token_ids,
            policy_logp=policy_logp,
            advantage=advantage,
            entry_logits=torch.empty(len(token_ids), dtype=torch.float32, device=offsets.device),
            coefficients=torch.empty(len(token_ids), dtype=torch.float64, device=offsets.device),
            lse=lse,
            losses=torch.empty_like(lse),
        )


def _rule(row_weight: Tensor, rule: Rule) -> dict[str, Any]:
    """Weights and numbers as the kernels take them."""
    weight = row_weight.double()
    return {
        "row_weight": weight,
        "weight_stride": weight.stride(0),
        "clip_low": rule.clip_low,
        "clip_high": rule.clip_high,
        "dual_clip": math.inf if rule.dual_clip is None else rule.dual_clip,
        "inverse": 1 / rule.temperature,
    }


def _write(
    logits: Tensor,
    spans: Spans,
    *,
    first: int,
    lse: Tensor,
    coefficients: Tensor,
    temperature: float,
    out: Tensor,
) -> None:
    """d loss / d logits of a block into ``out``, which may be the block."""
    rows = len(logits)
    factors, certains = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    entry_slopes = torch.empty(len(spans.token_ids), dtype=torch.float32, device=logits.device)
    found: dict[str, Any] = {
        "entry_slopes": entry_slopes,
        "factors": factors,
        "certains": certains,
        "inverse": 1 / temperature,
    }
    entries: dict[str, Any] = {"begin": spans.begin, "end": spans.end, "token_ids": spans.token_ids, "first": first}
    _launch(kernels.share_kernel, logits, lse=lse, coefficients=coefficients, **entries, **found)
    slices = triton.cdiv(logits.shape[1], tuning.SLICE)
    _launch(kernels.write_kernel, logits, slices=slices, out=out, out_stride=out.stride(0), **entries, **found)


# --- the room


def empty_like(logits: Tensor) -> Tensor:
    """See the reference."""
    return reference.empty_like(logits)


def dist_ppo(logits: Tensor, candidates: Candidates, row_weight: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference."""
    if logits.dtype == torch.float64:
        return reference.dist_ppo(logits, candidates, row_weight, rule)
    held, objective = contiguous_columns(logits), _Objective.of(candidates)
    _launch(kernels.loss_kernel, held, **objective._asdict(), **_rule(row_weight, rule))
    return objective.losses.sum(), objective.lse, objective.coefficients


def dist_ppo_backward(
    logits: Tensor, offsets: Tensor, token_ids: Tensor, *, lse: Tensor, coefficients: Tensor, temperature: float
) -> Tensor:
    """See the reference."""
    if logits.dtype == torch.float64:
        return reference.dist_ppo_backward(
            logits, offsets, token_ids, lse=lse, coefficients=coefficients, temperature=temperature
        )
    offsets, out = offsets.contiguous(), empty_like(logits)
    _write(
        contiguous_columns(logits),
        Spans(offsets[:-1], offsets[1:], token_ids.contiguous(), None),
        first=0,
        lse=lse.contiguous(),
        coefficients=coefficients.contiguous(),
        temperature=temperature,
        out=out,
    )
    return out


def dist_ppo_with_grad(
    logits: Tensor, candidates: Candidates, row_weight: Tensor, rule: Rule, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """See the reference. ``out`` is written before the host looks at the log-sum-exp: NaN in rows that have none."""
    if logits.dtype == torch.float64:
        return reference.dist_ppo_with_grad(logits, candidates, row_weight, rule, out=out)
    held, objective = contiguous_columns(logits), _Objective.of(candidates)
    _launch(
        kernels.loss_and_gradient_kernel,
        held,
        entry_slopes=torch.empty_like(objective.entry_logits),
        out=out,
        out_stride=out.stride(0),
        **objective._asdict(),
        **_rule(row_weight, rule),
    )
    return objective.losses.sum(), objective.lse


# --- the linear layer


class _Folded:
    """Running sums over the tokens that are no candidates, and the logits of the entries."""

    def __init__(self, candidates: Candidates, rule: Rule) -> None:
        self.objective, self.rule = _Objective.of(candidates), rule
        self.references = torch.full_like(self.objective.lse, torch.finfo(torch.float32).min)
        self.totals = torch.zeros_like(self.references)

    def _arguments(self) -> dict[str, Any]:
        return {"references": self.references, "totals": self.totals} | self.objective._asdict()

    def add(self, block: Tensor, first: int) -> None:
        _launch(kernels.fold_kernel, block, first=first, inverse=1 / self.rule.temperature, **self._arguments())

    def settle(self, row_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        objective = self.objective
        rows = objective.entry_logits.new_empty(len(objective.lse), 1)
        _launch(kernels.settle_kernel, rows, **self._arguments(), **_rule(row_weight, self.rule))
        return objective.losses.sum(), objective.lse, objective.coefficients


def _differentiate(
    block: Tensor, first: int, spans: Spans, *, lse: Tensor, coefficients: Tensor, temperature: float
) -> None:
    _write(block, spans, first=first, lse=lse, coefficients=coefficients, temperature=temperature, out=block)


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
