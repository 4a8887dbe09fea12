"""The closed-form derivatives of the losses are what autograd finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prmfast.calibration import objectives

Loss = Callable[[Tensor], Tensor]


def both(loss: Loss, gradient: Loss, at: Tensor) -> tuple[Tensor, Tensor]:
    leaf = at.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    return gradient(at), expected


def quantiles(rows: int = 7, count: int = 8) -> Tensor:
    inside = torch.rand(rows, count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inside[0, :4] = torch.tensor([-0.2, 0.0, 1.0, 1.3])  # held at the bounds of the likelihood
    return inside


def test_pinball() -> None:
    q = quantiles()
    levels = torch.rand(7, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    target = q[:, 2].clone()  # ties: where a quantile meets its target
    found, expected = both(
        lambda x: objectives.pinball(x, target, levels),
        lambda x: objectives.pinball_gradient(x, target, levels),
        q,
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("trials", [1, 8, 64])
def test_binomial(trials: int) -> None:
    n = torch.full((7,), float(trials), dtype=torch.float64)
    k = (n * torch.linspace(0, 1, 7, dtype=torch.float64)).round()
    found, expected = both(
        lambda x: objectives.binomial_nll(x, k, n), lambda x: objectives.binomial_nll_gradient(x, k, n), quantiles()
    )
    torch.testing.assert_close(found, expected)


def test_dual() -> None:
    mapped, levels = quantiles(), torch.rand(7, 8, dtype=torch.float64)
    found, expected = both(
        lambda x: objectives.dual_map_loss(x**3, x, levels),
        lambda x: objectives.dual_map_gradient(3 * x**2, levels),
        mapped,
    )
    torch.testing.assert_close(found, expected)
    values = torch.rand(7, 9, dtype=torch.float64)
    found, expected = both(
        lambda f: objectives.dual_conjugate_loss(f[:, :1], f[:, 1:]),
        lambda f: objectives.dual_conjugate_gradient(f[:, :1], f[:, 1:]),
        values,
    )
    torch.testing.assert_close(found, expected)
