"""What every loss is held to: recorded values and gradients, and the laws of padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.vectors import assert_relative

RTOL = {torch.float32: 1e-5, torch.float64: 1e-9}
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
Loss = Callable[[Tensor], Tensor]


def value_and_grad(loss: Loss, x: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    leaf = x.detach().to(dtype).requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def assert_recorded(loss: Loss, x: Tensor, value: Tensor, grad: Tensor, dtype: torch.dtype) -> None:
    found, slope = value_and_grad(loss, x, dtype)
    assert found.dtype == slope.dtype == dtype
    assert_relative(found.double(), value.double(), RTOL[dtype])
    assert_relative(slope.double(), grad.double(), RTOL[dtype])


def assert_finite(loss: Loss, x: Tensor) -> None:
    """Finite in every dtype, and float32 within 1e-5 of float64."""
    truth, slope = value_and_grad(loss, x.float().double())
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        value, grad = value_and_grad(loss, x, dtype)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert grad.dtype == dtype
        assert bool(torch.isfinite(value))
        assert bool(torch.isfinite(grad).all())
        if dtype == torch.float32:
            assert_relative(value.double(), truth, 1e-5)
            assert_relative(grad.double(), slope, 1e-5)


def assert_padding_is_nothing(make: Callable[[Tensor], Tensor], x: Tensor, padding: Tensor) -> None:
    """NaN, infinities and huge numbers in ``padding`` change neither the value nor a gradient, and get gradient 0."""
    value, grad = value_and_grad(make, torch.where(padding, 0.0, x))
    assert bool((grad[padding] == 0).all())
    for junk in (float("nan"), float("inf"), -float("inf"), 1e300):
        again, slope = value_and_grad(make, torch.where(padding, junk, x))
        assert torch.equal(value, again)
        assert torch.equal(grad, slope)
