"""The three objectives of CondOT and the losses that they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

PROBABILITY_EPS = 1e-4  # binomial likelihood: T is kept this far from 0 and 1


def stratified_levels(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """[rows, count] levels, one uniform draw in each of ``count`` equal parts of [0, 1]."""
    draws = torch.rand(rows, count, generator=generator)
    return (torch.arange(count) + draws) / count


def pinball(quantiles: Tensor, target: Tensor, levels: Tensor) -> Tensor:
    """Mean of ``max(level * e, (level - 1) * e)``, e = target - quantile; quantiles and levels [B, M], target [B]."""
    error = target.unsqueeze(1) - quantiles
    return torch.maximum(levels * error, (levels - 1.0) * error).mean()


def binomial_nll(quantiles: Tensor, successes: Tensor, trials: Tensor) -> Tensor:
    """-log mean_m T_m^k (1 - T_m)^(n - k), mean over rows: k of n where p has the quantile function T (NUMERICS 1).

    quantiles [B, M] at levels spread evenly over [0, 1]; successes and trials [B]. The binomial coefficient is left
    out.
    """
    p = quantiles.clamp(PROBABILITY_EPS, 1.0 - PROBABILITY_EPS)
    k, n = successes.unsqueeze(1), trials.unsqueeze(1)
    likelihood = k * torch.log(p) + (n - k) * torch.log1p(-p)
    return -(torch.logsumexp(likelihood, 1) - torch.log(torch.tensor(float(p.shape[1])))).mean()


def dual_map_loss(conjugate_at_map: Tensor, transported: Tensor, levels: Tensor) -> Tensor:
    """loss_g = f(T(x)) - x T(x) [D eq. 2, corrected by C], mean over everything."""
    return (conjugate_at_map - levels * transported).mean()


def dual_conjugate_loss(conjugate_at_target: Tensor, conjugate_at_map: Tensor) -> Tensor:
    """loss_f = f(y) - f(T(x)) [D eq. 3], each averaged over its own entries."""
    return conjugate_at_target.mean() - conjugate_at_map.mean()
