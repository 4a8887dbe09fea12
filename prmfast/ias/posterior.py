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
        self._fail: Array = 1.0 - p
        inner = np.clip(p, _EDGE, 1.0 - _EDGE)
        base = float(inner.mean())
        self._right: Array = np.log(inner / base)
        self._wrong: Array = np.log((1.0 - inner) / (1.0 - base))
        self._any: Array = np.zeros_like(p)  # sum_i log L_i, without votes
        self._doubt = 0.0  # sum_i log(1 - q_i)
        self._theta: float | None = None
        if wrong_agreement is not None:
            rho = probability("wrong_agreement", wrong_agreement)
            self._theta = (1.0 - rho) / rho
        self._count: dict[Hashable, int] = {}
        self._odds: dict[Hashable, float] = {}  # sum over the answer's samples of log(q_i / (1 - q_i))
        self._seen = 0
        self._state = self._solve()

    def observe(self, probability_right: float, answer: Hashable | None = None) -> None:
        """One more finished sample: the PRM's calibrated probability in [0, 1], and its final answer with votes."""
        q = probability("probability_right", probability_right, closed=True)
        voting = self._theta is not None
        q = min(max(0.0 if voting and answer is None else q, _EDGE), 1.0 - _EDGE)
        sure, doubt = math.log(q), math.log1p(-q)
        self._seen += 1
        self._doubt += doubt
        if not voting:
            self._any = self._any + np.logaddexp(self._right + sure, self._wrong + doubt)
        elif answer is not None:
            self._count[answer] = self._count.get(answer, 0) + 1
            self._odds[answer] = self._odds.get(answer, 0.0) + sure - doubt
        self._state = self._solve()

    @property
    def solved(self) -> float:
        """Probability that one of the samples is right."""
        return 1.0 - self._state[0]

    @property
    def mean(self) -> float:
        """Posterior mean of p."""
        return float(self._state[2] @ self._p)

    @property
    def answers(self) -> dict[Hashable, float]:
        """Probability of being the right one, by final answer; empty without votes."""
        return dict(self._state[3])

    def expected_success(self, more: int) -> float:
        """Probability that one is right once ``more`` >= 0 further samples are drawn."""
        open_, unsolved, _, _ = self._state
        return 1.0 - open_ * float(unsolved @ self._fail**more)

    def samples_needed(self, target: float, limit: int) -> int:
        """The smallest k >= 0 with ``expected_success(k) >= target``, ``limit`` if there is none below it."""
        wanted = target - _REACHED
        if self.expected_success(0) >= wanted:
            return 0
        below, above = 0, 1  # success(below) < wanted
        while above < limit and self.expected_success(above) < wanted:
            below, above = above, 2 * above
        above = min(above, limit)
        while above - below > 1:
            middle = (below + above) // 2
            if self.expected_success(middle) >= wanted:
                above = middle
            else:
                below = middle
        return above

    def resampled(self, levels: int, *, solved_as: float) -> Tensor:
        """[levels] float64, ascending and equally weighted: the posterior as the batch ops of `prmfast.ops` take it.

        Where one sample is right already, p is given as ``solved_as``. 1: ``ias_curve`` and ``ias_budget`` then see
        1 - W0 sum_m u_m (1 - p_m)^k for every k >= 1. 0: for ``ias_allocate`` a further sample gains nothing there.
        Values are the weighted atoms' quantiles at (j + 1/2) / levels, so no probability moves by more than 1 / levels.
        """
        whole("levels", levels, low=1)
        if solved_as not in (0.0, 1.0):
            raise ValueError(f"solved_as must be 0 or 1, got {solved_as}")
        open_, unsolved, _, _ = self._state
        first = solved_as == 0.0
        solved = np.array([1.0 - open_])
        values = np.concatenate([[0.0], self._p] if first else [self._p, [1.0]])
        weights = np.concatenate([solved, open_ * unsolved] if first else [open_ * unsolved, solved])
        at = (np.arange(levels) + 0.5) / levels
        place = np.searchsorted(weights.cumsum(), at).clip(max=len(values) - 1)
        return torch.from_numpy(values[place])

    def _solve(self) -> tuple[float, Array, Array, dict[Hashable, float]]:
        """(W0, u [M], posterior of p [M], probability by answer)."""
        nothing = self._seen * self._wrong + self._doubt
        found: dict[Hashable, float] = {}
        if self._theta is None:
            either = self._any
        else:
            nothing = nothing + self._agreement(None)
            rows = [nothing]
            for answer, n in self._count.items():
                own = self._doubt + self._odds[answer] + self._agreement(answer)
                rows.append(n * self._right + (self._seen - n) * self._wrong + own)
            either = np.logaddexp.reduce(rows)
        total = np.logaddexp.reduce(either)
        if self._theta is not None:
            found = {
                answer: math.exp(np.logaddexp.reduce(row) - total)
                for answer, row in zip(self._count, rows[1:], strict=True)
            }
        open_ = min(1.0, math.exp(np.logaddexp.reduce(nothing) - total))
        return open_, _normalised(nothing), _normalised(either), found

    def _agreement(self, right: Hashable | None) -> float:
        """Log-probability of the final answers of the wrong samples, where ``right`` is the right answer."""
        assert self._theta is not None
        theta = self._theta
        groups = [n for answer, n in self._count.items() if answer != right]  # None is no answer: all of them
        value = len(groups) * math.log(theta) + sum(math.lgamma(n) for n in groups)
        return value - sum(math.log(theta + i) for i in range(sum(groups)))


def _normalised(log_weights: Array) -> Array:
    weights = np.exp(log_weights - log_weights.max())
    return np.asarray(weights / weights.sum())
