"""Room candidate_td in Triton. float64 takes the reference; the linear variant is in `triton_linear`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prmfast.kernels.candidate_td import reference, triton_kernels, tuning
from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.candidate_td.triton_forms import Form, forced_ids, raise_fault, scale
from prmfast.kernels.candidate_td.triton_linear import linear_candidate_td
from prmfast.kernels.candidate_td.triton_linear import variants as linear_variants
from prmfast.kernels.common.launch import INTERPRETED, POINTERS, Variant, check_device
from prmfast.kernels.common.rows import contiguous_columns

__all__ = ["candidate_td", "linear_candidate_td", "token_logprob", "token_logprob_backward", "variants"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SLICES = {"SLICES": tuning.SLICES}
_CHUNK = {"CHUNK": tuning.CHUNK, "CHUNKS": tuning.CHUNKS}
_COUNT = Form(triton_kernels.count_candidates_kernel, _SLICES | _CHUNK, tuning.CHUNK_WARPS)
_WRITE = Form(triton_kernels.write_candidates_kernel, _CHUNK, tuning.CHUNK_WARPS)
_GATHER = Form(triton_kernels.gather_logprob_kernel, _SLICES, tuning.ROW_WARPS)
_GRADIENT = Form(triton_kernels.logprob_gradient_kernel, {"BLOCK": tuning.GRADIENT_BLOCK}, tuning.GRADIENT_WARPS)


def _statistics_form(with_chunks: bool) -> Form:
    constants = {"SLICE": tuning.SLICE, "CHUNK": tuning.CHUNK, "WITH_CHUNKS": with_chunks}
    return Form(triton_kernels.slice_statistics_kernel, constants, tuning.SLICE_WARPS)


def _slices(columns: int) -> int:
    return -(-columns // tuning.SLICE)


def _chunks(columns: int) -> int:
    return -(-columns // tuning.CHUNK)


def _statistics(logits: Tensor, temperature: float, *, with_chunks: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, V] -> peaks and totals of slices, float32 [T, slices], and the largest logits of chunks."""
    rows, columns = logits.shape
    slices, chunks = _slices(columns), _chunks(columns)
    peaks, totals = (logits.new_empty(rows, slices, dtype=torch.float32) for _ in range(2))
    chunk_peaks = logits.new_empty(rows, chunks, dtype=torch.float32) if with_chunks else peaks
    shape = logits.stride(0), columns, slices, chunks
    outputs = peaks, totals, chunk_peaks
    _statistics_form(with_chunks).launch(rows * slices, logits, *shape, scale(temperature), *outputs)
    return outputs


def candidate_td(
    policy_logits: Tensor,
    reward_logits: Tensor,
    *,
    p_min: float,
    beta: float,
    sampled: Tensor | None,
    policy_temperature: float,
    reward_temperature: float,
) -> Candidates:
    """See the reference. One synchronisation: the number of candidates has to be known to allocate them."""
    if reference.output_dtype(policy_logits, reward_logits) == torch.float64:
        return reference.candidate_td(
            policy_logits,
            reward_logits,
            p_min=p_min,
            beta=beta,
            sampled=sampled,
            policy_temperature=policy_temperature,
            reward_temperature=reward_temperature,
        )
    check_device((policy_logits, reward_logits))
    policy, reward = contiguous_columns(policy_logits), contiguous_columns(reward_logits)
    rows, columns = policy.shape
    chunks = _chunks(columns)
    ids = forced_ids(sampled, policy)
    policy_peaks, policy_totals, chunk_peaks = _statistics(policy, policy_temperature, with_chunks=True)
    reward_peaks, reward_totals, _ = _statistics(reward, reward_temperature, with_chunks=False)
    norms = policy.new_empty(rows, 5, dtype=torch.float64)
    tally = torch.zeros(2, rows + 1, dtype=torch.int64, device=policy.device)
    _COUNT.launch(
        rows,
        policy,
        policy.stride(0),
        columns,
        _slices(columns),
        chunks,
        policy_peaks,
        policy_totals,
        reward_peaks,
        reward_totals,
        chunk_peaks,
        ids,
        scale(policy_temperature),
        scale(reward_temperature),
        1 / policy_temperature,
        math.log(p_min) - reference.TOUCH,
        norms,
        tally,
    )
    tally = tally.cumsum(1)
    entries, faults = tally[:, -1].tolist()
    if faults:
        raise_fault("candidate_td", policy_logits=norms[:, 1], reward_logits=norms[:, 3])
    offsets, token_ids = tally[0], tally.new_empty(entries)
    policy_logp, advantage = (norms.new_empty(entries, dtype=torch.float32) for _ in range(2))
    _WRITE.launch(
        rows,
        policy,
        policy.stride(0),
        reward,
        reward.stride(0),
        columns,
        chunks,
        chunk_peaks,
        ids,
        norms,
        offsets,
        1 / policy_temperature,
        1 / reward_temperature,
        beta,
        token_ids,
        policy_logp,
        advantage,
    )
    return Candidates(offsets, token_ids, policy_logp, advantage)


def token_logprob(logits: Tensor, ids: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """See the reference."""
    if logits.dtype == torch.float64:
        return reference.token_logprob(logits, ids, temperature=temperature)
    check_device((logits,))
    held = contiguous_columns(logits)
    rows, columns = held.shape
    peaks, totals, _ = _statistics(held, temperature, with_chunks=False)
    logp, norm = held.new_empty(rows, dtype=torch.float32), held.new_empty(rows, 2, dtype=torch.float64)
    row = held.stride(0), _slices(columns)
    options = ids.contiguous(), scale(temperature), 1 / temperature
    _GATHER.launch(rows, held, *row, peaks, totals, *options, logp, norm)
    if not bool(norm[:, 1].isfinite().all()):
        raise_fault("token_logprob", logits=norm[:, 1])
    return logp, norm


def token_logprob_backward(grad: Tensor, logits: Tensor, ids: Tensor, norm: Tensor, *, temperature: float) -> Tensor:
    """See the reference."""
    if logits.dtype == torch.float64:
        return reference.token_logprob_backward(grad, logits, ids, norm, temperature=temperature)
    check_device((logits,))
    held = contiguous_columns(logits)
    rows, columns = held.shape
    # the interpreter truncates to bfloat16 where a GPU rounds
    stored = torch.float32 if INTERPRETED and held.dtype == torch.bfloat16 else held.dtype
    out = held.new_empty(rows, columns, dtype=stored)
    blocks = -(-columns // tuning.GRADIENT_BLOCK)
    row = held.stride(0), columns, blocks
    options = ids.contiguous(), norm.contiguous(), scale(temperature), 1 / temperature
    _GRADIENT.launch(rows * blocks, grad.float().contiguous(), held, *row, *options, out)
    return out.to(held.dtype)


def variants() -> Iterator[Variant]:
    """Everything that this backend launches."""
    names = tuple(POINTERS[dtype] for dtype in DTYPES)
    floats = dict.fromkeys(("peaks", "totals", "chunk_peaks", "logp", "policy_logp", "advantage"), "*fp32")
    floats |= dict.fromkeys(("policy_peaks", "policy_totals", "reward_peaks", "reward_totals", "grad"), "*fp32")
    numbers = dict.fromkeys(("scale", "policy_scale", "reward_scale"), "fp32")
    doubles = dict.fromkeys(("policy_inverse", "reward_inverse", "log_p_min", "beta"), "fp64")
    whole = dict.fromkeys(("columns", "slices", "chunks", "blocks"), "i32")
    strides = dict.fromkeys(("stride", "policy_stride", "reward_stride"), "i64")
    ids = dict.fromkeys(("sampled", "ids", "tally", "offsets", "token_ids"), "*i64")
    known = floats | numbers | doubles | whole | strides | ids | {"norm": "*fp64", "norms": "*fp64"}
    for name in names:
        for with_chunks in (True, False):
            yield _statistics_form(with_chunks).variant(known | {"logits": name})
        yield _COUNT.variant(known | {"policy": name})
        yield _GATHER.variant(known | {"logits": name, "inverse": "fp64"})
        yield _GRADIENT.variant(known | {"logits": name, "out": name, "inverse": "fp32"})
        for other in names:
            yield _WRITE.variant(known | {"policy": name, "reward": other})
    yield from linear_variants()
