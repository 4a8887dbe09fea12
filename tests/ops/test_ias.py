"""Room ias: every backend against float64 brute force, the released and paper vectors, laws, errors, registration."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from prmfast.kernels.ias import reference
from prmfast.ops._backends import load
from tests.ops.device import backends, ias_allocate, ias_budget, ias_curve

BACKENDS = backends("ias", interpreted=False)  # tests/ops/test_ias_triton.py has sizes for the interpreter
each_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = {
    "one": (1, 1, 1),
    "M1": (5, 1, 64),
    "odd": (3, 11, 7),
    "lanes": (4, 8, 8),
    "lanes+1": (9, 17, 65),
    "paper": (64, 100, 64),
    "long": (6, 3, 1000),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
EDGES = [0.0, 1.0, -0.5, 1.5, 1e-300, 5e-324, 1e-45, 1e-16, 1 - 1e-16, 0.5, float("inf"), float("-inf")]


def make(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(rows, 1, generator=g, dtype=torch.float64) ** 2
    return (centre * torch.rand(rows, columns, generator=g, dtype=torch.float64) * 2).sort(1).values.to(dtype)


def curve_by_definition(quantiles: Tensor, n_max: int) -> np.ndarray:
    p = np.clip(quantiles.double().numpy(), 0, 1)
    return np.stack([1 - np.mean((1 - p) ** n, axis=1) for n in range(1, n_max + 1)], axis=1)


def budget_by_definition(quantiles: Tensor, target: float, n_max: int) -> tuple[np.ndarray, np.ndarray]:
    """The budgets, and whether the row's curve stays 1e-11 away from where the comparison flips."""
    curve = curve_by_definition(quantiles, n_max)
    hit = curve >= target - reference.TOUCH
    n = np.where(hit.any(1), hit.argmax(1) + 1, n_max)
    return n, np.abs(curve - (target - reference.TOUCH)).min(1) > 1e-14


@each_backend
@each_shape
@pytest.mark.parametrize("target", [1e-6, 0.5, 0.95, 0.9999, 1 - 1e-9])
def test_budget_is_the_definition(backend: str, shape: tuple[int, int, int], target: float) -> None:
    rows, columns, n_max = shape
    q = make(rows, columns)
    expected, clear = budget_by_definition(q, target, n_max)
    got = ias_budget(q, target, n_max, backend=backend)
    assert got.dtype == torch.int32
    assert clear.mean() > 0.9 or rows < 10
    np.testing.assert_array_equal(got.numpy()[clear], expected[clear])


@each_backend
@each_shape
def test_curve_is_the_definition(backend: str, shape: tuple[int, int, int]) -> None:
    rows, columns, n_max = shape
    q = make(rows, columns)
    got = ias_curve(q, n_max, backend=backend)
    np.testing.assert_allclose(got.numpy(), curve_by_definition(q, n_max), rtol=0, atol=2e-13)
    assert (got[:, 1:] >= got[:, :-1]).all()
    assert ((got >= 0) & (got <= 1)).all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_edge_values(backend: str, dtype: torch.dtype) -> None:
    q = torch.tensor(list(itertools.product(EDGES, EDGES)), dtype=dtype)
    for n_max in (1, 2, 1000):
        np.testing.assert_allclose(
            ias_curve(q, n_max, backend=backend).numpy(),
            curve_by_definition(q, n_max),
            atol=1e-7 if dtype == torch.float32 else 1e-12,
        )
        for target in (0.25, 0.5, 0.75, 0.99):  # 0.5 is touched by half certain, half impossible: that counts
            expected, _ = budget_by_definition(q, target, n_max)
            np.testing.assert_array_equal(ias_budget(q, target, n_max, backend=backend).numpy(), expected)
    one = torch.tensor([[0.0], [1.0], [-1.0], [2.0], [1e-300]], dtype=dtype)
    assert ias_budget(one, 0.9, 64, backend=backend).tolist() == [64, 1, 64, 1, 64]


@each_backend
def test_a_touch_counts_as_reached(backend: str) -> None:
    # S(N) = 1 - 2^-N and 1 - 10^-N: the second is not exact in binary, its targets must still be met at N.
    for n in range(1, 11):
        assert ias_budget(torch.full((1, 7), 0.5), 1 - 0.5**n, 64, backend=backend).item() == n
        assert ias_budget(torch.full((1, 7), 0.9, dtype=torch.float64), 1 - 0.1**n, 64, backend=backend).item() == n


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 35),
    n_max=st.integers(1, 130),
    target=st.floats(0.01, 0.999),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    layout=st.sampled_from(["contiguous", "rows", "columns", "transposed", "expanded"]),
    seed=st.integers(0, 999),
)
def test_any_shape_dtype_and_layout(
    rows: int, columns: int, n_max: int, target: float, dtype: torch.dtype, layout: str, seed: int
) -> None:
    base = make(2 * rows, 2 * columns, seed, dtype)
    views: dict[str, Callable[[], Tensor]] = {
        "contiguous": lambda: base[:rows, :columns].contiguous(),
        "rows": lambda: base[::2, :columns],
        "columns": lambda: base[:rows, ::2],
        "transposed": lambda: base[:rows, :columns].t().contiguous().t(),
        "expanded": lambda: base[:1, :columns].expand(min(rows, 1) * rows, columns),
    }
    q = views[layout]()
    plain = q.double().clone()
    for backend in BACKENDS:
        expected, clear = budget_by_definition(plain, target, n_max)
        np.testing.assert_array_equal(ias_budget(q, target, n_max, backend=backend).numpy()[clear], expected[clear])
        curve = ias_curve(q, n_max, backend=backend)
        assert curve.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert curve.shape == (len(q), n_max)
        np.testing.assert_allclose(
            curve.numpy(), curve_by_definition(plain, n_max), atol=1e-12 if dtype == torch.float64 else 1e-7
        )
        total = 3 * len(q)
        assert torch.equal(
            ias_allocate(q, total, n_max, backend=backend), ias_allocate(plain, total, n_max, backend="reference")
        )


@each_backend
def test_a_target_per_row(backend: str) -> None:
    q = make(40, 9)
    targets = torch.linspace(0.05, 0.99, 40, dtype=torch.float64)
    one_by_one = [ias_budget(q[i : i + 1], float(t), 64, backend=backend).item() for i, t in enumerate(targets)]
    assert ias_budget(q, targets, 64, backend=backend).tolist() == one_by_one
    strided = torch.stack([targets, targets / 2], 1)[:, 0]
    assert ias_budget(q, strided, 64, backend=backend).tolist() == one_by_one
    assert torch.equal(
        ias_budget(q, torch.tensor(0.9), 64, backend=backend),
        ias_budget(q, float(np.float32(0.9)), 64, backend=backend),
    )


def test_float32_decides_as_float64_does() -> None:
    for columns, seed in ((100, 0), (11, 1), (1, 2)):
        q = make(350_000, columns, seed, torch.float32)
        for target in (0.9, 0.995):
            exact = ias_budget(q, target, 70_000).clamp(max=64)  # beyond 65,536 the search is float64 throughout
            assert torch.equal(ias_budget(q, target, 64), exact)


@each_backend
@pytest.mark.parametrize("n_max", [1, 2, 63, 64, 65, 1000, 10**6, 2**31 - 1])
def test_targets_that_the_curve_nearly_touches(backend: str, n_max: int) -> None:
    shapes = zip((1, 2, 7, 11, 15, 16, 17, 100, 1000), itertools.cycle((33, 17, 16, 15, 1)), strict=False)
    for columns, rows in shapes:
        q = make(rows, columns, columns, torch.float32).clamp_min(0.1)  # every answer stays below 140
        curve = torch.from_numpy(curve_by_definition(q, min(n_max, 140)))
        n = torch.arange(rows) % min(n_max, 70)
        reached = 1 - ((1 - q.double()) ** (n[:, None] + 1)).mean(1)
        for distance in (-1e-5, -1e-7, -1e-9, 1e-9, 1e-7, 1e-5):
            target = (reached + distance).clamp(1e-6, 1 - 1e-6)
            expected = (1 + (curve < target[:, None] - reference.TOUCH).sum(1)).clamp(max=n_max)
            clear = (curve - target[:, None]).abs().min(1).values > 1e-11
            got = ias_budget(q, target, n_max, backend=backend)
            assert torch.equal(got[clear].long(), expected[clear])


@each_backend
def test_empty_batch(backend: str) -> None:
    q = torch.empty(0, 5)
    assert ias_budget(q, 0.9, 8, backend=backend).shape == (0,)
    assert ias_budget(q, torch.empty(0), 8, backend=backend).shape == (0,)
    assert ias_curve(q, 8, backend=backend).shape == (0, 8)
    assert ias_allocate(q, 10, 8, backend=backend).shape == (0,)


@each_backend
def test_row_alone_equals_row_in_batch_bitwise(backend: str) -> None:
    q = make(65, 37, dtype=torch.float32)
    curve, budget = ias_curve(q, 64, backend=backend), ias_budget(q, 0.9, 64, backend=backend)
    for i in range(65):
        assert torch.equal(ias_curve(q[i : i + 1], 64, backend=backend)[0], curve[i])
        assert ias_budget(q[i : i + 1], 0.9, 64, backend=backend)[0] == budget[i]


@each_backend
def test_threads_change_nothing(backend: str) -> None:
    q = make(3000, 100)
    one = (
        ias_budget(q, 0.9, 64, backend=backend),
        ias_curve(q, 64, backend=backend),
        ias_allocate(q, 20_000, 64, backend=backend),
    )
    torch.set_num_threads(3)
    try:
        three = (
            ias_budget(q, 0.9, 64, backend=backend),
            ias_curve(q, 64, backend=backend),
            ias_allocate(q, 20_000, 64, backend=backend),
        )
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@each_backend
def test_denormals_of_the_caller_survive(backend: str) -> None:
    q = make(50, 100) * 1e-2
    for run in (
        lambda: ias_budget(q, 0.9, 64, backend=backend),
        lambda: ias_curve(q, 64, backend=backend),
        lambda: ias_allocate(q, 200, 64, backend=backend),
    ):
        run()
        assert (torch.tensor([1e-310], dtype=torch.float64) * 0.5).item() > 0


@each_backend
def test_budget_is_monotone_in_target_and_in_p(backend: str) -> None:
    q = make(300, 21)
    budgets = torch.stack([ias_budget(q, t, 64, backend=backend) for t in np.linspace(0.01, 0.999, 40)])
    assert (budgets[1:] >= budgets[:-1]).all()
    assert (
        ias_budget((q * 1.1).clamp(max=1), 0.9, 64, backend=backend) <= ias_budget(q, 0.9, 64, backend=backend)
    ).all()


# --- allocation


def greedy(quantiles: Tensor, total: int, n_max: int, n_min: int) -> tuple[list[int], float]:
    """One sample after the other to the largest E[p (1-p)^N], the lower row first."""
    p = np.clip(quantiles.double().numpy(), 0, 1)
    given = [n_min] * len(p)
    for _ in range(min(total, len(p) * n_max) - len(p) * n_min):
        gains = [(-1.0 if given[i] == n_max else np.mean(p[i] * (1 - p[i]) ** given[i])) for i in range(len(p))]
        given[int(np.argmax(gains))] += 1
    return given, success(p, given)


def success(p: np.ndarray, given: list[int]) -> float:
    return float(sum(1 - np.mean((1 - row) ** n) for row, n in zip(p, given, strict=True)))


@each_backend
@pytest.mark.parametrize("n_min", [0, 1, 3])
@pytest.mark.parametrize("total", [0, 1, 7, 30, 60, 1000])
def test_allocate_is_the_greedy(backend: str, total: int, n_min: int) -> None:
    q = make(6, 5, seed=total)
    total = max(total, 6 * n_min)
    given = ias_allocate(q, total, 12, n_min=n_min, backend=backend)
    assert given.dtype == torch.int32
    assert given.sum() == min(total, 6 * 12)
    assert given.tolist() == greedy(q, total, 12, n_min)[0]


@each_backend
@pytest.mark.parametrize("seed", range(5))
def test_allocate_is_optimal(backend: str, seed: int) -> None:
    q = make(4, 3, seed)
    given = ias_allocate(q, 9, 5, backend=backend).tolist()
    best = max(success(q.numpy().clip(0, 1), list(c)) for c in itertools.product(range(6), repeat=4) if sum(c) == 9)
    assert success(q.numpy().clip(0, 1), given) == pytest.approx(best, abs=1e-12)


@each_backend
def test_allocate_ties(backend: str) -> None:
    same = torch.full((4, 3), 0.3, dtype=torch.float64)
    assert ias_allocate(same, 6, 8, backend=backend).tolist() == [2, 2, 1, 1]
    # 0.2 * 0.8 and 0.16 differ in the last bit; they tie, and the lower row is served first.
    assert 0.2 * 0.8 != 0.16
    assert ias_allocate(torch.tensor([[0.16], [0.2]], dtype=torch.float64), 2, 8, backend=backend).tolist() == [1, 1]
    assert ias_allocate(torch.tensor([[0.2], [0.16]], dtype=torch.float64), 2, 8, backend=backend).tolist() == [2, 0]
    certain = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    assert ias_allocate(certain, 2, 8, backend=backend).tolist() == [0, 1, 1, 0]
    assert ias_allocate(certain, 13, 8, backend=backend).tolist() == [8, 4, 1, 0]
    tiny = torch.tensor([[0.0], [1e-300], [1e-40], [5e-324]], dtype=torch.float64)
    assert ias_allocate(tiny, 5, 3, backend=backend).tolist() == [0, 2, 3, 0]
    assert ias_allocate(torch.tensor([[0.0], [1e-40]]), 2, 3, backend=backend).tolist() == [
        0,
        2,
    ]  # a float32 denormal is no zero


def test_backends_allocate_alike() -> None:
    q = make(2000, 40, dtype=torch.float32)
    for total, n_max, n_min in (
        (1, 64, 0),
        (2000, 64, 1),
        (16_000, 64, 0),
        (120_000, 64, 7),
        (127_990, 64, 0),
        (10**12, 64, 0),
        (30_000, 333, 2),
    ):
        first, *others = (ias_allocate(q, total, n_max, n_min=n_min, backend=b) for b in BACKENDS)
        assert int(first.sum()) == min(total, 2000 * n_max)
        assert all(torch.equal(first, other) for other in others)


# --- gradient, registration, compile


def test_curve_gradient() -> None:
    q = make(4, 6).clamp(0.01, 0.99).requires_grad_()
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(lambda x, b=backend: ias_curve(x, 9, backend=b), (q,))
    outside = torch.tensor([[-0.5, 0.0, 1.0, 1.5, 0.25]], dtype=torch.float64, requires_grad=True)
    ias_curve(outside, 2).sum().backward()
    assert outside.grad is not None
    torch.testing.assert_close(outside.grad, torch.tensor([[0, 0, 0, 0, (1 + 2 * 0.75) / 5]], dtype=torch.float64))


def test_curve_gradient_of_half_types() -> None:
    q = torch.tensor([[0.25, 0.5]], dtype=torch.bfloat16, requires_grad=True)
    curve = ias_curve(q, 3)
    assert curve.dtype == torch.float32
    curve.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.bfloat16
    expected = [(1 + 2 * (1 - p) + 3 * (1 - p) ** 2) / 2 for p in (0.25, 0.5)]
    assert q.grad[0].tolist() == torch.tensor(expected).bfloat16().tolist()


def test_second_derivative_says_no() -> None:
    q = make(2, 3).requires_grad_()
    (first,) = torch.autograd.grad(ias_curve(q, 4).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        first.sum().backward()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    q = make(5, 7, dtype=dtype)
    for x in (q, q[::2, ::3], q[:0]):
        per_row = torch.full((len(x),), 0.9, dtype=torch.float64)
        opcheck(torch.ops.prmfast.ias_budget.default, (x, per_row, 16, backend))
        opcheck(torch.ops.prmfast.ias_budget.default, (x, torch.tensor(0.9), 16, backend))
        opcheck(torch.ops.prmfast.ias_allocate.default, (x, 3 * len(x), 16, 1, backend))
        opcheck(torch.ops.prmfast.ias_curve.default, (x, 16, backend))
        grad = torch.ones(len(x), 16, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        opcheck(torch.ops.prmfast.ias_curve_backward.default, (grad, x, backend))
    opcheck(torch.ops.prmfast.ias_curve.default, (q.detach().clone().requires_grad_(), 16, backend))


def every_op(q: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = q * 0.5
    return ias_budget(q, 0.9, 64), ias_budget(q, t, 64), ias_curve(q, 16) + 1, ias_allocate(q, 50, 64, n_min=1)


def test_compile_fullgraph() -> None:
    compiled = torch.compile(every_op, fullgraph=True, backend="aot_eager")
    for rows in (10, 13):  # the second call recompiles with a dynamic batch
        q, t = make(rows, 11), torch.linspace(0.1, 0.9, rows)
        for got, expected in zip(compiled(q, t), every_op(q, t), strict=True):
            torch.testing.assert_close(got, expected)
    q = make(4, 5).requires_grad_()
    (expected,) = torch.autograd.grad(ias_curve(q, 8).sum(), q)
    total = torch.compile(lambda x: ias_curve(x, 8).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(total(q), q)[0], expected)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    q, t = make(10, 11), torch.linspace(0.1, 0.9, 10)
    for got, expected in zip(torch.compile(every_op, fullgraph=True)(q, t), every_op(q, t), strict=True):
        torch.testing.assert_close(got, expected)


def test_every_backend_has_the_same_parameters() -> None:
    for name in ("ias_budget", "ias_curve", "ias_curve_backward", "ias_allocate"):
        wanted = inspect.signature(getattr(reference, name)).parameters
        for backend in BACKENDS:
            assert inspect.signature(getattr(load("ias", backend), name)).parameters == wanted


# --- errors

OK = torch.full((3, 4), 0.5)
NAN = torch.tensor([[0.5, 0.5], [0.5, float("nan")]])


@each_backend
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: ias_budget(NAN, 0.9, 8, backend=b), ValueError, "quantiles must not be NaN, got NaN in row 1"),
        (lambda b: ias_curve(NAN, 8, backend=b), ValueError, "ias_curve: quantiles must not be NaN, got NaN in row 1"),
        (
            lambda b: ias_allocate(NAN, 8, 8, backend=b),
            ValueError,
            "ias_allocate: quantiles must not be NaN, got NaN in row 1",
        ),
        (lambda b: ias_budget(OK, 0.0, 8, backend=b), ValueError, r"target must lie in \(0, 1\), got 0.0"),
        (lambda b: ias_budget(OK, 1.0, 8, backend=b), ValueError, r"target must lie in \(0, 1\), got 1.0"),
        (lambda b: ias_budget(OK, float("nan"), 8, backend=b), ValueError, r"target must lie in \(0, 1\), got nan"),
        (
            lambda b: ias_budget(OK, torch.tensor([0.5, 1.5, 0.5]), 8, backend=b),
            ValueError,
            r"target must lie in \(0, 1\), got 1.5 in row 1",
        ),
        (
            lambda b: ias_budget(OK, torch.tensor([0.5, 0.5]), 8, backend=b),
            ValueError,
            r"target must have shape \(3,\), got \(2,\)",
        ),
        (
            lambda b: ias_budget(OK, "0.9", 8, backend=b),
            TypeError,
            "target must be a number or a torch.Tensor, got str",
        ),
        (
            lambda b: ias_budget(OK, True, 8, backend=b),
            TypeError,
            "target must be a number or a torch.Tensor, got bool",
        ),
        (
            lambda b: ias_budget(OK, torch.tensor([1, 1, 1]), 8, backend=b),
            TypeError,
            "target must have dtype .*, got int64",
        ),
        (lambda b: ias_budget(OK, 0.9, 0, backend=b), ValueError, "n_max must be >= 1 and <= 2147483647, got 0"),
        (lambda b: ias_budget(OK, 0.9, 8.0, backend=b), TypeError, "n_max must be an int, got float"),
        (lambda b: ias_curve(OK, 0, backend=b), ValueError, "n_max must be >= 1"),
        (lambda b: ias_budget(OK.long(), 0.9, 8, backend=b), TypeError, "quantiles must have dtype .*, got int64"),
        (lambda b: ias_budget([[0.5]], 0.9, 8, backend=b), TypeError, "quantiles must be a torch.Tensor, got list"),
        (
            lambda b: ias_budget(OK[0], 0.9, 8, backend=b),
            ValueError,
            r"quantiles must have 2 dimension\(s\), got shape \(4,\)",
        ),
        (lambda b: ias_curve(OK[:, :0], 8, backend=b), ValueError, r"at least one column, got shape \(3, 0\)"),
        (lambda b: ias_allocate(OK, 2, 8, n_min=1, backend=b), ValueError, r"total must be >= B \* n_min = 3, got 2"),
        (lambda b: ias_allocate(OK, -1, 8, backend=b), ValueError, "total must be >= 0, got -1"),
        (lambda b: ias_allocate(OK, 90, 8, n_min=9, backend=b), ValueError, "n_min must be >= 0 and <= 8, got 9"),
        (lambda b: ias_allocate(OK, 2.0, 8, backend=b), TypeError, "total must be an int, got float"),
    ],
)
def test_errors(backend: str, call: Callable[[str], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(backend)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*, got 'gpu'"):
        ias_budget(OK, 0.9, 8, backend="gpu")


# --- vectors


@each_backend
def test_paper_vectors(backend: str, shared_vectors: Path) -> None:
    z = np.load(shared_vectors / "paper_ias.npz")
    for case in json.loads(str(z["manifest"]))["cases"]:
        name, n_max = case["case"], case["params"]["Nmax"]
        q = torch.from_numpy(z[f"{name}/in/q"] if "q" in case["in"] else z[f"{name}/in/r"][:, None])
        margin = z[f"{name}/out/margin"]
        for which in set(case["out"]) & {"eq1", "eq4", "eq5_clipped"}:
            expected = z[f"{name}/out/{which}"]
            got = np.stack([ias_budget(q, float(c), n_max, backend=backend).numpy() for c in z[f"{name}/in/C"]])
            wrong = np.abs(got - expected)
            assert wrong.max() <= 1, (name, which)
            assert (wrong[margin >= 1e-12] == 0).all(), (name, which)
        if "eq5" in case["out"]:  # unclipped values: only rows outside [0, 1] may differ
            inside = ((q >= 0) & (q <= 1)).all(1).numpy()
            clear = inside[None] & (margin >= 1e-12)
            assert (got == z[f"{name}/out/eq5"])[clear].all()
