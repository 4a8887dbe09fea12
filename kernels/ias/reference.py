"""The slow truth of the room: plain torch, computed in float64, never more than a few [B, M] tensors at a time."""

from __future__ import annotations

import torch
from torch import Tensor

TOUCH = 1e-12
"""S(N) >= C - TOUCH counts as reached: where the curve touches the target, the order of a sum must not decide."""

KEY_SHIFT = 12
"""Marginal gains are compared by their first 52 - 12 = 40 mantissa bits (1e-12 relative), for the same reason."""

_SMALLEST = torch.finfo(torch.float64).tiny


def _failure(quantiles: Tensor) -> Tensor:
    return 1 - quantiles.double().clamp(0, 1)  # [B, M]


def ias_budget(quantiles: Tensor, target: Tensor | float, n_max: int) -> Tensor:
    """quantiles [B, M], target a number, [] or [B] float64 -> int32 [B]: 1 + the number of N < n_max that miss it."""
    fail = _failure(quantiles)
    power = fail
    budget = torch.ones(len(fail), dtype=torch.int32, device=fail.device)
    for _ in range(1, n_max):
        missed = 1 - power.mean(1) < target - TOUCH
        if not bool(missed.any()):
            break
        budget += missed
        power = power * fail
    return budget


def ias_curve(quantiles: Tensor, n_max: int) -> Tensor:
    """quantiles [B, M] -> S(N) = mean_m 1 - (1 - p_m)^N as [B, n_max], N = 1..n_max."""
    fail = _failure(quantiles)
    power = fail
    curve = fail.new_empty(len(fail), n_max)
    for n in range(n_max):
        curve[:, n] = 1 - power.mean(1)
        power = power * fail
    return curve.to(torch.float64 if quantiles.dtype == torch.float64 else torch.float32)


def ias_curve_backward(grad: Tensor, quantiles: Tensor) -> Tensor:
    """grad [B, n_max] -> [B, M]: sum_N grad_N N (1 - p)^(N-1) / M where 0 < p < 1, else 0, by Horner's scheme."""
    fail = _failure(quantiles)
    slope = torch.zeros_like(fail)
    for n in range(grad.shape[1], 0, -1):
        slope = slope * fail + n * grad[:, n - 1 : n].double()
    inside = (quantiles > 0) & (quantiles < 1)
    return torch.where(inside, slope / quantiles.shape[1], 0.0).to(quantiles.dtype)


def ias_allocate(quantiles: Tensor, total: int, n_max: int, n_min: int) -> Tensor:
    """quantiles [B, M] -> int32 [B]: every row gets n_min, then the largest marginal gains E[p (1 - p)^N] are served.

    A row's gains fall with N, so the best of the [B, n_max - n_min] table are what a greedy would take one by one; a
    stable sort gives ties to the lower row.
    """
    rows, room = len(quantiles), n_max - n_min
    left = min(total - rows * n_min, rows * room)
    p, fail = quantiles.double().clamp(0, 1), _failure(quantiles)
    term = p * fail**n_min
    gains = p.new_empty(rows, room)
    for n in range(room):
        term = torch.where(term < _SMALLEST, 0.0, term)
        gains[:, n] = term.sum(1)
        term = term * fail
    keys = (gains.view(torch.int64) + (1 << (KEY_SHIFT - 1))) >> KEY_SHIFT  # nonnegative doubles order like their bits
    served = torch.sort(keys.flatten(), descending=True, stable=True).indices[:left]
    more = torch.bincount(served // max(room, 1), minlength=rows)
    return (n_min + more).to(torch.int32)
