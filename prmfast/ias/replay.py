"""Cost and success of budgets on stored samples: what would have happened, had each question been given its N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prmfast.calibration.metrics import Interval
from prmfast.ias._check import probability, whole
from prmfast.ias._pool import Outcomes, ReplayPool
from prmfast.ops import ias_budget

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Frontier", "FrontierRow", "ReplayPool", "replay"]

TARGETS = tuple(float(c) for c in np.linspace(0.5, 0.999, 10))
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """One method at one target (None: budgets that were given). Intervals: 95 %, by resampling questions.

    | field | meaning |
    | --- | --- |
    | asked, spent | mean budget, and mean drawn: a budget above the pool's size takes the whole pool |
    | success | share of questions with a right answer among those drawn: what a target promises |
    | best_of_n | share whose highest scored answer is right; None without scores |
    | pool_limited | share of questions whose budget exceeds the pool's size |
    | at_n_max | share of questions whose budget is n_max, where the target was perhaps out of reach |
    | open_success | success among the other questions: those that can be held to the target; NaN where there is none |
    """

    method: str
    target: float | None
    asked: float
    spent: Interval
    success: Interval
    best_of_n: Interval | None
    pool_limited: float
    at_n_max: float
    open_success: Interval


@dataclass(frozen=True, slots=True)
class Frontier:
    """The rows of a replay, methods in the order given, then the fixed-N line and the oracle."""

    rows: tuple[FrontierRow, ...]

    def to_table(self) -> pa.Table:
        """A pyarrow table with a column per field, three for an interval: success, success_low, success_high."""
        import pyarrow as pa

        return pa.Table.from_pylist([_flat(row) for row in self.rows])

    def of(self, method: str) -> tuple[FrontierRow, ...]:
        """The rows of one method."""
        return tuple(row for row in self.rows if row.method == method)

    def kept(self) -> dict[str, tuple[list[float], list[float]]]:
        """(targets, success) by method, for `prmfast.calibration.plots.target_curves`."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for row in self.rows:
            if row.target is not None:
                targets, success = found.setdefault(row.method, ([], []))
                targets.append(row.target)
                success.append(row.success.value)
        return found

    def curves(self) -> dict[str, Any]:
        """The arguments of `prmfast.calibration.plots.frontier`: (mean samples, success) by method, fixed N, oracle."""
        names = dict.fromkeys(row.method for row in self.rows)
        curve = {
            name: tuple(zip(*((r.spent.value, r.success.value) for r in self.of(name)), strict=True)) for name in names
        }
        return {"fixed": curve.pop("fixed"), "oracle": curve.pop("oracle"), "curves": curve}


def replay(
    pool: ReplayPool,
    budgets: Mapping[str, Tensor | int],
    *,
    targets: Sequence[float] = TARGETS,
    n_max: int = 64,
    trials: int = 100,
    seed: int = 0,
    exact: bool = False,
    fixed: Sequence[int] | None = None,
    truth: Tensor | None = None,
    bootstrap: int = 1000,
) -> Frontier:
    """Frontier rows of every method and target, of fixed budgets and of the oracle that knows p.

    Samples are drawn without replacement from each question's pool, in the same random orders for all methods.

    Args:
        pool: Q questions' stored samples.
        budgets: by method name: quantiles [Q, M] float (eq. 5 at each target), a point estimate [Q] float (eq. 4), or
            budgets that need no target: integers [Q] or one int.
        targets: wanted success probabilities, each in (0, 1).
        n_max: largest budget.
        trials: random orders to average over. seed: of the orders and of the bootstrap.
        exact: expectations over all orders instead of ``trials`` of them; faster and without Monte-Carlo noise.
        fixed: budgets of the fixed-N line; powers of two up to the largest useful one by default.
        truth: [Q] success probabilities for the oracle; by default each pool's own share of right answers, which the
            oracle then also spends: a generous bound, not a fair rival, where pools are small.
        bootstrap: resamples of the questions.

    Raises:
        TypeError, ValueError: names the method or argument, the rule and the value.
    """
    for name, value, low in (
        ("n_max", n_max, 1),
        ("trials", trials, 1),
        ("bootstrap", bootstrap, 1),
        ("seed", seed, 0),
    ):
        whole(name, value, low=low)
    wanted = [probability("targets", target) for target in targets]
    if fixed is None:
        top = min(n_max, int(pool.size.max()))
        fixed = sorted({2**k for k in range(top.bit_length())} | {top})
    oracle = pool.truth if truth is None else truth
    plans: list[tuple[str, float | None, Tensor]] = []
    for method, given in budgets.items():
        plans += [(method, target, n) for target, n in _plan(method, given, len(pool), wanted, n_max)]
    for n in fixed:
        plans.append(("fixed", None, torch.full((len(pool),), whole("fixed", n, low=1), dtype=torch.int64)))
    plans += [("oracle", target, n) for target, n in _plan("oracle", oracle, len(pool), wanted, n_max)]
    outcomes = pool.exact() if exact else pool.sampled(trials, seed)
    return Frontier(_rows(pool, plans, outcomes, n_max, _resamples(pool.question, bootstrap, seed)))


def _flat(row: FrontierRow) -> dict[str, str | float | None]:
    flat: dict[str, str | float | None] = {}
    for name in (field.name for field in fields(row)):
        value = getattr(row, name)
        if isinstance(value, Interval) or name == "best_of_n":
            parts = value if isinstance(value, Interval) else (None, None, None)
            flat.update(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True))
        else:
            flat[name] = value
    return flat


def _plan(
    method: str, given: Tensor | int, rows: int, targets: list[float], n_max: int
) -> list[tuple[float | None, Tensor]]:
    """(target, budgets [Q]) pairs of one method."""
    if isinstance(given, int):
        return [(None, torch.full((rows,), whole(method, given, low=0), dtype=torch.int64))]
    if not isinstance(given, Tensor):
        raise TypeError(f"budgets[{method!r}] must be a torch.Tensor or an int, got {type(given).__name__}")
    if given.shape[:1] != (rows,) or given.ndim > 2:
        raise ValueError(f"budgets[{method!r}] must have shape ({rows},) or ({rows}, M), got {tuple(given.shape)}")
    given = given.detach().cpu()
    if not given.is_floating_point():
        if given.ndim != 1 or bool((given < 0).any()):
            raise ValueError(
                f"budgets[{method!r}] of integers must be [{rows}] and >= 0, "
                f"got shape {tuple(given.shape)}, least {int(given.min())}"
            )
        return [(None, given.long())]
    quantiles = given if given.ndim == 2 else given[:, None]
    try:
        return [(target, ias_budget(quantiles, target, n_max).long()) for target in targets]
    except ValueError as error:
        raise ValueError(f"budgets[{method!r}]: {error}") from error


def _resamples(question: Sequence[str], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """How often each resample takes each distinct question [R, G], and each row's question [Q]."""
    _, codes = np.unique(np.asarray(question, dtype=str), return_inverse=True)
    groups = int(codes.max()) + 1
    counts = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=count)
    return torch.from_numpy(counts).double(), torch.from_numpy(codes.astype(np.int64))


def _rows(
    pool: ReplayPool,
    plans: list[tuple[str, float | None, Tensor]],
    outcomes: Outcomes,
    n_max: int,
    resamples: tuple[Tensor, Tensor],
) -> tuple[FrontierRow, ...]:
    size = pool.size
    rows = []
    for method, target, asked in plans:
        spent = torch.minimum(asked, size)
        limited = asked > size
        at_n_max = asked >= n_max
        success = outcomes.success.gather(1, spent[:, None])[:, 0]
        best = torch.zeros_like(success) if outcomes.best is None else outcomes.best.gather(1, spent[:, None])[:, 0]
        held = (~limited & ~at_n_max).double()
        columns = torch.stack([spent.double(), success, best, success * held], 1)
        spent_, success_, best_, open_ = _intervals(columns, held, resamples)
        rows.append(
            FrontierRow(
                method=method,
                target=target,
                asked=float(asked.double().mean()),
                spent=spent_,
                success=success_,
                best_of_n=None if outcomes.best is None else best_,
                pool_limited=float(limited.double().mean()),
                at_n_max=float(at_n_max.double().mean()),
                open_success=open_,
            )
        )
    return tuple(rows)


def _intervals(values: Tensor, held: Tensor, resamples: tuple[Tensor, Tensor]) -> list[Interval]:
    """(mean, low, high) of each column of values [Q, C]; the last column's mean is over the rows with ``held`` = 1."""
    counts, codes = resamples
    ones = torch.ones_like(held)
    columns = torch.cat([values, ones[:, None], held[:, None]], 1)
    sums = torch.zeros(counts.shape[1], columns.shape[1], dtype=torch.float64).index_add_(0, codes, columns)
    totals = torch.cat([sums.sum(0, keepdim=True), counts @ sums])  # the whole sample first, then the resamples
    weight = totals[:, -2:-1].expand(-1, values.shape[1]).clone()
    weight[:, -1] = totals[:, -1]
    means = totals[:, :-2] / weight  # 0 / 0 = NaN where no row is held
    tail = (1 - CONFIDENCE) / 2
    edges = torch.nanquantile(means[1:], torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return [Interval(float(means[0, c]), float(edges[0, c]), float(edges[1, c])) for c in range(values.shape[1])]
