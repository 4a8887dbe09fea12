"""Room ias in Triton: one launch, and one read of a flag that tells of NaN.

Inside a CUDA graph nothing may wait for the device, so a captured call does not look at the flag.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from prmfast.kernels.common.errors import nan_error
from prmfast.kernels.common.launch import POINTERS, Variant, check_device, pointers_of
from prmfast.kernels.ias import triton_kernels as kernels
from prmfast.kernels.ias import tuning
from prmfast.kernels.ias.reference import KEY_SHIFT, TOUCH

__all__ = ["FINDS_NAN", "ias_allocate", "ias_budget", "ias_curve", "ias_curve_backward", "variants"]

FINDS_NAN = True
_NOBODY = 2**31 - 1
_FLOATS = (torch.float32, torch.float64)
_TABLE = {"BLOCK_ROWS": tuning.TABLE_ROWS, "LOW": tuning.TABLE_LOW, "HIGH": tuning.TABLE_HIGH}


class _Rows:
    """Quantiles with contiguous columns, and the flag that kernels lower to the first row with a NaN."""

    def __init__(self, quantiles: Tensor) -> None:
        check_device([quantiles])
        if quantiles.dtype not in _FLOATS:
            quantiles = quantiles.float()
        self.held = quantiles if quantiles.stride(1) == 1 or quantiles.shape[1] == 1 else quantiles.contiguous()
        self.rows, self.columns = quantiles.shape
        self.device = torch.cuda.device_of(quantiles)  # where a launch goes; nothing for CPU tensors
        self.nan_row = torch.full((1,), _NOBODY, dtype=torch.int32, device=quantiles.device)

    def no_nan(self, op: str) -> None:
        if self.nan_row.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        row = int(self.nan_row)
        if row != _NOBODY:
            raise nan_error(op, "quantiles", row)


def _budget_constants(columns: int, n_max: int, single: bool) -> dict[str, Any] | None:
    """Of the kernel whose rows stay in registers; None where they do not."""
    width = triton.next_power_of_2(columns)
    bits = next((bits for bits in tuning.BUDGET_BITS if n_max <= 1 << bits), None)
    if bits is None or width > tuning.BUDGET_ELEMENTS:
        return None
    rows = tuning.BUDGET_ELEMENTS // width
    return {"BITS": bits, "BLOCK_ROWS": rows, "BLOCK_COLUMNS": width, "SINGLE": single}


def ias_budget(quantiles: Tensor, target: Tensor | float, n_max: int) -> Tensor:
    """See the reference."""
    q = _Rows(quantiles)
    budget = torch.empty(q.rows, dtype=torch.int32, device=quantiles.device)
    if q.rows == 0:
        return budget
    if not isinstance(target, Tensor):
        target = torch.full((), target, dtype=torch.float64, device=quantiles.device)
    wanted = target.to(quantiles.device).expand(q.rows)
    constants = _budget_constants(q.columns, n_max, quantiles.dtype != torch.float64)
    strides = (q.held.stride(0), wanted.stride(0))
    if constants is not None:
        grid = (triton.cdiv(q.rows, constants["BLOCK_ROWS"]),)
        with q.device:
            kernels.budget_kernel[grid](
                *(q.held, wanted, budget, q.nan_row, q.rows, q.columns, *strides, n_max - 1),
                *(tuning.SINGLE_MARGIN * n_max, TOUCH),
                **constants,
                num_warps=tuning.BUDGET_WARPS,
            )
    else:
        with q.device:
            kernels.budget_long_kernel[(q.rows,)](
                *(q.held, wanted, budget, q.nan_row, q.columns, *strides, n_max - 1),
                *(1 << max(0, (n_max - 1).bit_length() - 1), TOUCH),
                BLOCK_COLUMNS=tuning.LONG_COLUMNS,
                num_warps=tuning.LONG_WARPS,
            )
    q.no_nan("ias_budget")
    return budget


def ias_curve(quantiles: Tensor, n_max: int) -> Tensor:
    """See the reference."""
    q = _Rows(quantiles)
    dtype = torch.float64 if quantiles.dtype == torch.float64 else torch.float32
    curve = torch.empty(q.rows, n_max, dtype=dtype, device=quantiles.device)
    if q.rows:
        with q.device:
            kernels.curve_kernel[(triton.cdiv(q.rows, tuning.TABLE_ROWS),)](
                *(q.held, curve, q.nan_row, q.rows, q.columns, q.held.stride(0), n_max),
                **_TABLE,
                num_warps=tuning.TABLE_WARPS,
            )
        q.no_nan("ias_curve")
    return curve


def ias_curve_backward(grad: Tensor, quantiles: Tensor) -> Tensor:
    """See the reference."""
    q = _Rows(quantiles)
    out = torch.empty(quantiles.shape, dtype=q.held.dtype, device=quantiles.device)
    rows, columns = quantiles.shape
    if rows:
        grid = (rows, triton.cdiv(columns, tuning.SLOPE_ELEMENTS))
        with q.device:
            kernels.slope_kernel[grid](
                *(grad, q.held, out, columns, *q.held.stride(), *grad.stride(), grad.shape[1]),
                BLOCK=tuning.SLOPE_ELEMENTS,
                num_warps=tuning.SLOPE_WARPS,
            )
    return out.to(quantiles.dtype)


def ias_allocate(quantiles: Tensor, total: int, n_max: int, n_min: int) -> Tensor:
    """See the reference: a table of gains by a kernel, and a stable sort of it."""
    q, room = _Rows(quantiles), n_max - n_min
    left = min(total - q.rows * n_min, q.rows * room)
    keys = torch.empty(q.rows, room, dtype=torch.int64, device=quantiles.device)
    if q.rows and room:
        with q.device:
            kernels.gain_kernel[(triton.cdiv(q.rows, tuning.TABLE_ROWS),)](
                *(q.held, keys, q.nan_row, q.rows, q.columns, q.held.stride(0), n_min, room),
                SHIFT=KEY_SHIFT,
                **_TABLE,
                num_warps=tuning.TABLE_WARPS,
            )
        q.no_nan("ias_allocate")
    served = torch.sort(keys.flatten(), descending=True, stable=True).indices[:left]
    more = torch.bincount(served // max(room, 1), minlength=q.rows)
    return (n_min + more).to(torch.int32)


def variants() -> Iterator[Variant]:
    """Everything that is launched, at one width of the search where that only sets the shape of its tile."""
    rows = {"quantiles_ptr": "*fp32", "nan_row_ptr": "*i32", "columns": "i32", "row_stride": "i64"}
    search = {"target_ptr": "*fp64", "budget_ptr": "*i32", "target_stride": "i64", "last": "i32", "touch": "fp64"}
    short = {**rows, **search, "rows": "i32", "margin": "fp32"}
    curve = {**rows, "rows": "i32", "n_max": "i32"}
    table = {"num_warps": tuning.TABLE_WARPS}
    for dtype in _FLOATS:
        pointer, wide = POINTERS[dtype], dtype == torch.float64
        q = {"quantiles_ptr": pointer}
        for columns, n_max in ((1, 64), (100, 64), (100, 128), (tuning.BUDGET_ELEMENTS, 64))[: 1 if wide else 4]:
            constants = _budget_constants(columns, n_max, not wide)
            assert constants is not None
            yield _variant(kernels.budget_kernel, short | q, constants, num_warps=tuning.BUDGET_WARPS)
        long = {**rows, **search, **q, "highest": "i32"}
        columns_ = {"BLOCK_COLUMNS": tuning.LONG_COLUMNS}
        yield _variant(kernels.budget_long_kernel, long, columns_, num_warps=tuning.LONG_WARPS)
        yield _variant(kernels.curve_kernel, {**curve, **q, "curve_ptr": pointer}, _TABLE, **table)
        gains = {**rows, **q, "key_ptr": "*i64", "rows": "i32", "n_min": "i32", "room": "i32"}
        yield _variant(kernels.gain_kernel, gains, {"SHIFT": KEY_SHIFT, **_TABLE}, **table)
        strides = dict.fromkeys(("row_stride", "column_stride", "grad_row_stride", "grad_column_stride"), "i64")
        slope = {"grad_ptr": pointer, **q, "out_ptr": pointer, "columns": "i32", "n_max": "i32", **strides}
        yield _variant(kernels.slope_kernel, slope, {"BLOCK": tuning.SLOPE_ELEMENTS}, num_warps=tuning.SLOPE_WARPS)


def _variant(kernel: Any, types: dict[str, str], constants: dict[str, Any], *, num_warps: int) -> Variant:
    return Variant(kernel, types, constants, num_warps=num_warps, aligned=pointers_of(types))
