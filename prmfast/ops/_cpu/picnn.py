"""Room picnn on the compiled CPU backend: the extension runs the levels stage, torch the GEMMs of the context stage."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prmfast.kernels.picnn import context as stage
from prmfast.kernels.picnn import tuning
from prmfast.kernels.picnn.params import LevelOptions
from prmfast.ops._cpu._extension import _C

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


@functools.lru_cache(maxsize=256)
def _shape(widths: tuple[int, ...], options: LevelOptions) -> object:
    return _C.picnn.Shape(
        widths=widths,
        leaky_relu=options.activation != "softplus",
        negative_slope=options.negative_slope if options.activation == "leaky_relu" else 0.0,
        square_first=options.square_first,
        relu_gate=options.gate == "relu",
        curvature=options.curvature,
        curvature_floor=options.curvature_floor,
    )


def _arguments(
    rows: Tensor, levels: Tensor, wz: Sequence[Tensor], options: LevelOptions
) -> tuple[tuple[object, ...], list[Tensor]]:
    """The leading arguments of both entry points, and the contiguous tensors that must outlive the call."""
    widths = (*(int(w.shape[1]) for w in wz), 1)
    count, m = levels.shape
    shared = count > 1 and levels.stride(0) == 0
    held = [
        rows.contiguous(),
        levels[:1].contiguous() if shared else levels.contiguous(),
        *(w.contiguous() for w in wz),
    ]
    pointers = [t.data_ptr() for t in held]
    return (_shape(widths, options), pointers[0], pointers[1], 0 if shared else m, pointers[2:], count, m), held


def picnn_levels(
    rows: Tensor, levels: Tensor, wz: Sequence[Tensor], *, options: LevelOptions, tolerance: float, precision: str
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    arguments, _held = _arguments(rows, levels, wz, options)
    value, gradient = levels.new_empty(levels.shape), levels.new_empty(levels.shape)
    run = getattr(_C.picnn, f"forward_{_SUFFIX[levels.dtype]}")
    run(
        *arguments,
        tolerance,
        precision == "bfloat16",
        value.data_ptr(),
        gradient.data_ptr(),
        torch.get_num_threads(),
    )
    return value, gradient


def picnn_levels_backward(
    grads: tuple[Tensor, Tensor], rows: Tensor, levels: Tensor, wz: Sequence[Tensor], *, options: LevelOptions
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """d rows, d levels and d wz of sum(value * grads[0] + gradient * grads[1])."""
    arguments, _held = _arguments(rows, levels, wz, options)
    incoming = [grad.contiguous() for grad in grads]
    d_rows, d_levels = rows.new_empty(rows.shape), levels.new_empty(levels.shape)
    d_wz = [w.new_empty(w.shape) for w in wz]
    run = getattr(_C.picnn, f"backward_{_SUFFIX[levels.dtype]}")
    run(
        *arguments,
        *(t.data_ptr() for t in incoming),
        d_rows.data_ptr(),
        d_levels.data_ptr(),
        [w.data_ptr() for w in d_wz],
        torch.get_num_threads(),
    )
    return d_rows, d_levels, d_wz


def picnn_context(
    context: Tensor, linears: Sequence[Tensor], scales: Sequence[Tensor], *, activations: Sequence[str]
) -> tuple[Tensor, list[Tensor]]:
    """See `prmfast.kernels.picnn.context`."""
    return stage.picnn_context(context, linears, scales, activations=activations, product=_product)


def picnn_context_backward(
    d_rows: Tensor,
    context: Tensor,
    linears: Sequence[Tensor],
    scales: Sequence[Tensor],
    before: Sequence[Tensor],
    *,
    activations: Sequence[str],
    context_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    """See `prmfast.kernels.picnn.context`."""
    options: dict[str, Any] = {"activations": activations, "context_gradient": context_gradient}
    return stage.picnn_context_backward(d_rows, context, linears, scales, before, **options, product=_product)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [m, k] @ b [n, k].T + bias [n]: on AMX tiles where that pays, else torch's."""
    (m, depth), n = a.shape, b.shape[0]
    large = min(m, depth) >= tuning.LEAST_SIDE and m * n * depth >= tuning.LEAST_PRODUCT
    if large and a.dtype == torch.float32 and _C.picnn.has_tiles() and 1 in a.stride() and 1 in b.stride():
        out = a.new_empty(m, n)
        held = None if bias is None else bias.contiguous()
        _C.picnn.gemm(
            *(a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), 0 if held is None else held.data_ptr()),
            *(m, n, depth, out.data_ptr(), torch.get_num_threads()),
        )
        return out
    return stage.torch_product(a, b, bias)
