"""Budget policies: how many samples each question should have, given what is known of it so far.

A policy is a small frozen object with one method. Sources: [D] arXiv 2605.06785 eq. 1, 4, 5 and A.2; [U] arXiv
2506.09338.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from prmfast.ias._check import at_level, positive_number, probability, quantile_matrix, whole
from prmfast.ops import ias_allocate, ias_budget


@dataclass(frozen=True, slots=True)
class BudgetState:
    """What is known of B questions.

    | field | shape, dtype | meaning |
    | --- | --- | --- |
    | quantiles | [B, M] float | quantiles of each question's success probability at the levels (m + 1/2) / M |
    | drawn | [B] integer | finished answers so far |
    | candidates | [B, D, M'] float or None | quantiles of the finished answers' probability of being right |
    | filled | [B, D] bool or None | which slots of ``candidates`` hold an answer; the others are not read |
    """

    quantiles: Tensor
    drawn: Tensor
    candidates: Tensor | None = None
    filled: Tensor | None = None

    def __post_init__(self) -> None:
        rows = quantile_matrix("quantiles", self.quantiles).shape[0]
        for name, value, shape in (("drawn", self.drawn, (rows,)), ("filled", self.filled, None)):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
            if shape is not None and value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        if self.drawn.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"drawn must have dtype int32 | int64, got {str(self.drawn.dtype).removeprefix('torch.')}")
        if bool((self.drawn < 0).any()):
            raise ValueError(f"drawn must be >= 0, got {int(self.drawn.min())}")
        if (self.candidates is None) != (self.filled is None):
            raise ValueError("candidates and filled must be given together, got one of them")
        if self.candidates is not None and self.filled is not None:
            slots = (rows, quantile_matrix("candidates", self.candidates, ndim=3).shape[1])
            if self.candidates.shape[0] != rows:
                raise ValueError(f"candidates must have {rows} rows like quantiles, got {self.candidates.shape[0]}")
            if self.filled.dtype != torch.bool or tuple(self.filled.shape) != slots:
                raise ValueError(
                    f"filled must be bool of shape {slots}, got {self.filled.dtype} {tuple(self.filled.shape)}"
                )

    def __len__(self) -> int:
        return int(self.quantiles.shape[0])


class BudgetPolicy(abc.ABC):
    """Says how many samples each question should have in total. Asked again after every round of drawing."""

    __slots__ = ()
    uses_candidates: ClassVar[bool] = False
    """True: the policy reads ``state.candidates``, so the quantiles of finished answers must be computed."""
    per_question: ClassVar[bool] = False
    """True: row i of the budget depends on row i of the state only, so no question need wait for the others."""

    @abc.abstractmethod
    def budget(self, state: BudgetState) -> Tensor:
        """Samples in total, int32 [B]. A question is finished once it has that many."""


@final
@dataclass(frozen=True, slots=True)
class FixedBudget(BudgetPolicy):
    """The same ``n`` >= 1 for every question: ordinary best-of-n."""

    n: int
    per_question: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole("n", self.n, low=1)

    def budget(self, state: BudgetState) -> Tensor:
        """``n`` everywhere."""
        return torch.full((len(state),), self.n, dtype=torch.int32, device=state.quantiles.device)


@final
@dataclass(frozen=True, slots=True)
class PointBudget(BudgetPolicy):
    """Equals ``min(ceil(log(1 - target) / log(1 - r)), n_max)``, r the mean of the clipped quantiles: [D] eq. 1 and 4.

    It believes its estimate r: where r is uncertain, the target is missed on average (S is concave in p). See
    `TargetBudget`.
    """

    target: float
    n_max: int
    per_question: ClassVar[bool] = True

    def __post_init__(self) -> None:
        probability("target", self.target)
        whole("n_max", self.n_max, low=1)

    def budget(self, state: BudgetState) -> Tensor:
        """Eq. 4 of the mean."""
        mean = state.quantiles.double().clamp(0, 1).mean(1, keepdim=True)
        return ias_budget(mean, self.target, self.n_max)


@final
@dataclass(frozen=True, slots=True)
class TargetBudget(BudgetPolicy):
    """The smallest N with ``mean_m[1 - (1 - p_m)^N] >= target``, else ``n_max``: [D] eq. 5."""

    target: float
    n_max: int
    per_question: ClassVar[bool] = True

    def __post_init__(self) -> None:
        probability("target", self.target)
        whole("n_max", self.n_max, low=1)

    def budget(self, state: BudgetState) -> Tensor:
        """Eq. 5 of the quantiles."""
        return ias_budget(state.quantiles, self.target, self.n_max)


@final
@dataclass(frozen=True, slots=True)
class BetaThresholdBudget(BudgetPolicy):
    """Eq. 4 with r = Q(beta) [D]: the target is met if p is at least its ``beta``-quantile. Small beta is careful.

    Q(beta) is interpolated between the state's midpoint levels.
    """

    target: float
    beta: float
    n_max: int
    per_question: ClassVar[bool] = True

    def __post_init__(self) -> None:
        probability("target", self.target)
        probability("beta", self.beta, closed=True)
        whole("n_max", self.n_max, low=1)

    def budget(self, state: BudgetState) -> Tensor:
        """Eq. 4 of one quantile."""
        return ias_budget(at_level(state.quantiles, self.beta)[:, None], self.target, self.n_max)


@final
@dataclass(frozen=True, slots=True)
class TauStopping(BudgetPolicy):
    """Keeps sampling until the ``tau``-quantile of some finished answer reaches ``target`` [D A.2].

    ``step`` more samples a round, at most ``n_max`` in total. Needs the quantiles of finished answers:
    `BudgetState.candidates`.
    """

    tau: float
    target: float
    n_max: int
    step: int = 1
    uses_candidates: ClassVar[bool] = True
    per_question: ClassVar[bool] = True

    def __post_init__(self) -> None:
        probability("tau", self.tau, closed=True)
        probability("target", self.target)
        whole("n_max", self.n_max, low=1)
        whole("step", self.step, low=1)

    def budget(self, state: BudgetState) -> Tensor:
        """What is drawn where an answer is good enough, ``step`` more elsewhere."""
        more = (state.drawn + self.step).clamp(max=self.n_max)
        if state.candidates is None or state.filled is None:
            if bool((state.drawn > 0).any()):
                raise ValueError("TauStopping needs candidates and filled once samples are drawn, got None")
            return more.to(torch.int32)
        enough = ((at_level(state.candidates, self.tau) >= self.target) & state.filled).any(1)
        return torch.where(enough, state.drawn, more).to(torch.int32)


@final
@dataclass(frozen=True, slots=True)
class GlobalBudget(BudgetPolicy):
    """Spends ``total`` samples (or ``mean_per_question`` times the batch) where they solve the most questions.

    Exact: `prmfast.ops.ias_allocate` over the whole batch, each question between ``n_min`` and ``n_max``. Give one of
    the two.
    """

    n_max: int
    total: int | None = None
    mean_per_question: float | None = None
    n_min: int = 0

    def __post_init__(self) -> None:
        whole("n_max", self.n_max, low=1)
        whole("n_min", self.n_min, low=0, high=self.n_max)
        if (self.total is None) == (self.mean_per_question is None):
            raise ValueError(f"give one of total and mean_per_question, got {self.total} and {self.mean_per_question}")
        if self.total is not None:
            whole("total", self.total, low=0)
        if (
            self.mean_per_question is not None
            and positive_number("mean_per_question", self.mean_per_question) < self.n_min
        ):
            raise ValueError(f"mean_per_question must be >= n_min = {self.n_min}, got {self.mean_per_question}")

    def budget(self, state: BudgetState) -> Tensor:
        """The optimal allocation; ties go to the earlier question."""
        total = self.total
        if total is None:
            assert self.mean_per_question is not None
            total = round(self.mean_per_question * len(state))
        return ias_allocate(state.quantiles, total, self.n_max, n_min=self.n_min)
