"""Budget policies: what they compute, and that a wrong field never becomes an object."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch

import prmfast.ias
from prmfast.ias import (
    BetaThresholdBudget,
    BudgetPolicy,
    BudgetState,
    FixedBudget,
    GlobalBudget,
    PointBudget,
    TargetBudget,
    TauStopping,
)
from prmfast.ops import ias_allocate, ias_budget

MIDPOINTS = (torch.arange(100, dtype=torch.float64) + 0.5) / 100


def state(rows: int = 5, drawn: int = 0, **more: torch.Tensor) -> BudgetState:
    g = torch.Generator().manual_seed(rows)
    centre = torch.rand(rows, 1, generator=g, dtype=torch.float64)
    return BudgetState(centre * (0.5 + MIDPOINTS), torch.full((rows,), drawn), **more)


def test_every_policy_is_final_and_frozen() -> None:
    policies = [c for c in vars(prmfast.ias).values() if inspect.isclass(c) and issubclass(c, BudgetPolicy)]
    assert len(policies) == 7
    for policy in policies:
        assert policy is BudgetPolicy or policy.__final__
    with pytest.raises(AttributeError):
        FixedBudget(3).n = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        BudgetPolicy()  # type: ignore[abstract]


@pytest.mark.parametrize(
    "policy",
    [
        FixedBudget(3),
        PointBudget(0.9, 64),
        TargetBudget(0.9, 64),
        BetaThresholdBudget(0.9, 0.2, 64),
        TauStopping(0.5, 0.9, 64),
        GlobalBudget(64, total=20),
    ],
)
def test_budgets_are_int32(policy: BudgetPolicy) -> None:
    budget = policy.budget(state())
    assert budget.dtype == torch.int32
    assert budget.shape == (5,)


def test_fixed() -> None:
    assert FixedBudget(7).budget(state()).tolist() == [7] * 5


def test_point_is_the_closed_form() -> None:
    s = state(50)
    r = s.quantiles.clamp(0, 1).mean(1)
    closed = [min(math.ceil(math.log(0.05) / math.log(1 - float(p))), 64) for p in r]
    assert PointBudget(0.95, 64).budget(s).tolist() == closed


def test_target_is_eq5_and_asks_for_more_than_the_point() -> None:
    s = state(50)
    target = TargetBudget(0.95, 64).budget(s)
    assert torch.equal(target, ias_budget(s.quantiles, 0.95, 64))
    assert (target >= PointBudget(0.95, 64).budget(s)).all()  # Jensen
    assert (target > PointBudget(0.95, 64).budget(s)).any()


def test_beta_threshold_reads_one_quantile() -> None:
    s = BudgetState(MIDPOINTS.expand(1, -1), torch.zeros(1, dtype=torch.int64))  # Q(beta) = beta
    for beta in (0.005, 0.1, 0.123, 0.5, 0.995):
        expected = ias_budget(torch.tensor([[beta]], dtype=torch.float64), 0.9, 64)
        assert torch.equal(BetaThresholdBudget(0.9, beta, 64).budget(s), expected)
    assert torch.equal(BetaThresholdBudget(0.9, 1.0, 64).budget(s), ias_budget(MIDPOINTS[None, -1:], 0.9, 64))
    one = BudgetState(torch.tensor([[0.3]]), torch.zeros(1, dtype=torch.int64))
    assert BetaThresholdBudget(0.9, 0.7, 64).budget(one).item() == 7


def test_tau_stopping() -> None:
    rule = TauStopping(tau=0.1, target=0.8, n_max=4, step=2)
    assert rule.budget(state(3)).tolist() == [2, 2, 2]
    good, bad = torch.full((100,), 0.9), torch.full((100,), 0.9)
    bad[:20] = 0.1  # the 0.1-quantile misses
    candidates = torch.stack([torch.stack([bad, good]), torch.stack([bad, bad]), torch.stack([bad, good])])
    filled = torch.tensor([[True, True], [True, True], [True, False]])  # the third's second slot is empty
    drawn = torch.tensor([2, 2, 1])
    quantiles = state(3).quantiles
    assert rule.budget(BudgetState(quantiles, drawn, candidates, filled)).tolist() == [2, 4, 3]
    assert rule.budget(BudgetState(quantiles, drawn + 2, candidates, filled)).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="TauStopping needs candidates"):
        rule.budget(BudgetState(quantiles, drawn))


def test_global_budget() -> None:
    s = state(40)
    assert torch.equal(GlobalBudget(64, total=100).budget(s), ias_allocate(s.quantiles, 100, 64))
    mean = GlobalBudget(64, mean_per_question=2.5, n_min=1).budget(s)
    assert mean.sum() == 100
    assert mean.min() >= 1


NAN_FREE = torch.full((2, 3), 0.5)
ZERO = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FixedBudget(0), ValueError, "n must be >= 1, got 0"),
        (lambda: FixedBudget(2.0), TypeError, "n must be an int, got float"),
        (lambda: PointBudget(1.0, 8), ValueError, r"target must lie in \(0, 1\), got 1.0"),
        (lambda: TargetBudget(0.0, 8), ValueError, r"target must lie in \(0, 1\), got 0.0"),
        (lambda: TargetBudget(float("nan"), 8), ValueError, r"target must lie in \(0, 1\), got nan"),
        (lambda: TargetBudget("0.9", 8), TypeError, "target must be a number, got str"),
        (lambda: TargetBudget(0.9, 0), ValueError, "n_max must be >= 1, got 0"),
        (lambda: TargetBudget(0.9, True), TypeError, "n_max must be an int, got bool"),
        (lambda: BetaThresholdBudget(0.9, 1.1, 8), ValueError, r"beta must lie in \[0, 1\], got 1.1"),
        (lambda: TauStopping(-0.1, 0.9, 8), ValueError, r"tau must lie in \[0, 1\], got -0.1"),
        (lambda: TauStopping(0.1, 0.9, 8, step=0), ValueError, "step must be >= 1, got 0"),
        (lambda: GlobalBudget(8), ValueError, "give one of total and mean_per_question, got None and None"),
        (lambda: GlobalBudget(8, total=3, mean_per_question=1.0), ValueError, "give one of total"),
        (lambda: GlobalBudget(8, total=3, n_min=9), ValueError, "n_min must be >= 0 and <= 8, got 9"),
        (lambda: GlobalBudget(8, mean_per_question=0.5, n_min=1), ValueError, "mean_per_question must be >= n_min = 1"),
        (lambda: GlobalBudget(8, mean_per_question=float("inf")), ValueError, "must be finite and > 0, got inf"),
        (lambda: BudgetState(NAN_FREE[0], ZERO), ValueError, r"quantiles must have 2 dimensions .*, got shape \(3,\)"),
        (lambda: BudgetState(NAN_FREE.long(), ZERO), TypeError, "quantiles must be floating point, got int64"),
        (lambda: BudgetState(NAN_FREE, ZERO[:1]), ValueError, r"drawn must have shape \(2,\), got \(1,\)"),
        (lambda: BudgetState(NAN_FREE, ZERO.float()), TypeError, "drawn must have dtype int32 | int64, got float32"),
        (lambda: BudgetState(NAN_FREE, ZERO - 1), ValueError, "drawn must be >= 0, got -1"),
        (lambda: BudgetState(NAN_FREE, ZERO, NAN_FREE[:, None]), ValueError, "must be given together"),
        (
            lambda: BudgetState(NAN_FREE, ZERO, NAN_FREE[:1, None], ZERO[:1, None] > 0),
            ValueError,
            "candidates must have 2",
        ),
        (
            lambda: BudgetState(NAN_FREE, ZERO, NAN_FREE[:, None], ZERO > 0),
            ValueError,
            r"filled must be bool of shape \(2, 1\)",
        ),
        (lambda: TargetBudget(0.9, 8).budget(BudgetState(NAN_FREE * math.nan, ZERO)), ValueError, "NaN in row 0"),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
