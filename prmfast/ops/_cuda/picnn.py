"""Room picnn on the compiled CUDA backend: the extension runs the levels stage on tensor cores.

The backward pass of that stage is the Triton backend's, the context stage torch's GEMMs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prmfast.kernels.common.rows import contiguous_columns
from prmfast.kernels.picnn import reference
from prmfast.kernels.picnn.context import picnn_context, picnn_context_backward
from prmfast.kernels.picnn.params import LevelOptions
from prmfast.ops._cuda._extension import _C, stream_of

__all__ = [
    "KERNELS",
    "network_of",
    "picnn_context",
    "picnn_context_backward",
    "picnn_levels",
    "picnn_levels_backward",
    "stream_of",
]

KERNELS: Any = _C.cuda.picnn


@functools.lru_cache(maxsize=256)
def network_of(widths: tuple[int, ...], options: LevelOptions) -> Any:
    """The extension's description of a network; ValueError for one that is too wide or too deep for the registers."""
    return KERNELS.Network(
        widths=widths,
        softplus=options.activation == "softplus",
        negative_slope=options.negative_slope if options.activation == "leaky_relu" else 0.0,
        square_first=options.square_first,
        relu_gate=options.gate == "relu",
        curvature=options.curvature,
        curvature_floor=options.curvature_floor,
    )


def picnn_levels(
    rows: Tensor, levels: Tensor, wz: Sequence[Tensor], *, options: LevelOptions, tolerance: float, precision: str
) -> tuple[Tensor, Tensor]:
    """See the reference, which float64 is left to; rows of many levels may be interpolated within ``tolerance``."""
    if levels.dtype == torch.float64:
        return reference.picnn_levels(rows, levels, wz, options=options, tolerance=tolerance, precision=precision)
    widths = (*(int(w.shape[1]) for w in wz), 1)
    rows, levels, weights = contiguous_columns(rows), contiguous_columns(levels), [w.contiguous() for w in wz]
    value, gradient = (torch.empty(levels.shape, dtype=torch.float32, device=rows.device) for _ in range(2))
    with stream_of(rows) as stream:
        KERNELS.forward(
            network=network_of(widths, options),
            wz=[w.data_ptr() for w in weights],
            rows=rows.data_ptr(),
            row_stride=rows.stride(0),
            levels=levels.data_ptr(),
            level_stride=levels.stride(0),
            count=levels.shape[0],
            m=levels.shape[1],
            tolerance=tolerance,
            split=precision != "bfloat16",
            value=value.data_ptr(),
            gradient=gradient.data_ptr(),
            stream=stream,
        )
    return value, gradient


def picnn_levels_backward(
    grads: tuple[Tensor, Tensor], rows: Tensor, levels: Tensor, wz: Sequence[Tensor], *, options: LevelOptions
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """d rows, d levels and d wz of sum(value * grads[0] + gradient * grads[1])."""
    from prmfast.kernels.picnn import triton_impl

    return triton_impl.picnn_levels_backward(grads, rows, levels, wz, options=options)
