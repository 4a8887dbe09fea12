"""Room ias on Triton, at sizes that its interpreter can take where there is no GPU; test_ias.py has the rest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from prmfast.kernels.ias import reference
from prmfast.testing import poison
from tests.ops.device import backends, ias_allocate, ias_budget, ias_curve
from tests.ops.test_ias import EDGES, budget_by_definition, curve_by_definition, make

tuning = pytest.importorskip("prmfast.kernels.ias.tuning")
pytestmark = pytest.mark.skipif("triton" not in backends("ias"), reason="triton is not installed")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# one row, one column, a tile and one more, N beyond the unrolled search, rows beyond what registers hold
SHAPES = [(1, 1, 1), (5, 1, 64), (9, 11, 7), (3, 17, 65), (2, 3, 200), (2, 1025, 9), (0, 4, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_budget_is_the_definition(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, n_max = shape
    q = make(rows, columns, dtype=dtype)
    for target in (0.5, 0.95, 1 - 1e-9):
        expected, clear = budget_by_definition(q, target, n_max) if rows else (np.empty(0), np.empty(0, bool))
        with poison():
            got = ias_budget(q, target, n_max, backend="triton")
        assert got.dtype == torch.int32
        np.testing.assert_array_equal(got.numpy()[clear], expected[clear])


@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 1, 9), (3, 5, 65), (0, 4, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_curve_is_the_definition(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, n_max = shape
    q = make(rows, columns, dtype=dtype)
    with poison():
        got = ias_curve(q, n_max, backend="triton")
    exact = dtype == torch.float64
    assert got.dtype == (torch.float64 if exact else torch.float32)
    np.testing.assert_allclose(got.numpy(), curve_by_definition(q, n_max), rtol=0, atol=2e-13 if exact else 1e-7)
    assert (got[:, 1:] >= got[:, :-1]).all()
    assert ((got >= 0) & (got <= 1)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edge_values(dtype: torch.dtype) -> None:
    q = torch.tensor(list(itertools.product(EDGES[:9], EDGES[3:])), dtype=dtype)
    np.testing.assert_allclose(ias_curve(q, 3, backend="triton").numpy(), curve_by_definition(q, 3), atol=1e-7)
    for n_max, target in ((1, 0.25), (2, 0.5), (64, 0.5), (64, 0.99)):
        expected, _ = budget_by_definition(q, target, n_max)
        np.testing.assert_array_equal(ias_budget(q, target, n_max, backend="triton").numpy(), expected)


def test_float32_is_decided_again_where_the_curve_nearly_touches() -> None:
    q = make(16, 11, 3, torch.float32).clamp_min(0.1)
    n = torch.arange(16) * 3
    reached = 1 - ((1 - q.double()) ** (n[:, None] + 1)).mean(1)
    for distance in (-1e-6, -1e-8, 1e-8, 1e-6):
        target = (reached + distance).clamp(1e-9, 1 - 1e-9)
        expected = ias_budget(q.double(), target, 64, backend="reference")
        assert torch.equal(ias_budget(q, target, 64, backend="triton"), expected)
    for n_exact in (1, 4, 10):  # a touch counts as reached
        assert ias_budget(torch.full((1, 7), 0.5), 1 - 0.5**n_exact, 64, backend="triton").item() == n_exact


def test_a_row_does_not_see_the_others() -> None:
    q = make(37, 5, 4, torch.float32)
    target = torch.linspace(0.3, 0.99, 37, dtype=torch.float64)
    budget, curve = ias_budget(q, target, 64, backend="triton"), ias_curve(q, 70, backend="triton")
    for row in (0, 31, 36):
        one = slice(row, row + 1)
        assert torch.equal(ias_budget(q[one], target[one], 64, backend="triton"), budget[one])
        assert torch.equal(ias_curve(q[one], 70, backend="triton"), curve[one])


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
def test_layouts(layout: str) -> None:
    base = make(12, 14, 5, torch.float32)
    q = {"rows": base[::2], "columns": base[:, ::2], "expanded": base[:1].expand(4, -1)}[layout]
    assert torch.equal(ias_budget(q, 0.9, 64, backend="triton"), ias_budget(q, 0.9, 64, backend="reference"))
    torch.testing.assert_close(ias_curve(q, 5, backend="triton"), ias_curve(q, 5, backend="reference"))


@pytest.mark.parametrize("room", [(4, 0), (64, 0), (9, 2)], ids=str)
def test_allocate_is_greedy(room: tuple[int, int]) -> None:
    n_max, n_min = room
    q = make(20, 6, 1, torch.float32)
    for total in (20 * n_min, 20 * n_min + 33, 10**12):
        expected = ias_allocate(q, total, n_max, n_min=n_min, backend="reference")
        assert torch.equal(ias_allocate(q, total, n_max, n_min=n_min, backend="triton"), expected)
    assert ias_allocate(q[:0], 5, n_max, n_min=n_min, backend="triton").shape == (0,)


@pytest.mark.parametrize("n_max", [3, 200])
def test_the_first_row_with_nan_is_named(n_max: int) -> None:
    q = make(9, 3, 2, torch.float32)
    q[8, 1] = q[5, 2] = torch.nan
    calls = [
        lambda: ias_budget(q, 0.9, n_max, backend="triton"),
        lambda: ias_curve(q, 3, backend="triton"),
        lambda: ias_allocate(q, 50, 3, backend="triton"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="quantiles must not be NaN, got NaN in row 5"):
            call()


def test_curve_gradient() -> None:
    q = make(1, 2).clamp(0.01, 0.99).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ias_curve(x, 3, backend="triton"), (q,))

    def slope(x: Tensor, backend: str) -> Tensor:
        leaf = x.clone().requires_grad_()
        curve = ias_curve(leaf, 5, backend=backend)
        (grad,) = torch.autograd.grad(curve.sum(), leaf)  # an expanded gradient: strides of 0
        return grad

    for x in (torch.tensor([[-0.5, 0.0, 1.0, 1.5, 0.25]]), torch.tensor([[0.25, 0.5]], dtype=torch.bfloat16)):
        torch.testing.assert_close(slope(x, "triton"), slope(x, "reference"))


def test_the_margin_covers_float32() -> None:
    """What the search in float32 may be off by, at the n_max that it is used for."""
    q = torch.cat([make(400, 100, 6, torch.float32), torch.rand(400, 100) * 2.0 ** -torch.arange(400)[:, None] / 2])
    for n in (1, 7, 63, 127):
        single = 1 - q.clamp(0, 1)
        for _ in range((n + 1).bit_length() - 1):
            single = single * single
        exact = (1 - q.double().clamp(0, 1)) ** (1 << ((n + 1).bit_length() - 1))
        error = (single.double().mean(1) - exact.mean(1)).abs().max()
        assert error < tuning.SINGLE_MARGIN * (n + 1) / 2
    assert reference.TOUCH < tuning.SINGLE_MARGIN
