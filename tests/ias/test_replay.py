"""Replay: expectations against enumeration, Monte Carlo against expectations, and the promises of the rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from prmfast.ias import ReplayPool, replay
from prmfast.ops import ias_budget


def small_pool(scores: bool = True) -> ReplayPool:
    correct = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    score = torch.tensor(
        [[0.9, 0.9, 0.5, 0.9, 0.1], [0.5, 0.4, 0.3, 0.2, 0.1], [0.2, 0.3, 0.3, 9.0, 9.0], [0.5, 0.5, 0.7, 9.0, 9.0]],
        dtype=torch.float64,
    )
    return ReplayPool(tuple("abcd"), ("m",) * 4, torch.tensor([5, 5, 3, 3]), correct, score if scores else None)


def enumerated(pool: ReplayPool, row: int, n: int) -> tuple[float, float]:
    """Means over every ordered draw of n: any right, and the first among the highest scored right."""
    assert pool.score is not None
    orders = list(itertools.permutations(range(int(pool.size[row])), min(n, int(pool.size[row]))))
    any_right = [any(bool(pool.correct[row, i]) for i in order) for order in orders]
    best = [bool(pool.correct[row, max(order, key=lambda i: float(pool.score[row, i]))]) for order in orders]
    return float(np.mean(any_right)), float(np.mean(best))


def test_exact_is_the_enumeration() -> None:
    pool = small_pool()
    outcomes = pool.exact()
    assert outcomes.best is not None
    assert outcomes.success[:, 0].tolist() == [0, 0, 0, 0]
    for row, n in itertools.product(range(4), range(1, 6)):
        success, best = enumerated(pool, row, n)
        assert outcomes.success[row, n].item() == pytest.approx(success, abs=1e-12)
        assert outcomes.best[row, n].item() == pytest.approx(best, abs=1e-12), (row, n)


def test_sampled_converges_to_exact() -> None:
    pool = small_pool()
    exact, sampled = pool.exact(), pool.sampled(4000, 0)
    assert exact.best is not None
    assert sampled.best is not None
    assert (sampled.success - exact.success).abs().max() < 0.032  # four standard errors of a share
    assert (sampled.best - exact.best).abs().max() < 0.032
    again = pool.sampled(10, 3)
    assert torch.equal(again.success, pool.sampled(10, 3).success)


def test_budgets_beyond_the_pool_are_capped_and_reported() -> None:
    pool = small_pool()
    rows = replay(pool, {"four": 4, "mine": torch.tensor([1, 9, 0, 3])}, exact=True, fixed=[1], targets=[0.5]).rows
    four, mine = rows[0], rows[1]
    assert (four.asked, four.spent.value, four.pool_limited) == (4.0, 3.5, 0.5)
    assert (mine.asked, mine.spent.value, mine.pool_limited) == (3.25, 2.25, 0.25)
    expected = [enumerated(pool, 0, 1)[0], 0.0, 0.0, enumerated(pool, 3, 3)[0]]
    assert mine.success.value == pytest.approx(np.mean(expected))
    assert mine.target is None


def test_every_method_and_target_gets_a_row() -> None:
    pool = small_pool()
    quantiles = torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    frontier = replay(
        pool, {"quantiles": quantiles, "point": quantiles.mean(1)}, targets=[0.5, 0.9], n_max=16, trials=3
    )
    assert [(r.method, r.target) for r in frontier.rows] == [
        *(("quantiles", t) for t in (0.5, 0.9)),
        *(("point", t) for t in (0.5, 0.9)),
        *(("fixed", None),) * 4,  # 1, 2, 4 and the largest pool's 5
        *(("oracle", t) for t in (0.5, 0.9)),
    ]
    assert [r.asked for r in frontier.of("fixed")] == [1, 2, 4, 5]
    assert frontier.of("quantiles")[1].asked == ias_budget(quantiles, 0.9, 16).double().mean().item()
    assert frontier.of("oracle")[0].asked == ias_budget(pool.truth[:, None], 0.5, 16).double().mean().item()
    table = frontier.to_table()
    assert table.num_rows == len(frontier.rows)
    assert {"method", "success", "success_low", "best_of_n_high", "open_success"} <= set(table.column_names)


def test_calibrated_posteriors_reach_the_target_and_overconfident_ones_miss_it() -> None:
    g = torch.Generator().manual_seed(1)
    rows, slots = 3000, 200
    centre = 0.15 + 0.5 * torch.rand(rows, 1, generator=g, dtype=torch.float64)
    posterior = centre * (0.5 + (torch.arange(100, dtype=torch.float64) + 0.5) / 100)  # uniform on centre * (.5, 1.5)
    p = centre * (0.5 + torch.rand(rows, 1, generator=g, dtype=torch.float64))
    correct = torch.rand(rows, slots, generator=g, dtype=torch.float64) < p
    pool = ReplayPool(tuple(map(str, range(rows))), ("m",) * rows, torch.full((rows,), slots), correct)
    frontier = replay(pool, {"calibrated": posterior, "raw": centre[:, 0] ** 0.5}, targets=[0.6, 0.9], exact=True)
    for good, raw in zip(frontier.of("calibrated"), frontier.of("raw"), strict=True):
        assert good.best_of_n is None
        assert good.at_n_max == 0
        assert good.target is not None
        assert good.success.low > good.target - 0.005
        assert raw.success.high < good.target


def test_intervals_resample_questions() -> None:
    # Two copies of each question are one cluster: the interval must be as wide as without the copies.
    g = torch.Generator().manual_seed(2)
    correct = torch.rand(200, 1, generator=g) < 0.5
    single = ReplayPool(tuple(map(str, range(200))), ("m",) * 200, torch.ones(200, dtype=torch.int64), correct)
    names = single.question * 2
    double = ReplayPool(names, ("m",) * 200 + ("n",) * 200, torch.ones(400, dtype=torch.int64), correct.repeat(2, 1))
    a, b = (replay(pool, {"one": 1}, exact=True, targets=[0.5]).rows[0].success for pool in (single, double))
    assert a == pytest.approx(b)
    share = correct.double().mean().item()
    assert a.value == pytest.approx(share)
    assert a.high - a.low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 200), rel=0.15)


def test_open_success_leaves_out_what_cannot_be_held_to_the_target() -> None:
    pool = small_pool(scores=False)
    row = replay(pool, {"n": torch.tensor([2, 8, 2, 9])}, exact=True, targets=[0.5], n_max=8).rows[0]
    assert (row.pool_limited, row.at_n_max) == (0.5, 0.5)
    assert row.open_success.value == pytest.approx(
        (enumerated(small_pool(), 0, 2)[0] + enumerated(small_pool(), 2, 2)[0]) / 2
    )
    none = replay(pool, {"n": 8}, exact=True, targets=[0.5], n_max=8).rows[0]
    assert math.isnan(none.open_success.value)


def table(**columns: list[object]) -> pa.Table:
    return pa.table(columns)


def test_pool_from_traces() -> None:
    traces = table(
        question_id=["x", "y", "x", "x", "y"],
        policy_id=["m", "m", "m", "n", "m"],
        correct=[True, False, False, True, None],
        prm_step_scores=[[0.2, 0.4], [0.5], [0.9, 0.1], None, [0.3]],
    )
    pool = ReplayPool.from_table(traces)
    assert (pool.question, pool.policy, pool.size.tolist()) == (("x", "y", "x"), ("m", "m", "n"), [2, 1, 1])
    assert pool.score is None  # one sample is not scored
    assert pool.truth.tolist() == [0.5, 0.0, 1.0]
    scored = ReplayPool.from_table(traces, scored=True, aggregate="product")
    assert len(scored) == 2
    assert scored.score is not None
    assert scored.score[0].tolist() == pytest.approx([0.08, 0.09])
    one = ReplayPool.from_table(traces, policy_id="n")
    assert one.correct.tolist() == [[True]]
    with pytest.raises(ValueError, match="no sample with known correctness"):
        ReplayPool.from_table(traces, policy_id="nobody")


def test_real_traces(shared_data: Path) -> None:
    pool = ReplayPool.from_table(shared_data / "math500_iid_samples.parquet")
    big = int((pool.size >= 16).sum())
    assert big >= 50
    frontier = replay(pool, {"one": 1}, targets=[0.9], exact=True)
    fixed = frontier.of("fixed")
    assert all(a.success.value <= b.success.value for a, b in itertools.pairwise(fixed))
    assert frontier.rows[0].success.value == pytest.approx(pool.truth.mean().item())


POOL = small_pool()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: replay(POOL, {"a": torch.rand(3, 2)}),
            ValueError,
            r"budgets\['a'\] must have shape \(4,\) or \(4, M\)",
        ),
        (lambda: replay(POOL, {"a": [1, 2]}), TypeError, r"budgets\['a'\] must be a torch.Tensor or an int, got list"),
        (lambda: replay(POOL, {"a": -1}), ValueError, "a must be >= 0, got -1"),
        (lambda: replay(POOL, {"a": torch.tensor([1, 1, 1, -1])}), ValueError, "must be .* >= 0"),
        (lambda: replay(POOL, {"a": torch.full((4,), math.nan)}), ValueError, r"budgets\['a'\]: .*NaN in row 0"),
        (lambda: replay(POOL, {}, targets=[1.0]), ValueError, r"targets must lie in \(0, 1\), got 1.0"),
        (lambda: replay(POOL, {}, n_max=0), ValueError, "n_max must be >= 1, got 0"),
        (lambda: replay(POOL, {}, trials=0), ValueError, "trials must be >= 1, got 0"),
        (lambda: ReplayPool((), (), torch.ones(0), torch.ones(0, 1) > 0), ValueError, "at least 1 question, got 0"),
        (
            lambda: ReplayPool(("a",), ("m",), torch.tensor([3]), torch.ones(1, 2) > 0),
            ValueError,
            r"size must lie in \[1, 2\]",
        ),
        (
            lambda: ReplayPool(("a",), ("m",), torch.tensor([1]), torch.ones(1, 1) > 0, torch.full((1, 1), math.nan)),
            ValueError,
            "score must not be NaN",
        ),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
