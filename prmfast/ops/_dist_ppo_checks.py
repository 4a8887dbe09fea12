"""What dist_ppo's ops demand of candidates, weights, layers and buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.ops._contract import Check


def _check_layout(check: Check, candidates: Candidates, like: Tensor) -> None:
    """Kinds, dtypes, shapes and devices of the candidates of ``like``'s rows."""
    names = [f"candidates.{name}" for name in Candidates._fields]
    whole = (torch.int64,)
    check.tensor(names[0], candidates.offsets, ndim=1, dtypes=whole)
    check.shape(names[0], candidates.offsets, (like.shape[0] + 1,))
    check.tensor(names[1], candidates.token_ids, ndim=1, dtypes=whole)
    for name, value in zip(names[2:], candidates[2:], strict=True):
        check.tensor(name, value, ndim=1)
        check.shape(name, value, (candidates.token_ids.shape[0],))
    check.same_device("the logits", like, **dict(zip(names, candidates, strict=True)))


def _first(bad: Tensor) -> int | None:
    """Where the first True stands."""
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def _check_values(check: Check, candidates: Candidates, vocabulary: int) -> None:
    """What the layout promises: a backend that trusts it writes within its rows."""
    offsets, ids, logp, advantage = candidates
    at = _first(offsets.diff() < 0)
    if at is not None:
        pair = offsets[at : at + 2].tolist()
        raise ValueError(f"{check.op}: candidates.offsets must not decrease, got {pair[1]} after {pair[0]} in row {at}")
    ends = int(offsets[0]), int(offsets[-1])
    if ends != (0, len(ids)):
        raise ValueError(
            f"{check.op}: candidates.offsets must run from 0 to nnz = {len(ids)}, got {ends[0]} to {ends[1]}"
        )
    at = _first((ids < 0) | (ids >= vocabulary))
    if at is not None:
        raise ValueError(
            f"{check.op}: candidates.token_ids must be >= 0 and < V = {vocabulary}, got {int(ids[at])} in entry {at}"
        )
    unordered = ids.diff() <= 0
    starts = offsets[(offsets > 0) & (offsets < len(ids))]
    unordered[starts - 1] = False  # a row may begin below where the one before ended
    at = _first(unordered)
    if at is not None:
        pair = ids[at : at + 2].tolist()
        raise ValueError(
            f"{check.op}: candidates.token_ids must increase within a row, got {pair[1]} after {pair[0]} in entry "
            f"{at + 1}"
        )
    at = _first(~(logp < math.inf))
    if at is not None:
        raise ValueError(
            f"{check.op}: candidates.policy_logp must be finite or -inf, got {logp[at].item()} in entry {at}"
        )
    at = _first(advantage.isnan() | (advantage.isinf() & ~logp.isneginf()))
    if at is not None:
        raise ValueError(
            f"{check.op}: candidates.advantage must be finite where policy_logp is, "
            f"got {advantage[at].item()} in entry {at}"
        )


def _check_row_weight(check: Check, row_weight: Tensor | None, like: Tensor) -> None:
    if row_weight is None:
        return
    check.tensor("row_weight", row_weight, ndim=1)
    check.shape("row_weight", row_weight, (like.shape[0],))
    check.same_device("the logits", like, row_weight=row_weight)


def check_all(
    check: Check, candidates: Candidates, row_weight: Tensor | None, *, like: Tensor, vocabulary: int
) -> Tensor:
    """Everything about the candidates and the weights; the weights [T], 1/T each if none are given."""
    if vocabulary == 0:
        raise ValueError(f"{check.op}: the vocabulary must have at least one token, got V = 0")
    _check_layout(check, candidates, like)
    _check_values(check, candidates, vocabulary)
    _check_row_weight(check, row_weight, like)
    rows = like.shape[0]
    if row_weight is None:
        return torch.full((1,), 1 / max(rows, 1), dtype=torch.float64, device=like.device).expand(rows)
    check.no_nan("row_weight", row_weight)
    return row_weight


def check_rows(check: Check, lse: Tensor) -> None:
    row = _first(~lse.isfinite())
    if row is not None:
        raise ValueError(
            f"{check.op}: the logits of a row with candidates must not be NaN, +inf or all -inf, got such a row: "
            f"row {row}"
        )


def check_layer(check: Check, hidden: Tensor, weight: Tensor) -> None:
    check.tensor("hidden", hidden, ndim=2)
    check.tensor("weight", weight, ndim=2, dtypes=(hidden.dtype,))
    check.same_device("hidden", hidden, weight=weight)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{check.op}: weight must have width {hidden.shape[1]} like hidden, got {weight.shape[1]}")


def check_out(check: Check, name: str, out: Tensor, logits: Tensor) -> None:
    """Rows of their own, and either the logits' own memory, element for element, or none of it."""
    check.tensor(name, out, ndim=2, dtypes=(logits.dtype,))
    check.shape(name, out, tuple(logits.shape))
    check.same_device("logits", logits, **{name: out})
    (rows, columns), step = out.shape, out.stride(0)
    if (columns > 1 and out.stride(1) != 1) or (rows > 1 and step < columns):
        raise ValueError(
            f"{check.op}: {name} must have contiguous columns in rows of their own, got strides {out.stride()}"
        )
    same = out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride()
    if same or out.numel() == 0 or out.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
        return
    begin, other = out.storage_offset(), logits.storage_offset()
    end, other_end = (
        t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (out, logits)
    )
    apart = begin > other_end or other > end
    side_by_side = out.stride() == logits.stride() and columns <= (begin - other) % step <= step - columns
    if not apart and not side_by_side:
        raise ValueError(
            f"{check.op}: {name} must be the logits themselves or share no element with them, got a partial overlap"
        )
