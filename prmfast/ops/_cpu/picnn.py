"""Room picnn on the compiled CPU backend."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from prmfast.ops._cpu._extension import _C

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


@functools.lru_cache(maxsize=256)
def _shape(widths: tuple[int, ...], activation: str, negative_slope: float, square_first: bool) -> object:
    slope = negative_slope if activation == "leaky_relu" else 0.0
    return _C.picnn.Shape(widths, 0 if activation == "softplus" else 1, slope, square_first)


def _arguments(
    coefficients: Tensor, levels: Tensor, wz: list[Tensor], activation: str, negative_slope: float, square_first: bool
) -> tuple[tuple[object, ...], list[Tensor]]:
    """The leading arguments of both entry points, and the contiguous tensors that must outlive the call."""
    widths = (*(int(w.shape[1]) for w in wz), 1)
    shared = levels.shape[0] > 1 and levels.stride(0) == 0
    held = [
        coefficients.contiguous(),
        levels[:1].contiguous() if shared else levels.contiguous(),
        *(w.contiguous() for w in wz),
    ]
    rows, m = levels.shape
    shape = _shape(widths, activation, negative_slope, square_first)
    pointers = [t.data_ptr() for t in held]
    return (shape, pointers[0], pointers[1], 0 if shared else m, pointers[2:], rows, m), held


def picnn_levels(
    coefficients: Tensor,
    levels: Tensor,
    wz: list[Tensor],
    *,
    activation: str,
    negative_slope: float,
    square_first: bool,
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    arguments, _held = _arguments(coefficients, levels, wz, activation, negative_slope, square_first)
    value, gradient = torch.empty_like(levels, memory_format=torch.contiguous_format), levels.new_empty(levels.shape)
    run = getattr(_C.picnn, f"forward_{_SUFFIX[levels.dtype]}")
    run(*arguments, value.data_ptr(), gradient.data_ptr(), torch.get_num_threads())
    return value, gradient


def picnn_levels_backward(
    grad_value: Tensor,
    grad_gradient: Tensor,
    coefficients: Tensor,
    levels: Tensor,
    wz: list[Tensor],
    *,
    activation: str,
    negative_slope: float,
    square_first: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See the reference."""
    arguments, _held = _arguments(coefficients, levels, wz, activation, negative_slope, square_first)
    incoming = [grad_value.contiguous(), grad_gradient.contiguous()]
    d_coefficients = coefficients.new_empty(coefficients.shape)
    d_levels = levels.new_empty(levels.shape)
    d_wz = [w.new_empty(w.shape) for w in wz]
    run = getattr(_C.picnn, f"backward_{_SUFFIX[levels.dtype]}")
    run(
        *arguments,
        *(t.data_ptr() for t in incoming),
        d_coefficients.data_ptr(),
        d_levels.data_ptr(),
        [w.data_ptr() for w in d_wz],
        torch.get_num_threads(),
    )
    return d_coefficients, d_levels, d_wz
