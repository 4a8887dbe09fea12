"""Contract of the room ias: how many samples a question needs, given quantiles of its success probability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prmfast.ops._backends import load, resolve
from prmfast.ops._contract import FLOATS, Check
from prmfast.ops._library import LIBRARY, implement, once_differentiable

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1

_BUDGET, _CURVE, _ALLOCATE = Check("ias_budget"), Check("ias_curve"), Check("ias_allocate")

LIBRARY.define("ias_budget(Tensor quantiles, Tensor target, int n_max, str backend) -> Tensor")
LIBRARY.define("ias_budget.number(Tensor quantiles, float target, int n_max, str backend) -> Tensor")
LIBRARY.define("ias_curve(Tensor quantiles, int n_max, str backend) -> Tensor")
LIBRARY.define("ias_curve_backward(Tensor grad, Tensor quantiles, str backend) -> Tensor")
LIBRARY.define("ias_allocate(Tensor quantiles, int total, int n_max, int n_min, str backend) -> Tensor")


def _implementation(quantiles: Tensor, backend: str) -> Any:
    return load("ias", resolve("ias", quantiles.device, backend, dtype=quantiles.dtype))


def _check_arguments(check: Check, quantiles: object, n_max: object) -> None:
    """What the dispatcher would not say as well. A small batch is answered sooner than single checks are made."""
    usual = type(quantiles) is Tensor and type(n_max) is int and 1 <= n_max <= _INT32_MAX
    if not usual or quantiles.dtype not in FLOATS or quantiles.ndim != 2:  # type: ignore[attr-defined]
        check.tensor("quantiles", quantiles, ndim=2)
        check.integer("n_max", n_max, low=1, high=_INT32_MAX)


def _check_quantiles(check: Check, quantiles: Tensor, module: Any) -> None:
    if quantiles.shape[1] == 0:
        raise ValueError(f"{check.op}: quantiles must have at least one column, got shape {tuple(quantiles.shape)}")
    if not getattr(module, "FINDS_NAN", False):
        check.no_nan("quantiles", quantiles)


def _check_number(check: Check, target: float) -> None:
    if not 0 < target < 1:
        raise ValueError(f"{check.op}: target must lie in (0, 1), got {target}")


def _check_target(check: Check, quantiles: Tensor, target: Tensor) -> None:
    check.tensor("target", target, ndim=(0, 1))
    if target.ndim == 1:
        check.shape("target", target, (quantiles.shape[0],))
        check.same_device("quantiles", quantiles, target=target)
        if target.numel() == 0:
            return
        least, most = target.aminmax()  # both NaN where one is
        if not (least.item() > 0 and most.item() < 1):
            row = int((~((target > 0) & (target < 1))).nonzero()[0])
            raise ValueError(f"{check.op}: target must lie in (0, 1), got {target[row].item()} in row {row}")
    else:
        _check_number(check, target.item())


def _budget(quantiles: Tensor, target: Tensor, n_max: int, backend: str) -> Tensor:
    module = _implementation(quantiles, backend)
    _check_arguments(_BUDGET, quantiles, n_max)
    _check_quantiles(_BUDGET, quantiles, module)
    _check_target(_BUDGET, quantiles, target)
    out: Tensor = module.ias_budget(quantiles, target.double(), n_max)
    return out


def _budget_number(quantiles: Tensor, target: float, n_max: int, backend: str) -> Tensor:
    module = _implementation(quantiles, backend)
    _check_arguments(_BUDGET, quantiles, n_max)
    _check_quantiles(_BUDGET, quantiles, module)
    _check_number(_BUDGET, target)
    out: Tensor = module.ias_budget(quantiles, target, n_max)
    return out


def _curve(quantiles: Tensor, n_max: int, backend: str) -> Tensor:
    module = _implementation(quantiles, backend)
    _check_arguments(_CURVE, quantiles, n_max)
    _check_quantiles(_CURVE, quantiles, module)
    out: Tensor = module.ias_curve(quantiles, n_max)
    return out


def _curve_backward(grad: Tensor, quantiles: Tensor, backend: str) -> Tensor:
    out: Tensor = _implementation(quantiles, backend).ias_curve_backward(grad, quantiles)
    return out


def _allocate(quantiles: Tensor, total: int, n_max: int, n_min: int, backend: str) -> Tensor:
    module = _implementation(quantiles, backend)
    _check_arguments(_ALLOCATE, quantiles, n_max)
    _check_quantiles(_ALLOCATE, quantiles, module)
    _ALLOCATE.integer("n_min", n_min, low=0, high=n_max)
    _ALLOCATE.integer("total", total, low=0, high=_INT64_MAX)
    needed = quantiles.shape[0] * n_min
    if total < needed:
        raise ValueError(f"ias_allocate: total must be >= B * n_min = {needed}, got {total}")
    out: Tensor = module.ias_allocate(quantiles, total, n_max, n_min)
    return out


implement("ias_budget", _budget)
implement("ias_budget.number", _budget_number)
implement("ias_curve", _curve)
implement("ias_curve_backward", _curve_backward)
implement("ias_allocate", _allocate)


@torch.library.register_fake("prmfast::ias_budget", lib=LIBRARY)
def _budget_fake(quantiles: Tensor, target: Tensor, n_max: int, backend: str) -> Tensor:
    return quantiles.new_empty(quantiles.shape[0], dtype=torch.int32)


@torch.library.register_fake("prmfast::ias_budget.number", lib=LIBRARY)
def _budget_number_fake(quantiles: Tensor, target: float, n_max: int, backend: str) -> Tensor:
    return quantiles.new_empty(quantiles.shape[0], dtype=torch.int32)


@torch.library.register_fake("prmfast::ias_curve", lib=LIBRARY)
def _curve_fake(quantiles: Tensor, n_max: int, backend: str) -> Tensor:
    dtype = torch.float64 if quantiles.dtype == torch.float64 else torch.float32
    return quantiles.new_empty(quantiles.shape[0], n_max, dtype=dtype)


@torch.library.register_fake("prmfast::ias_curve_backward", lib=LIBRARY)
def _curve_backward_fake(grad: Tensor, quantiles: Tensor, backend: str) -> Tensor:
    return quantiles.new_empty(quantiles.shape)


@torch.library.register_fake("prmfast::ias_allocate", lib=LIBRARY)
def _allocate_fake(quantiles: Tensor, total: int, n_max: int, n_min: int, backend: str) -> Tensor:
    return quantiles.new_empty(quantiles.shape[0], dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    quantiles, _, ctx.backend = inputs
    ctx.save_for_backward(quantiles)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (quantiles,) = ctx.saved_tensors
    return torch.ops.prmfast.ias_curve_backward(grad, quantiles, ctx.backend), None, None


torch.library.register_autograd("prmfast::ias_curve", _backward, setup_context=_setup_context, lib=LIBRARY)
once_differentiable("ias_curve", "ias_curve_backward")


def ias_budget(quantiles: Tensor, target: float | Tensor, n_max: int, *, backend: str = "auto") -> Tensor:
    """Equals ``1 + (ias_curve(quantiles, n_max)[:, :-1] < target).sum(1)`` without the [B, n_max] table.

    The smallest N with S(N) = mean_m[1 - (1 - p_m)^N] >= target, n_max if there is none: [D] arXiv 2605.06785 eq. 5,
    and eq. 4 with M = 1. Computed in float64; S(N) >= target - 1e-12 counts as reached, so that no backend's order of
    summation decides where the curve touches the target.

    Args:
        quantiles: [B, M] float32 | float64 | float16 | bfloat16, equally weighted quantiles (or samples) of each
            question's success probability; clipped to [0, 1]. p <= 0 never succeeds, p >= 1 succeeds at N = 1. Rows
            may be strided.
        target: wanted success probability C in (0, 1): a number, or a tensor [] or [B].
        n_max: largest budget, >= 1.
        backend: "auto" | "reference" | "cpu" | "triton" | "cuda".

    Returns:
        int32 [B] in [1, n_max]; not differentiable.

    Raises:
        TypeError: a dtype or kind that is not accepted. ValueError: a NaN (named by its row), a target outside (0, 1),
            a shape that does not fit. RuntimeError: a backend that is missing here.
    """
    _check_arguments(_BUDGET, quantiles, n_max)
    out: Tensor
    if type(target) is Tensor or isinstance(target, Tensor):
        out = torch.ops.prmfast.ias_budget.default(quantiles, target, n_max, backend)
    else:
        out = torch.ops.prmfast.ias_budget.number(
            quantiles, _BUDGET.number("target", target, kind="a number or a torch.Tensor"), n_max, backend
        )
    return out


def ias_curve(quantiles: Tensor, n_max: int, *, backend: str = "auto") -> Tensor:
    """Equals ``(1 - (1 - quantiles[:, None])**torch.arange(1, n_max + 1)[:, None]).mean(2)``, no [B, n_max, M] tensor.

    S(N), the probability that at least one of N samples is right, for N = 1..n_max ([D] eq. 5's left side). Computed in
    float64 and monotone in N as returned.

    Args:
        quantiles: [B, M] float32 | float64 | float16 | bfloat16, clipped to [0, 1]. Rows may be strided.
        n_max: number of columns, >= 1.
        backend: "auto" | "reference" | "cpu" | "triton" | "cuda".

    Returns:
        [B, n_max] in the quantiles' dtype, float32 for the half types. Differentiable once in the quantiles:
        dS(N)/dp_m = N (1 - p_m)^(N-1) / M for 0 < p_m < 1, and 0 elsewhere.

    Raises:
        As `ias_budget`.
    """
    _check_arguments(_CURVE, quantiles, n_max)
    out: Tensor = torch.ops.prmfast.ias_curve.default(quantiles, n_max, backend)
    return out


def ias_allocate(quantiles: Tensor, total: int, n_max: int, *, n_min: int = 0, backend: str = "auto") -> Tensor:
    """Maximises ``sum_i S_i(N_i)`` over integers n_min <= N_i <= n_max that sum to ``min(total, B * n_max)``.

    S_i is concave, so serving the largest marginal gain E[p (1 - p)^N] again and again is optimal. Ties go to the lower
    row; samples that help nobody are still handed out, lower rows first. Gains are computed in float64 and compared by
    their first 40 mantissa bits, so that all backends see the same ties.

    Args:
        quantiles: [B, M] float32 | float64 | float16 | bfloat16, clipped to [0, 1]. Rows may be strided.
        total: samples to hand out, >= B * n_min.
        n_max: most samples of one question, >= 1.
        n_min: fewest samples of one question, in [0, n_max].
        backend: "auto" | "reference" | "cpu" | "triton" | "cuda".

    Returns:
        int32 [B]; not differentiable.

    Raises:
        As `ias_budget`.
    """
    _check_arguments(_ALLOCATE, quantiles, n_max)
    for name, value in (("total", total), ("n_min", n_min)):
        _ALLOCATE.integer(name, value, low=0)
    out: Tensor = torch.ops.prmfast.ias_allocate.default(quantiles, total, n_max, n_min, backend)
    return out
