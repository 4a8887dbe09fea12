"""What is known of a question while its samples come in: its success probability, and whether one is right already.

A prior over the success probability p (M equally likely values: the PRM's quantiles for the empty answer), and for each
finished sample i the PRM's calibrated probability q_i of being right. A calibrated q_i was made for samples that are
right with the base rate pi = E[p], so by Bayes its likelihood is proportional to q_i / pi where the sample is right and
to (1 - q_i) / (1 - pi) where it is wrong. With the right samples drawn independently with probability p:

- evidence of sample i given p: L_i(p) = p q_i / pi + (1 - p) (1 - q_i) / (1 - pi), of which the second term, f_i(p),
  says that it is wrong;
- posterior of p: proportional to prod_i L_i(p);
- nothing right yet: W0 = E[prod_i f_i(p)] / E[prod_i L_i(p)], expectations over the prior;
- success after k more samples: 1 - W0 sum_m u_m (1 - p_m)^k, where u is proportional to prod_i f_i(p_m).

With votes, the hypotheses are "answer g is the right one" for each final answer g seen, and "none of them". Right
samples all say g, wrong ones never do. Wrong ones agree among each other as in the Ewens sampling formula (the Chinese
restaurant process): two of them agree with probability rho (`wrong_agreement`), a mistake seen often is seen again more
often, and the order does not matter. W wrong samples in groups of n_1, ..., n_D then have the probability

    theta^D prod_d (n_d - 1)! Gamma(theta) / Gamma(theta + W),   theta = (1 - rho) / rho,

and a hypothesis has the evidence prod_{i says g} p q_i / pi prod_{others} f_i(p) times this. A sample without a final
answer is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prmfast.ias._check import probability, whole

Array = npt.NDArray[np.float64]

# Probabilities are kept this far from 0 and 1 in the evidence: a PRM that was certain of two things that exclude each
# other then leaves both possible. It shifts nothing else by more than rounding does.
_EDGE = 1e-12
# As in `prmfast.ops.ias_budget`: what counts as having reached the target.
_REACHED = 1e-12


class SuccessPosterior:
    """Success probability of one question and whether one of its samples is right already; float64, exact.

    quantiles: [M] floating, the prior's equally likely values of p, clipped to [0, 1]; at least one, no NaN
    wrong_agreement: probability in (0, 1) that two wrong samples have the same final answer; None: no votes
    """

    def __init__(self, quantiles: Tensor, *, wrong_agreement: float | None = None) -> None:
        if not isinstance(quantiles, Tensor) or not quantiles.is_floating_point():
            raise TypeError(f"quantiles must be a floating torch.Tensor, got {type(quantiles).__name__}")
        if quantiles.ndim != 1 or len(quantiles) == 0:
            raise ValueError(f"quantiles must have shape [M] with M >= 1, got {tuple(quantiles.shape)}")
        p = np.sort(quantiles.detach().cpu().double().clamp(0, 1).numpy())
        if np.isnan(p[-1]):
            raise ValueError("quantiles must not hold NaN")
        self._p: Array = p
        inner = np.clip(p, _EDGE, 1.0 - _EDGE)
        base = float(inner.mean())
        self._right: Array = inner / base
        self._wrong: Array = (1.0 - inner) / (1.0 - base)
        self._log_right: Array = np.log(self._right)
        self._log_wrong: Array = np.log(self._wrong)
        self._fail_powers: list[Array] = [1.0 - p]  # (1 - p)^(2^j)
        self._any: Array = np.zeros_like(p)  # sum_i log L_i, without votes
        self._doubt = 0.0  # sum_i log(1 - q_i)
        self._theta: float | None = None
        if wrong_agreement is not None:
            rho = probability("wrong_agreement", wrong_agreement)
            self._theta = (1.0 - rho) / rho
        self._count: dict[Hashable, int] = {}
        self._odds: dict[Hashable, float] = {}  # sum over the answer's samples of log(q_i / (1 - q_i))
        self._rising = [0.0]  # log of theta (theta + 1) ... (theta + n - 1)
        self._seen = 0
        self._answers: dict[Hashable, float] = {}
        self._solve()

    def observe(self, probability_right: float, answer: Hashable | None = None) -> None:
        """One more finished sample: the PRM's calibrated probability in [0, 1], and its final answer with votes."""
        q = probability("probability_right", probability_right, closed=True)
        voting = self._theta is not None
        q = min(max(0.0 if voting and answer is None else q, _EDGE), 1.0 - _EDGE)
        sure, doubt = math.log(q), math.log1p(-q)
        self._seen += 1
        self._doubt += doubt
        if self._theta is None:
            self._any = self._any + np.log(self._right * q + self._wrong * (1.0 - q))
        elif answer is not None:
            self._rising.append(self._rising[-1] + math.log(self._theta + len(self._rising) - 1))
            self._count[answer] = self._count.get(answer, 0) + 1
            self._odds[answer] = self._odds.get(answer, 0.0) + sure - doubt
        self._solve()

    @property
    def solved(self) -> float:
        """Probability that one of the samples is right."""
        return 1.0 - self._open

    @property
    def mean(self) -> float:
        """Posterior mean of p."""
        return float(self._weights @ self._p)

    @property
    def answers(self) -> dict[Hashable, float]:
        """Probability of being the right one, by final answer; empty without votes."""
        return dict(self._answers)

    def expected_success(self, more: int) -> float:
        """Probability that one is right once ``more`` >= 0 further samples are drawn."""
        weights = self._unsolved
        for j in reversed(range(more.bit_length())):
            if more >> j & 1:
                weights = weights * self._fail_power(j)
        return 1.0 - self._open * float(weights.sum())

    def samples_needed(self, target: float, limit: int) -> int:
        """The smallest k >= 0 with ``expected_success(k) >= target``, ``limit`` if there is none below it."""
        wanted = target - _REACHED
        if limit < 1 or 1.0 - self._open >= wanted:
            return 0
        short, weights = 0, self._unsolved  # the largest number that does not suffice, bit by bit
        for j in reversed(range((limit - 1).bit_length())):
            trial = weights * self._fail_power(j)
            if 1.0 - self._open * float(trial.sum()) < wanted:
                short, weights = short + (1 << j), trial
        return min(short + 1, limit)

    def resampled(self, levels: int, *, solved_as: float) -> Tensor:
        """[levels] float64, ascending and equally weighted: the posterior as the batch ops of `prmfast.ops` take it.

        Where one sample is right already, p is given as ``solved_as``. 1: ``ias_curve`` and ``ias_budget`` then see
        1 - W0 sum_m u_m (1 - p_m)^k for every k >= 1. 0: for ``ias_allocate`` a further sample gains nothing there.
        Values are the weighted atoms' quantiles at (j + 1/2) / levels, so no probability moves by more than 1 / levels.
        """
        whole("levels", levels, low=1)
        if solved_as not in (0.0, 1.0):
            raise ValueError(f"solved_as must be 0 or 1, got {solved_as}")
        first = solved_as == 0.0
        solved, unsolved = np.array([1.0 - self._open]), self._open * self._unsolved
        values = np.concatenate([[0.0], self._p] if first else [self._p, [1.0]])
        weights = np.concatenate([solved, unsolved] if first else [unsolved, solved])
        at = (np.arange(levels) + 0.5) / levels
        place = np.searchsorted(weights.cumsum(), at).clip(max=len(values) - 1)
        return torch.from_numpy(values[place])

    def _fail_power(self, j: int) -> Array:
        while len(self._fail_powers) <= j:
            self._fail_powers.append(self._fail_powers[-1] ** 2)
        return self._fail_powers[j]

    def _solve(self) -> None:
        """W0, u [M] and the posterior of p [M] from the sums of logarithms."""
        nothing = self._seen * self._log_wrong + self._doubt
        if self._theta is None:
            self._unsolved, none = _normalised(nothing)
            self._weights, total = _normalised(self._any)
        else:
            rows, groups = self._hypotheses(nothing)
            self._unsolved, none = _normalised(rows[-1])
            shares, total = _normalised(rows)
            self._weights = shares.sum(0)
            self._answers = dict(zip(groups, shares[:-1].sum(1).tolist(), strict=True))
        self._open = min(1.0, math.exp(none - total))

    def _hypotheses(self, nothing: Array) -> tuple[Array, list[Hashable]]:
        """Log-evidence [D + 1, M] of "this answer is right" for D answers; the last row is "none of them"."""
        assert self._theta is not None
        groups = list(self._count)
        count = np.array([*self._count.values(), 0])
        together = [math.lgamma(n) for n in self._count.values()]
        new, all_together, voted = math.log(self._theta), sum(together), sum(self._count.values())
        agreement = [
            (len(groups) - 1) * new + all_together - own - self._rising[voted - n]
            for n, own in zip(self._count.values(), together, strict=True)
        ]
        agreement.append(len(groups) * new + all_together - self._rising[voted])
        odds = np.array([*self._odds.values(), 0.0]) + agreement
        return nothing + np.outer(count, self._log_right - self._log_wrong) + odds[:, None], groups


def _normalised(log_weights: Array) -> tuple[Array, float]:
    """Weights that sum to one, and the logarithm of what their sum was."""
    most = float(log_weights.max())
    weights = np.exp(log_weights - most)
    total = float(weights.sum())
    return np.asarray(weights / total), most + math.log(total)
