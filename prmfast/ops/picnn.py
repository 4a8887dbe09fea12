"""Contract of the room picnn: value and input gradient of a PICNN at many levels per context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prmfast.kernels.picnn import reference
from prmfast.kernels.picnn.params import (
    ACTIVATIONS,
    CONTEXT_ACTIVATIONS,
    GATES,
    CoefficientLayout,
    LevelOptions,
    PicnnParams,
)
from prmfast.kernels.picnn.reference import context_stage
from prmfast.ops._backends import load, resolve
from prmfast.ops._contract import FLOATS, Check
from prmfast.ops._library import LIBRARY

_HALVES = (torch.float16, torch.bfloat16)
_N_OPTIONS = len(LevelOptions._fields)
_OPTIONS = "str activation, float negative_slope, bool square_first, str gate, bool curvature, float curvature_floor"

_NO_ACTIVATION = "none"

TOLERANCE = 1e-5
"""Interpolated rows: the estimated error of the gradient over its mean magnitude in the row is below this."""

LIBRARY.define(
    f"picnn_levels(Tensor rows, Tensor levels, Tensor[] wz, {_OPTIONS}, float tolerance, str backend) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "picnn_levels_backward(Tensor grad_value, Tensor grad_gradient, Tensor rows, Tensor levels, Tensor[] wz, "
    f"{_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor[])"
)
LIBRARY.define(
    "picnn_network(Tensor context, Tensor levels, Tensor[] linears, Tensor[] scales, Tensor[] wz, str activations, "
    f"{_OPTIONS}, float tolerance, str backend) -> (Tensor, Tensor, Tensor, Tensor[])"
)
LIBRARY.define(
    "picnn_network_backward(Tensor grad_value, Tensor grad_gradient, Tensor context, Tensor levels, Tensor[] linears, "
    "Tensor[] scales, Tensor[] wz, Tensor rows, Tensor[] before, str activations, bool context_gradient, "
    f"{_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor[], Tensor[])"
)


def _names(activations: str) -> list[str]:
    """The encoder's activations from how the schema carries them: one word a layer, joined by commas."""
    return activations.split(",") if activations else []


def _implementation(tensor: Tensor, backend: str) -> Any:
    return load("picnn", resolve("picnn", tensor.device, backend))


def _levels(rows: Tensor, levels: Tensor, wz: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    *options, tolerance, backend = rest
    value, gradient = _implementation(levels, backend).picnn_levels(
        rows, levels, wz, options=LevelOptions(*options), tolerance=tolerance
    )
    return value, gradient


def _levels_backward(
    grad_value: Tensor, grad_gradient: Tensor, rows: Tensor, levels: Tensor, wz: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *options, backend = rest
    d_rows, d_levels, d_wz = _implementation(levels, backend).picnn_levels_backward(
        (grad_value, grad_gradient), rows, levels, wz, options=LevelOptions(*options)
    )
    return d_rows, d_levels, d_wz


def _network(
    context: Tensor, levels: Tensor, linears: list[Tensor], scales: list[Tensor], wz: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    activations, *options, tolerance, backend = rest
    implementation = _implementation(levels, backend)
    rows, before = implementation.picnn_context(context, linears, scales, activations=_names(activations))
    value, gradient = implementation.picnn_levels(rows, levels, wz, options=LevelOptions(*options), tolerance=tolerance)
    return value, gradient, rows, before


def _network_backward(
    grad_value: Tensor,
    grad_gradient: Tensor,
    context: Tensor,
    levels: Tensor,
    linears: list[Tensor],
    scales: list[Tensor],
    wz: list[Tensor],
    rows: Tensor,
    before: list[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    activations, context_gradient, *options, backend = rest
    implementation = _implementation(levels, backend)
    d_rows, d_levels, d_wz = implementation.picnn_levels_backward(
        (grad_value, grad_gradient), rows, levels, wz, options=LevelOptions(*options)
    )
    d_context, d_linears = implementation.picnn_context_backward(
        d_rows, context, linears, scales, before, activations=_names(activations), context_gradient=context_gradient
    )
    return d_context, d_levels, d_linears, d_wz


for _name, _function in (
    ("picnn_levels", _levels),
    ("picnn_levels_backward", _levels_backward),
    ("picnn_network", _network),
    ("picnn_network_backward", _network_backward),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("prmfast::picnn_levels", lib=LIBRARY)
def _levels_fake(rows: Tensor, levels: Tensor, wz: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return levels.new_empty(levels.shape), levels.new_empty(levels.shape)


@torch.library.register_fake("prmfast::picnn_levels_backward", lib=LIBRARY)
def _levels_backward_fake(
    grad_value: Tensor, grad_gradient: Tensor, rows: Tensor, levels: Tensor, wz: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return rows.new_empty(rows.shape), levels.new_empty(levels.shape), _empty_like(wz)


@torch.library.register_fake("prmfast::picnn_network", lib=LIBRARY)
def _network_fake(
    context: Tensor, levels: Tensor, linears: list[Tensor], scales: list[Tensor], wz: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    *encoder, last = (context.new_empty(context.shape[0], weight.shape[0]) for weight in linears[::2])
    return levels.new_empty(levels.shape), levels.new_empty(levels.shape), last, encoder


@torch.library.register_fake("prmfast::picnn_network_backward", lib=LIBRARY)
def _network_backward_fake(
    grad_value: Tensor,
    grad_gradient: Tensor,
    context: Tensor,
    levels: Tensor,
    linears: list[Tensor],
    scales: list[Tensor],
    wz: list[Tensor],
    rows: Tensor,
    before: list[Tensor],
    activations: str,
    context_gradient: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    d_context = context.new_empty(context.shape if context_gradient else (0,))
    return d_context, levels.new_empty(levels.shape), _empty_like(linears), _empty_like(wz)


def _empty_like(tensors: list[Tensor]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors]


def _levels_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    rows, levels, wz, *options, _, backend = inputs
    ctx.save_for_backward(rows, levels, *wz)
    ctx.options = (*options, backend)


def _levels_autograd(ctx: Any, grad_value: Tensor, grad_gradient: Tensor) -> tuple[Any, ...]:
    rows, levels, *wz = ctx.saved_tensors
    grads = torch.ops.prmfast.picnn_levels_backward(grad_value, grad_gradient, rows, levels, wz, *ctx.options)
    return (*grads, *[None] * (_N_OPTIONS + 2))


def _network_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    context, levels, linears, scales, wz, activations, *options, _, backend = inputs
    _, _, rows, before = output
    ctx.mark_non_differentiable(rows, *before)
    ctx.set_materialize_grads(True)
    ctx.sizes = len(linears), len(scales), len(wz)
    ctx.save_for_backward(context, levels, rows, *linears, *scales, *wz, *before)
    ctx.activations, ctx.options = activations, (*options, backend)


def _network_autograd(ctx: Any, grad_value: Tensor, grad_gradient: Tensor, *_: Any) -> tuple[Any, ...]:
    context, levels, rows, *rest = ctx.saved_tensors
    parts = []
    for size in ctx.sizes:
        parts.append(rest[:size])
        rest = rest[size:]
    linears, scales, wz = parts
    d_context, d_levels, d_linears, d_wz = torch.ops.prmfast.picnn_network_backward(
        grad_value,
        grad_gradient,
        context,
        levels,
        linears,
        scales,
        wz,
        rows,
        rest,
        ctx.activations,
        ctx.needs_input_grad[0],
        *ctx.options,
    )
    d_context = d_context if ctx.needs_input_grad[0] else None
    return d_context, d_levels, d_linears, [None] * len(scales), d_wz, *[None] * (_N_OPTIONS + 3)


torch.library.register_autograd("prmfast::picnn_levels", _levels_autograd, setup_context=_levels_setup, lib=LIBRARY)
torch.library.register_autograd("prmfast::picnn_network", _network_autograd, setup_context=_network_setup, lib=LIBRARY)


def picnn_map(
    params: PicnnParams,
    context: Tensor,
    levels: Tensor,
    *,
    encoder_scale: Sequence[Tensor] = (),
    tolerance: float = TOLERANCE,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Equals ``g(x, h)`` and ``torch.autograd.grad(g.sum(), x)`` at every level x, without an autograd graph over the
    levels.

    The gradient T(x, h) = dg/dx is the conditional optimal transport map; for x ~ U(0, 1) it is the conditional
    quantile function ([D] arXiv 2605.06785 sec. 4; layers as in `PicnnParams`). Where every wz is >= 0 the compiled
    backends never let it fall from a level to a higher one of the same row, not by a rounding either.

    Args:
        params: the network; all weights of one floating dtype, on the context's device.
        context: [B, c] float32 | float64 | float16 | bfloat16.
        levels: [M], the same for every row, or [B, M].
        encoder_scale: (), or one [B, w] for each layer of params.encoder, multiplied into its output: dropout masks
            divided by the share that is kept. Not differentiated.
        tolerance: float32 and softplus: a row with many levels may be evaluated at 13, 25 or 49 Chebyshev points and
            interpolated where the estimated error of its gradient is below this times its mean magnitude; 0 never
            interpolates.
        backend: "auto" | "reference" | "cpu".

    Returns:
        value g and gradient dg/dx, both [B, M], in the weights' dtype (float32 where the weights are a half type: the
        half types are storage only). Both are differentiable once, to the context, the levels and every weight.

    Raises:
        TypeError: a dtype or kind that is not accepted. ValueError: shapes, widths or devices that do not fit, an
        unknown
            activation. RuntimeError: a backend that is missing here.
    """
    check = Check("picnn_map")
    check.tensor("context", context, ndim=2)
    check.tensor("levels", levels, ndim=(1, 2))
    check.same_device("context", context, levels=levels)
    dtype = _check_params(check, params, context)
    _check_scales(check, params, context, encoder_scale)
    if not tolerance >= 0:
        raise ValueError(f"picnn_map: tolerance must be >= 0, got {tolerance}")
    if levels.ndim == 1:
        levels = levels.expand(context.shape[0], -1)
    elif levels.shape[0] != context.shape[0]:
        raise ValueError(f"picnn_map: levels must have {context.shape[0]} rows like context, got {levels.shape[0]}")
    if params.wz[0].dtype != dtype:
        params = params.to(dtype=dtype)
    context, points, wz, options = context.to(dtype), levels.to(dtype), list(params.wz), params.options
    scales = [scale.to(dtype) for scale in encoder_scale]
    if resolve("picnn", context.device, backend) == "reference":  # plain torch needs no op around it
        rows = context_stage(params, context, scales)
        return reference.picnn_levels(rows, points, wz, options=options, tolerance=tolerance)
    if params.transitions:
        rows = context_stage(params, context, scales)
        out = torch.ops.prmfast.picnn_levels(rows, points, wz, *options, tolerance, backend)
        return out[0], out[1]
    linears = [tensor for pair in (*params.encoder, *params.heads) for tensor in pair]
    activations = [params.encoder_activation] * len(params.encoder)
    if activations and not params.encoder_output_activation:
        activations[-1] = _NO_ACTIVATION
    out = torch.ops.prmfast.picnn_network(
        context, points, linears, scales, wz, ",".join(activations), *options, tolerance, backend
    )
    return out[0], out[1]


def _check_scales(check: Check, params: PicnnParams, context: Tensor, scales: Sequence[Tensor]) -> None:
    if scales and len(scales) != len(params.encoder):
        raise ValueError(
            f"picnn_map: encoder_scale must have one tensor for each of {len(params.encoder)} layers, got {len(scales)}"
        )
    for i, (scale, (weight, _)) in enumerate(zip(scales, params.encoder, strict=False)):
        check.tensor(f"encoder_scale[{i}]", scale, ndim=2)
        check.shape(f"encoder_scale[{i}]", scale, (context.shape[0], int(weight.shape[0])))
        check.same_device("context", context, **{f"encoder_scale[{i}]": scale})


def _check_params(check: Check, params: PicnnParams, context: Tensor) -> torch.dtype:
    """Shapes, devices, dtypes and names of the network; the dtype to compute in."""
    if not isinstance(params, PicnnParams):
        raise TypeError(f"picnn_map: params must be PicnnParams, got {type(params).__name__}")
    for name, value, allowed in (
        ("activation", params.activation, ACTIVATIONS),
        ("gate", params.gate, GATES),
        ("encoder_activation", params.encoder_activation, CONTEXT_ACTIVATIONS),
    ):
        if value not in allowed:
            raise ValueError(f"picnn_map: params.{name} must be one of {allowed}, got {value!r}")
    if not params.wz or len(params.heads) != (len(params.transitions) or 1):
        raise ValueError(
            f"picnn_map: params must have wz and one head (or one per transition), got {len(params.heads)} heads"
        )
    dtype = check.tensor("params.wz[0]", params.wz[0], ndim=2, dtypes=FLOATS).dtype
    for i, tensor in enumerate(params.tensors()):
        check.same_device("context", context, **{f"params.tensors()[{i}]": tensor})
        if tensor.dtype != dtype:
            raise TypeError(
                f"picnn_map: every weight must have dtype {dtype} like wz[0], got {tensor.dtype} in tensor {i}"
            )
    widths = params.widths
    for i, weight in enumerate(params.wz):
        check.shape(f"params.wz[{i}]", weight, (widths[i + 1], widths[i]))
    if context.shape[1] != params.context_width:
        raise ValueError(
            f"picnn_map: context must have width {params.context_width} (the network's), got {context.shape[1]}"
        )
    layout = CoefficientLayout(widths)
    rows = sum(int(weight.shape[0]) for weight, _ in params.heads)
    expected = layout.size if params.curvature else layout.size - 1
    if rows != expected:
        raise ValueError(f"picnn_map: params.heads must make {expected} coefficients for widths {widths}, got {rows}")
    return torch.float32 if dtype in _HALVES else dtype
