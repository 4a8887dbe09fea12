"""The three objectives of CondOT, the losses that they are made of, and the derivatives of these in closed form."""

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


def pinball_gradient(quantiles: Tensor, target: Tensor, levels: Tensor) -> Tensor:
    """d `pinball` / d quantiles [B, M]: the mean of both sides where they meet, as autograd of a maximum has it."""
    return (0.5 - levels + 0.5 * torch.sign(quantiles - target.unsqueeze(1))) / quantiles.numel()


def binomial_nll_gradient(quantiles: Tensor, successes: Tensor, trials: Tensor) -> Tensor:
    """d `binomial_nll` / d quantiles [B, M]; 0 where a quantile is held at its bound."""
    p = quantiles.clamp(PROBABILITY_EPS, 1.0 - PROBABILITY_EPS)
    k, n = successes.unsqueeze(1), trials.unsqueeze(1)
    share = torch.softmax(k * torch.log(p) + (n - k) * torch.log1p(-p), 1)
    inside = (quantiles >= PROBABILITY_EPS) & (quantiles <= 1.0 - PROBABILITY_EPS)
    return torch.where(inside, share * (n * p - k) / (p * (1.0 - p)), 0.0) / len(quantiles)


def dual_map_loss(conjugate_at_map: Tensor, transported: Tensor, levels: Tensor) -> Tensor:
    """loss_g = f(T(x)) - x T(x) [D eq. 2, corrected by C], mean over everything."""
    return (conjugate_at_map - levels * transported).mean()


def dual_conjugate_loss(conjugate_at_target: Tensor, conjugate_at_map: Tensor) -> Tensor:
    """loss_f = f(y) - f(T(x)) [D eq. 3], each averaged over its own entries."""
    return conjugate_at_target.mean() - conjugate_at_map.mean()


def dual_map_gradient(conjugate_slope: Tensor, levels: Tensor) -> Tensor:
    """d `dual_map_loss` / d T(x): f'(T(x)) - x over the number of entries; f' is the conjugate's own map."""
    return (conjugate_slope - levels) / conjugate_slope.numel()


def dual_conjugate_gradient(targets: Tensor, mapped: Tensor) -> Tensor:
    """d `dual_conjugate_loss` / d f at (targets, mapped) side by side; targets [B, t], mapped [B, M]."""
    at_target, at_map = torch.full_like(targets, 1.0 / targets.numel()), torch.full_like(mapped, -1.0 / mapped.numel())
    return torch.cat([at_target, at_map], 1)
