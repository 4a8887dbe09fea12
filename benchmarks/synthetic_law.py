"""A law of success probabilities with a known conditional quantile function: the truth of the calibrators' benchmark.

h ~ N(0, I_d); three directions of h decide a 0/1-inflated Beta law of p; k ~ Binomial(n, p); the PRM's score is a
noisy, overconfident view of E[p | h].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import betainc, betaincinv, expit
from scipy.stats import betabinom

from prmfast.calibration import CalibrationData

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Drawn rows and their truth: p = 0 with probability zero, 1 with probability one, else Beta(a, b)."""

    hidden: Array
    score: Array
    zero: Array
    one: Array
    a: Array
    b: Array

    def quantile(self, levels: Array) -> Array:
        """Q(level | h) of p, [N, M]."""
        beta = levels[None, :]
        inside = np.clip((beta - self.zero[:, None]) / (1 - self.zero - self.one)[:, None], 0, 1)
        middle = betaincinv(self.a[:, None], self.b[:, None], inside)
        return np.where(beta < self.zero[:, None], 0.0, np.where(beta > 1 - self.one[:, None], 1.0, middle))

    def share_quantile(self, levels: Array, trials: int) -> Array:
        """Q(level | h) of k / trials, [N, M]."""
        k = np.arange(trials + 1)
        mass = (1 - self.zero - self.one)[:, None] * betabinom.pmf(k, trials, self.a[:, None], self.b[:, None])
        mass[:, 0] += self.zero
        mass[:, -1] += self.one
        below = np.cumsum(mass, 1)
        return (below[:, None, :-1] < levels[None, :, None]).sum(2) / trials

    def success(self, budget: Array) -> Array:
        """P(at least one of N samples is right), N per row: 1 - E[(1 - p)^N]."""
        beta_part = np.exp(_log_beta(self.a, self.b + budget) - _log_beta(self.a, self.b))
        return 1 - self.zero - (1 - self.zero - self.one) * beta_part

    def data(self, trials: int, rng: np.random.Generator) -> CalibrationData:
        """What a calibrator may see: ``trials`` rollouts a row."""
        p = self.draw(rng)
        k = rng.binomial(trials, p)
        return CalibrationData.from_arrays(
            score=torch.tensor(self.score, dtype=torch.float32),
            hidden=torch.tensor(self.hidden, dtype=torch.float32),
            successes=torch.tensor(k),
            trials=torch.full((len(p),), trials),
            question=[f"q{i}" for i in range(len(p))],
        )

    def draw(self, rng: np.random.Generator) -> Array:
        """One p per row."""
        u = rng.random(len(self.score))
        p = rng.beta(self.a, self.b)
        return np.where(u < self.zero, 0.0, np.where(u > 1 - self.one, 1.0, p))


def _log_beta(a: Array, b: Array) -> Array:
    from scipy.special import betaln

    return np.asarray(betaln(a, b))


def draw_rows(count: int, width: int, rng: np.random.Generator, *, direction_seed: int = 7) -> Rows:
    """``count`` rows with hidden states of ``width``; the directions that matter depend on ``direction_seed`` alone."""
    directions = np.random.default_rng(direction_seed).normal(size=(width, 3))
    directions /= np.linalg.norm(directions, axis=0)
    hidden = rng.normal(size=(count, width))
    x, s, t = (hidden @ directions).T
    mean = expit(0.2 + 1.3 * x + 0.5 * np.sin(2 * t))
    concentration = np.exp(0.8 + 0.6 * s)
    weights = np.stack([np.exp(-3.2 - 1.2 * x), np.exp(-1.6 + 1.2 * x), np.exp(0.6 + 0.5 * s)], 1)
    weights /= weights.sum(1, keepdims=True)
    overall = weights[:, 1] + weights[:, 2] * mean
    logit = np.log(overall) - np.log1p(-overall)
    score = expit(1.8 * logit + 0.7 + 0.8 * rng.normal(size=count))
    return Rows(hidden, score, weights[:, 0], weights[:, 1], mean * concentration, (1 - mean) * concentration)


def distribution(rows: Rows, p: Array) -> Array:
    """P(p_row <= p), [N, M]; for checks."""
    inside = betainc(rows.a[:, None], rows.b[:, None], p)
    below = rows.zero[:, None] + (1 - rows.zero - rows.one)[:, None] * inside
    return np.where(p >= 1, 1.0, below)
