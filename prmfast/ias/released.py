"""The budget rules as the released program of [U] (arXiv 2506.09338) computes them, quirks included.

With rows of quantiles [n, M] the budgets read the lower-bound column ``lb_idx``; ranking and the final pick use the
median, which is the caller's business. In beam search ``max_leaves`` (K_max) is ``n_generations // beam_width`` and
``max_samples`` (M_max) is ``beam_width``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from prmfast.ias._check import positive_number, probability, whole

Rows = Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]] | Sequence[Tensor] | Tensor


def compute_n_ias(p: float, denom: float = 1.0, q: float = 0.99, eps: float = 1e-4) -> int:
    """Equals ``ceil(log(1 - q) / log(1 - p) / denom)``, p clamped to [eps, 1 - eps]; NaN counts as eps, as released.

    Args:
        p: success probability of one sample; any number.
        denom: divides the result before it is rounded up, > 0.
        q: wanted success probability, in (0, 1).
        eps: the clamp, in (0, 1/2): no result exceeds ``ceil(log(1 - q) / log(1 - eps) / denom)``.
    """
    probability("q", q)
    positive_number("denom", denom)
    if not 0 < eps < 0.5:
        raise ValueError(f"eps must lie in (0, 0.5), got {eps}")
    number = float(p)
    clamped = eps if math.isnan(number) else min(max(number, eps), 1.0 - eps)
    return math.ceil(math.log(1 - q) / math.log(1 - clamped) / denom)


def determine_m(
    scores: Rows,
    max_samples: int,
    max_leaves: int,
    *,
    interleave: bool = True,
    lb_idx: int | None = None,
    q: float = 0.99,
    eps: float = 1e-4,
) -> list[int]:
    """IAS-of-M: samples per beam, ``min(compute_n_ias(min(row), max_leaves), max_samples)`` for each row of scores.

    Args:
        scores: one row per question, of n scores each, or [n, M] quantiles with ``lb_idx``.
        max_samples: M_max. max_leaves: K_max, the number of beams that share the work.
        interleave: False gives ``max_samples`` for every row (the released default, which adapts nothing).
        lb_idx: column of the lower bound when rows hold quantiles.
        q: wanted success probability. eps: see `compute_n_ias`.

    Returns:
        One int per row. (The released program repeats it for every score of the row.)
    """
    whole("max_samples", max_samples, low=1)
    whole("max_leaves", max_leaves, low=1)
    rows = _lower_bounds(scores, lb_idx)
    if not interleave:
        return [max_samples] * len(rows)
    return [min(compute_n_ias(_least(row), max_leaves, q, eps), max_samples) for row in rows]


def determine_k(
    scores: Rows,
    max_samples: int,
    max_leaves: int,
    *,
    interleave: bool = True,
    lb_idx: int | None = None,
    q: float = 0.99,
    eps: float = 1e-4,
) -> list[int]:
    """IAS-of-K: beams to keep, the smallest k with ``k == max_leaves`` or ``k * max_samples >= compute_n_ias(s_k)``.

    s_k is the k-th largest lower-bound score of the row; a row that has fewer than ``max_leaves`` scores keeps at
    most all of them. Arguments as in `determine_m`; one int per row.
    """
    whole("max_samples", max_samples, low=1)
    whole("max_leaves", max_leaves, low=1)
    rows = _lower_bounds(scores, lb_idx)
    if not interleave:
        return [max_leaves] * len(rows)
    return [_beams(row, max_samples, max_leaves, q, eps) for row in rows]


def _beams(row: list[float], max_samples: int, max_leaves: int, q: float, eps: float) -> int:
    most = min(max_leaves, len(row))
    ranked = sorted(row, reverse=True)
    enough = (k for k in range(1, most) if k * max_samples >= compute_n_ias(ranked[k - 1], 1.0, q, eps))
    return next(enough, most)


def _least(row: list[float]) -> float:
    least = row[0]
    for value in row[1:]:  # min() of the released program: a NaN in front stays, one behind is skipped
        least = value if value < least else least
    return least


def _lower_bounds(scores: Rows, lb_idx: int | None) -> list[list[float]]:
    rows: list[list[float]] = []
    for i, row in enumerate(scores):
        values: list[Any] = row.tolist() if isinstance(row, Tensor) else list(row)
        if not values:
            raise ValueError(f"scores must have at least one score a row, got none in row {i}")
        wide = hasattr(values[0], "__len__")
        if wide != (lb_idx is not None):
            rule = "needs lb_idx, the lower bound's column" if wide else "has one number a score: leave lb_idx out"
            raise ValueError(f"scores row {i} {rule}, got lb_idx={lb_idx}")
        rows.append([float(value[lb_idx]) if wide else float(value) for value in values])
    return rows
