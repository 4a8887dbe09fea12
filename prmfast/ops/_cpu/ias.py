"""Room ias on the compiled CPU backend. It meets every NaN on its way and raises then: no check before."""

from __future__ import annotations

import torch
from torch import Tensor

from prmfast.kernels.common.errors import nan_error
from prmfast.kernels.ias.reference import ias_curve_backward
from prmfast.ops._cpu._extension import _C

__all__ = ["FINDS_NAN", "ias_allocate", "ias_budget", "ias_curve", "ias_curve_backward"]

FINDS_NAN = True
_BUDGET = {torch.float32: _C.ias.budget_f32, torch.float64: _C.ias.budget_f64}
_BUDGET_AT = {torch.float32: _C.ias.budget_at_f32, torch.float64: _C.ias.budget_at_f64}
_CURVE = {torch.float32: _C.ias.curve_f32, torch.float64: _C.ias.curve_f64}
_ALLOCATE = {torch.float32: _C.ias.allocate_f32, torch.float64: _C.ias.allocate_f64}


def _rows(quantiles: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Quantiles as float32 or float64 with contiguous columns; (pointer, B, M, row stride)."""
    if quantiles.dtype not in _CURVE:
        quantiles = quantiles.float()
    stride, step = quantiles.stride()
    if step != 1:
        quantiles = quantiles.contiguous()
        stride = quantiles.stride(0)
    rows, columns = quantiles.shape
    return quantiles, (quantiles.data_ptr(), rows, columns, stride)


def _no_nan(op: str, row: int) -> None:
    if row >= 0:
        raise nan_error(op, "quantiles", row)


def ias_budget(quantiles: Tensor, target: Tensor | float, n_max: int) -> Tensor:
    """See the reference."""
    held, view = _rows(quantiles)
    out = held.new_empty(view[1], dtype=torch.int32)
    threads = torch.get_num_threads()
    if isinstance(target, float):
        bad = _BUDGET_AT[held.dtype](*view, target, n_max, out.data_ptr(), threads)
    else:
        wanted = target.double()
        stride = wanted.stride(0) if wanted.ndim else 0
        bad = _BUDGET[held.dtype](*view, wanted.data_ptr(), stride, n_max, out.data_ptr(), threads)
    _no_nan("ias_budget", bad)
    return out


def ias_curve(quantiles: Tensor, n_max: int) -> Tensor:
    """See the reference."""
    held, view = _rows(quantiles)
    out = held.new_empty(view[1], n_max)
    _no_nan("ias_curve", _CURVE[held.dtype](*view, n_max, out.data_ptr(), torch.get_num_threads()))
    return out


def ias_allocate(quantiles: Tensor, total: int, n_max: int, n_min: int) -> Tensor:
    """See the reference."""
    held, view = _rows(quantiles)
    out = held.new_empty(view[1], dtype=torch.int32)
    bad = _ALLOCATE[held.dtype](*view, total, n_max, n_min, out.data_ptr(), torch.get_num_threads())
    _no_nan("ias_allocate", bad)
    return out
