"""Room ias on the compiled CPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

from prmfast.kernels.ias.reference import ias_curve_backward
from prmfast.ops._cpu._extension import _C

__all__ = ["ias_allocate", "ias_budget", "ias_curve", "ias_curve_backward"]


def _rows(quantiles: Tensor) -> tuple[Tensor, str, tuple[int, int, int, int]]:
    """Quantiles as float32 or float64, columns contiguous; the entry points' suffix; (pointer, B, M, row stride)."""
    if quantiles.dtype not in (torch.float32, torch.float64):
        quantiles = quantiles.float()
    if quantiles.stride(1) != 1:
        quantiles = quantiles.contiguous()
    suffix = "f64" if quantiles.dtype == torch.float64 else "f32"
    rows, columns = quantiles.shape
    return quantiles, suffix, (quantiles.data_ptr(), rows, columns, quantiles.stride(0))


def ias_budget(quantiles: Tensor, target: Tensor, n_max: int) -> Tensor:
    """See the reference."""
    held, suffix, view = _rows(quantiles)
    wanted = target.double()
    out = held.new_empty(len(held), dtype=torch.int32)
    run = getattr(_C.ias, f"budget_{suffix}")
    run(
        *view, wanted.data_ptr(), wanted.stride(0) if wanted.ndim else 0, n_max, out.data_ptr(), torch.get_num_threads()
    )
    return out


def ias_curve(quantiles: Tensor, n_max: int) -> Tensor:
    """See the reference."""
    held, suffix, view = _rows(quantiles)
    out = held.new_empty(len(held), n_max)
    getattr(_C.ias, f"curve_{suffix}")(*view, n_max, out.data_ptr(), torch.get_num_threads())
    return out


def ias_allocate(quantiles: Tensor, total: int, n_max: int, n_min: int) -> Tensor:
    """See the reference."""
    held, suffix, view = _rows(quantiles)
    out = held.new_empty(len(held), dtype=torch.int32)
    getattr(_C.ias, f"allocate_{suffix}")(*view, total, n_max, n_min, out.data_ptr(), torch.get_num_threads())
    return out
