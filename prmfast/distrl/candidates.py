"""Candidate sets as CSR rows: from tables, restricted, and as the released program of [V] restricts them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prmfast.distrl._ragged import Layout, layout
from prmfast.kernels.candidate_td.reference import TOUCH
from prmfast.ops import Candidates

_NO_BOUND = 1e-5
"""A smallest probability, or a distance of top_p from 1, up to here is no bound in the released program."""


def entry_rows(candidates: Candidates) -> Tensor:
    """The row of every entry, int64 [nnz]."""
    counts = candidates.offsets.diff()
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


def select(candidates: Candidates, keep: Tensor) -> Candidates:
    """The entries where ``keep`` (bool [nnz]) holds, in as many rows as before."""
    counts = candidates.offsets.new_zeros(len(candidates.offsets) - 1)
    counts = counts.index_add(0, entry_rows(candidates), keep.long())
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Candidates(offsets, *(t[keep] for t in candidates[1:]))


def select_rows(candidates: Candidates, rows: Tensor) -> Candidates:
    """The rows of these numbers (int64 [n], increasing) as candidates of n rows."""
    wanted = torch.zeros(len(candidates.offsets) - 1, dtype=torch.bool, device=rows.device)
    wanted[rows] = True
    keep = wanted[entry_rows(candidates)]
    counts = candidates.offsets.diff()[rows]
    return Candidates(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), *(t[keep] for t in candidates[1:]))


def slice_rows(candidates: Candidates, start: int, stop: int) -> Candidates:
    """Rows start .. stop - 1."""
    offsets = candidates.offsets[start : stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return Candidates(offsets - first, *(t[first:last] for t in candidates[1:]))


def concat_rows(parts: Sequence[Candidates]) -> Candidates:
    """The rows of all parts, of which there is at least one."""
    counts = torch.cat([part.offsets.diff() for part in parts])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Candidates(offsets, *(torch.cat([part[i] for part in parts]) for i in (1, 2, 3)))


def keep_rows(candidates: Candidates, where: Layout) -> Candidates:
    """The same rows, those at padding emptied."""
    if len(where.place) == where.rows:
        return candidates
    valid = torch.zeros(where.rows, dtype=torch.bool, device=where.place.device)
    valid[where.place] = True
    return select(candidates, valid[entry_rows(candidates)])


def from_table(token_ids: Tensor, policy_logp: Tensor, advantage: Tensor, *, mask: Tensor) -> Candidates:
    """Candidates of the entries of a table [.., K] (the k likeliest tokens, say) where ``mask`` [.., K] holds.

    Args:
        token_ids: int64 [.., K], no id twice in a row among those that the mask takes.
        policy_logp: [.., K] floating.
        advantage: [.., K] floating.
        mask: bool [.., K].

    Returns:
        Candidates of as many rows as the table has, by increasing token id.

    Raises:
        ValueError: shapes that differ; an id that stands twice in a row.
    """
    for name, value in (("policy_logp", policy_logp), ("advantage", advantage), ("mask", mask)):
        if value.shape != token_ids.shape:
            raise ValueError(
                f"from_table: {name} must have shape {tuple(token_ids.shape)} like token_ids, got {tuple(value.shape)}"
            )
    width = token_ids.shape[-1]
    tables = [t.reshape(-1, width) for t in (token_ids, policy_logp, advantage)]
    taken = mask.reshape(-1, width)
    last = torch.iinfo(torch.int64).max
    order = torch.where(taken, tables[0], last).argsort(dim=1, stable=True)
    ids, logp, values = (t.gather(1, order) for t in tables)
    taken = taken.gather(1, order)
    twice = (ids[:, 1:] == ids[:, :-1]) & taken[:, 1:]
    if bool(twice.any()):
        row = int(twice.any(1).nonzero()[0])
        raise ValueError(f"from_table: token_ids must not hold an id twice in a row, got one in row {row}")
    offsets = torch.cat([ids.new_zeros(1), taken.sum(1).cumsum(0)])
    return Candidates(offsets, ids[taken], logp[taken], values[taken])


def sampled_entries(candidates: Candidates, sampled: Tensor) -> Tensor:
    """Which entries are their row's sampled token, bool [nnz]; ``sampled`` int64 [rows]."""
    return candidates.token_ids == sampled.reshape(-1)[entry_rows(candidates)]


def sampled_td(candidates: Candidates, sampled: Tensor) -> Tensor:
    """A_TD of the sampled tokens, in the shape of ``sampled``, from `candidate_td(..., sampled=sampled)`.

    Args:
        candidates: one row per sampled token.
        sampled: int64, any shape with as many elements as candidates have rows.

    Returns:
        In the shape of ``sampled``; 0 in a row without candidates.

    Raises:
        ValueError: rows that do not fit; a row that has candidates but not its sampled token.
    """
    return _of_sampled("sampled_td", candidates, sampled, candidates.advantage)


def sampled_logp(candidates: Candidates, sampled: Tensor) -> Tensor:
    """log pi_old of the sampled tokens; as `sampled_td`."""
    return _of_sampled("sampled_logp", candidates, sampled, candidates.policy_logp)


def _of_sampled(op: str, candidates: Candidates, sampled: Tensor, values: Tensor) -> Tensor:
    rows = len(candidates.offsets) - 1
    if sampled.numel() != rows:
        raise ValueError(f"{op}: sampled must have {rows} elements, one per row of candidates, got {sampled.numel()}")
    mine = sampled_entries(candidates, sampled)
    at = entry_rows(candidates)[mine]
    found = torch.zeros(rows, dtype=torch.bool, device=at.device)
    found[at] = True
    missing = ~found & (candidates.offsets.diff() > 0)
    if bool(missing.any()):
        row = int(missing.nonzero()[0])
        raise ValueError(
            f"{op}: candidates must hold the sampled token of every row (candidate_td(..., sampled=)), "
            f"got none of id {int(sampled.reshape(-1)[row])} in row {row}"
        )
    return values.new_zeros(rows).index_copy(0, at, values[mine]).reshape(sampled.shape)


def likely(candidates: Candidates, *, p_min: float = 0.1) -> Candidates:
    """The entries with pi_old >= ``p_min``: drops sampled tokens that were forced in, for the paper's Dist-PPO set.

    p >= p_min (1 - 1e-5) counts, as in `candidate_td`.
    """
    if not 0 < p_min <= 1:
        raise ValueError(f"likely: p_min must be > 0 and <= 1, got {p_min}")
    return select(candidates, candidates.policy_logp >= math.log(p_min) - TOUCH)


def released_candidates(
    candidates: Candidates,
    sampled: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    p_min: float = 0.1,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Candidates:
    """The set of the released program: p > p_min strictly or sampled, nothing at the last token of a sequence.

    Args:
        candidates: of `candidate_td(..., sampled=sampled)`, one row per token of ``sampled``.
        sampled: int64 [B, T], or [N] with ``offsets``.
        mask: bool [B, T]; None: all valid.
        offsets: int64 [S + 1] of packed sequences.
        p_min: in [0, 1]; up to 1e-5 there is no such bound.
        top_k: at most so many of a row: the sampled token and the likeliest others; None: no such bound.
        top_p: in (0, 1]: of those, the likeliest one, and the following as long as they hold at most top_p together.

    Returns:
        Candidates of as many rows. The program gives the last token no TD either: `without_last_token`.

    Raises:
        TypeError, ValueError: as `prmfast.distrl.gae`.
    """
    op = "released_candidates"
    where = layout(op, "sampled", sampled, mask, offsets)
    if not 0 <= p_min <= 1:
        raise ValueError(f"{op}: p_min must be >= 0 and <= 1, got {p_min}")
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be > 0 and <= 1, got {top_p}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{op}: top_k must be >= 1 or None, got {top_k}")
    if len(candidates.offsets) != where.rows + 1:
        raise ValueError(f"{op}: candidates must have {where.rows} rows, got {len(candidates.offsets) - 1}")
    inner = torch.zeros(where.rows, dtype=torch.bool, device=where.place.device)
    inner[where.place] = True
    inner[where.place[where.ends]] = False
    candidates = select(candidates, inner[entry_rows(candidates)])
    if top_k is not None:
        first = torch.where(sampled_entries(candidates, sampled), math.inf, candidates.policy_logp.double())
        candidates = select(candidates, _places(candidates, first) < top_k)
    probability = candidates.policy_logp.double().exp()
    keep = probability > (p_min if p_min > _NO_BOUND else -1.0)
    if 1 - top_p > _NO_BOUND:
        keep &= _mass_up_to(candidates, probability) <= top_p
    return select(candidates, keep | sampled_entries(candidates, sampled))


def _descending(candidates: Candidates, rank_by: Tensor) -> Tensor:
    """The entries row by row, those with the largest ``rank_by`` [nnz] first, int64 [nnz]."""
    order = rank_by.argsort(descending=True, stable=True)
    return order[entry_rows(candidates)[order].argsort(stable=True)]


def _places(candidates: Candidates, rank_by: Tensor) -> Tensor:
    """The place of every entry in its row, 0 for the largest ``rank_by``, int64 [nnz]."""
    order, rows = _descending(candidates, rank_by), entry_rows(candidates)
    counted = torch.arange(len(rows), device=rows.device) - candidates.offsets[:-1][rows[order]]
    return torch.empty_like(rows).index_copy(0, order, counted)


def _mass_up_to(candidates: Candidates, probability: Tensor) -> Tensor:
    """Probability of an entry and of the likelier ones of its row, 0 for the likeliest itself, float64 [nnz]."""
    order, count = _descending(candidates, probability), candidates.offsets.diff()
    where = Layout(tuple(order.shape), order, entry_rows(candidates), count)
    mass = where.unpack(where.prefix_sums(probability[order]))
    return torch.where(_places(candidates, probability) == 0, 0.0, mass)


def without_last_token(td: Tensor, *, mask: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """td [B, T] or packed [N] with 0 at the last valid token of every sequence, and at padding (released program)."""
    where = layout("without_last_token", "td", td, mask, offsets)
    packed = where.pack(td).clone()
    packed[where.ends] = 0.0
    return where.unpack(packed)
