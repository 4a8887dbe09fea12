"""Room ias: budgets, curves, a shared total."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prmfast.bench import inputs
from prmfast.bench.case import DERIVED, Call, Case, Job, Rival, Work, assert_close, require
from prmfast.bench.ias_numba import numba_allocate, numba_budget, numba_curve
from prmfast.bench.rivals import compiled, jitted, to_jax, to_torch

TARGET, N_MAX = 0.9, 64
CHECKED = {11: 1_000_000, 100: 200_000}  # rows whose budget is compared with float64 at the largest size, by M
CHUNK = 50_000

BUDGET_RIVALS = (
    *("torch eager", "torch eager, bit search", "torch.compile", "torch.compile, bit search"),
    *("jax.jit", "numba", "numba float64"),
)
CURVE_RIVALS = ("torch eager", "torch.compile", "jax.jit", "numba")
ALLOCATE_RIVALS = ("torch eager", "torch.compile", "jax.jit", "numba heap")


def eager_budget(quantiles: Tensor, target: float, n_max: int) -> Tensor:
    """Running powers in float32, until every row has reached its target."""
    fail = 1 - quantiles
    power = fail
    budget = torch.ones(len(fail), dtype=torch.int32, device=fail.device)
    for _ in range(1, n_max):
        missed = power.mean(1) > 1 - target
        if not bool(missed.any()):
            break
        budget += missed
        power = power * fail
    return budget


def powers(quantiles: Tensor, first: int, end: int) -> Tensor:
    """(1 - p)^N for N = first..end - 1 as [B, N, M]: exp and log fuse into the reduction that follows."""
    exponents = torch.arange(first, end, dtype=quantiles.dtype, device=quantiles.device)
    return (torch.log1p(-quantiles)[:, None, :] * exponents[:, None]).exp()


def formula_budget(quantiles: Tensor, target: float, n_max: int) -> Tensor:
    """The definition in one expression, for torch.compile: as fast as 63 unrolled powers and compiled in a tenth."""
    return 1 + (powers(quantiles, 1, n_max).mean(2) > 1 - target).sum(1, dtype=torch.int32)


def formula_curve(quantiles: Tensor, n_max: int) -> Tensor:
    """The definition in one expression, for torch.compile."""
    return 1 - powers(quantiles, 1, n_max + 1).mean(2)


def bit_search_budget(quantiles: Tensor, target: float, n_max: int) -> Tensor:
    """Squarings, then one comparison per bit of N: what this package's kernel does, in torch. n_max is a power of 2."""
    squares = [1 - quantiles]
    while 2 ** len(squares) < n_max:
        squares.append(squares[-1] * squares[-1])
    current = torch.ones_like(quantiles)
    budget = torch.ones(len(quantiles), dtype=torch.int32, device=quantiles.device)
    for bit in range(len(squares) - 1, -1, -1):
        step = current * squares[bit]
        missed = step.mean(1) > 1 - target  # N = what is built up plus 2^bit still misses
        current = torch.where(missed[:, None], step, current)
        budget = budget + (missed.to(torch.int32) << bit)
    return budget.clamp_max(n_max)


def eager_curve(quantiles: Tensor, n_max: int) -> Tensor:
    """Running powers in float32."""
    fail = 1 - quantiles
    power, columns = fail, []
    for _ in range(n_max):
        columns.append(1 - power.mean(1))
        power = power * fail
    return torch.stack(columns, 1)


def jax_budget(target: float, n_max: int) -> Callable[[Any], Any]:
    """A while loop that stops when every row has reached its target."""
    jax = require("jax")
    jnp = jax.numpy

    def budget(quantiles: Any) -> Any:
        fail = 1 - quantiles

        def go_on(state: Any) -> Any:
            n, _, _, missed = state
            return (n < n_max) & missed.any()

        def body(state: Any) -> Any:
            n, power, count, missed = state
            power = power * fail
            return n + 1, power, count + missed, power.mean(1) > 1 - target

        ones = jnp.ones(quantiles.shape[0], jnp.int32)
        return jax.lax.while_loop(go_on, body, (1, fail, ones, fail.mean(1) > 1 - target))[2]

    return budget


def jax_curve(n_max: int) -> Callable[[Any], Any]:
    """Running powers, unrolled so that XLA fuses them."""
    jnp = require("jax").numpy

    def curve(quantiles: Any) -> Any:
        fail = 1 - quantiles
        power, columns = fail, []
        for _ in range(n_max):
            columns.append(1 - power.mean(1))
            power = power * fail
        return jnp.stack(columns, 1)

    return curve


def gains_table(quantiles: Tensor, n_max: int) -> Tensor:
    """[B, n_max] marginal gains sum_m p (1 - p)^N."""
    fail, term, columns = 1 - quantiles, quantiles, []
    for _ in range(n_max):
        columns.append(term.sum(1))
        term = term * fail
    return torch.stack(columns, 1)


def formula_gains(quantiles: Tensor, n_max: int) -> Tensor:
    """The same in one expression, for torch.compile; p = 1 is kept from 0 * -inf."""
    return (quantiles.clamp_max(1 - 2**-24)[:, None, :] * powers(quantiles.clamp_max(1 - 2**-24), 0, n_max)).sum(2)


def top_gains(gains: Tensor, total: int) -> Tensor:
    """How many of the ``total`` largest entries lie in each row."""
    best = torch.topk(gains.flatten(), total, sorted=False).indices
    return torch.bincount(best // gains.shape[1], minlength=len(gains)).to(torch.int32)


def jax_allocate(total: int, n_max: int) -> Callable[[Any], Any]:
    """The table of gains, the total-th largest by a sort, and a count."""
    jnp = require("jax").numpy

    def allocate(quantiles: Any) -> Any:
        fail, term, columns = 1 - quantiles, quantiles, []
        for _ in range(n_max):
            columns.append(term.sum(1))
            term = term * fail
        gains = jnp.stack(columns, 1)
        least = jnp.sort(gains.ravel())[gains.size - total]
        return (gains >= least).sum(1)

    return allocate


def budget_mismatches(rows: int, columns: int) -> int:
    """Rows of ``rows`` fresh ones whose budget is not that of the float64 definition."""
    from prmfast.kernels.ias import reference
    from prmfast.ops import ias_budget

    wrong = 0
    for start in range(0, rows, CHUNK):
        some = inputs.quantiles(min(CHUNK, rows - start), columns, seed=1000 + start)
        truth = reference.ias_budget(some, torch.tensor(TARGET, dtype=torch.float64), N_MAX)
        wrong += int((ias_budget(some, TARGET, N_MAX) != truth).sum())
    return wrong


def budget_job(rows: int, columns: int, checked: int) -> Job:
    """ias_budget at target 0.9."""
    from prmfast.kernels.ias import reference
    from prmfast.ops import ias_budget

    q = inputs.quantiles(rows, columns)

    def check(out: Any) -> dict[str, float]:
        some = slice(0, CHUNK)
        truth = reference.ias_budget(q[some], torch.tensor(TARGET, dtype=torch.float64), N_MAX)
        wrong = int((out[some] != truth).sum()) + (budget_mismatches(checked, columns) if checked else 0)
        found = {"mismatches": float(wrong), "rows_compared": float(len(truth) + checked)}
        assert wrong == 0, found
        return found

    def agree(out: Any, other: Any) -> None:
        off = (to_torch(other).int() - out).abs()  # float32 rivals decide a few rows at the edge otherwise
        assert float((off > 0).double().mean()) <= 2e-3, f"{int((off > 0).sum())} budgets differ"
        assert int(off.max()) <= 1, f"a budget differs by {int(off.max())}"

    arguments = (q, TARGET, N_MAX)
    return Job(
        ours={"": Call(lambda: ias_budget(q, TARGET, N_MAX))},
        rivals={
            "torch eager": Rival(lambda: Call(lambda: eager_budget(*arguments))),
            "torch eager, bit search": Rival(lambda: Call(lambda: bit_search_budget(*arguments)), DERIVED),
            "torch.compile": Rival(lambda: compiled(formula_budget, *arguments)),
            "torch.compile, bit search": Rival(lambda: compiled(bit_search_budget, *arguments), DERIVED),
            "jax.jit": Rival(lambda: jitted(jax_budget(TARGET, N_MAX), to_jax(q))),
            "numba": Rival(lambda: numba_budget(q, TARGET, N_MAX, double=False)),
            "numba float64": Rival(lambda: numba_budget(q, TARGET, N_MAX, double=True)),
        },
        check=check,
        agree=agree,
        work=Work("read", 4.0 * rows * (columns + 1), "quantiles once, budgets once"),
    )


def curve_job(rows: int, columns: int) -> Job:
    """ias_curve for N = 1..64."""
    from prmfast.kernels.ias import reference
    from prmfast.ops import ias_curve

    q = inputs.quantiles(rows, columns)

    def check(out: Any) -> dict[str, float]:
        truth = reference.ias_curve(q[:4096].double(), N_MAX)
        return {"max_error": assert_close("curve", out[:4096], truth, rtol=0, atol=2e-7)}

    def agree(out: Any, other: Any) -> None:
        assert_close("curve", to_torch(other), out, rtol=0, atol=2e-5)

    return Job(
        ours={"": Call(lambda: ias_curve(q, N_MAX))},
        rivals={
            "torch eager": Rival(lambda: Call(lambda: eager_curve(q, N_MAX))),
            "torch.compile": Rival(lambda: compiled(formula_curve, q, N_MAX)),
            "jax.jit": Rival(lambda: jitted(jax_curve(N_MAX), to_jax(q))),
            "numba": Rival(lambda: numba_curve(q, N_MAX)),
        },
        check=check,
        agree=agree,
        work=Work("copy", 4.0 * rows * (columns + N_MAX), "quantiles once, curve once"),
    )


def allocate_job(rows: int, columns: int, total: int) -> Job:
    """ias_allocate of ``total`` samples, at most 64 a question."""
    from prmfast.kernels.ias import reference
    from prmfast.ops import ias_allocate

    q = inputs.quantiles(rows, columns)
    curve = torch.cat([torch.zeros(rows, 1, dtype=torch.float64), reference.ias_curve(q.double(), N_MAX)], 1)

    def solved(budget: Any) -> float:
        return float(curve.gather(1, to_torch(budget).long()[:, None]).sum())

    def check(out: Any) -> dict[str, float]:
        part = max(1, min(rows, 4096))
        truth = reference.ias_allocate(q[:part], total * part // rows, N_MAX, 0)
        wrong = int((ias_allocate(q[:part], total * part // rows, N_MAX) != truth).sum())
        found = {"mismatches": float(wrong), "rows_compared": float(part), "given": float(out.sum())}
        assert wrong == 0, found
        assert int(out.sum()) == total, found
        return found

    def agree(out: Any, other: Any) -> None:
        short = abs(int(to_torch(other).sum()) - total)
        assert short <= 2 + 1e-4 * total, f"{short} samples too many or too few"  # ties at the threshold
        assert abs(solved(other) - solved(out)) <= 1e-4 * solved(out), (solved(other), solved(out))

    def in_torch_compile() -> Call:
        table = compiled(formula_gains, q, N_MAX)
        return Call(lambda: top_gains(table.run(), total))

    return Job(
        ours={"": Call(lambda: ias_allocate(q, total, N_MAX))},
        rivals={
            "torch eager": Rival(lambda: Call(lambda: top_gains(gains_table(q, N_MAX), total))),
            "torch.compile": Rival(in_torch_compile),
            "jax.jit": Rival(lambda: jitted(jax_allocate(total, N_MAX), to_jax(q))),
            "numba heap": Rival(lambda: numba_allocate(q, total, N_MAX)),
        },
        check=check,
        agree=agree,
        work=Work("read", 4.0 * rows * (columns + 1), "quantiles once, budgets once"),
    )


def budget_case(rows: int, columns: int, checked: int = 0) -> Case:
    """A case of ias_budget; ``checked`` more rows are compared with float64."""
    return Case(
        room="ias",
        op="ias_budget",
        size=f"B={rows} M={columns}",
        dtype="float32",
        make=functools.partial(budget_job, rows, columns, checked),
        tiny=functools.partial(budget_job, 3, 4, 0),
        rivals=BUDGET_RIVALS,
    )


def curve_case(rows: int, columns: int) -> Case:
    """A case of ias_curve."""
    return Case(
        room="ias",
        op="ias_curve",
        size=f"B={rows} M={columns}",
        dtype="float32",
        make=functools.partial(curve_job, rows, columns),
        tiny=functools.partial(curve_job, 3, 4),
        rivals=CURVE_RIVALS,
    )


def allocate_case(rows: int, columns: int, total: int) -> Case:
    """A case of ias_allocate."""
    return Case(
        room="ias",
        op="ias_allocate",
        size=f"B={rows} M={columns} total={total}",
        dtype="float32",
        make=functools.partial(allocate_job, rows, columns, total),
        tiny=functools.partial(allocate_job, 3, 4, 8),
        rivals=ALLOCATE_RIVALS,
    )
