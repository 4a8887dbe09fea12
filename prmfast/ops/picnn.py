"""Contract of the room picnn: value and input gradient of a PICNN at many levels per context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prmfast.kernels.picnn import reference
from prmfast.kernels.picnn.params import ACTIVATIONS, CONTEXT_ACTIVATIONS, GATES, CoefficientLayout, PicnnParams
from prmfast.kernels.picnn.reference import context_stage
from prmfast.ops._backends import load, resolve
from prmfast.ops._contract import FLOATS, Check
from prmfast.ops._library import LIBRARY

_HALVES = (torch.float16, torch.bfloat16)

LIBRARY.define(
    "picnn_levels(Tensor coefficients, Tensor levels, Tensor[] wz, str activation, float negative_slope, "
    "bool square_first, str backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "picnn_levels_backward(Tensor grad_value, Tensor grad_gradient, Tensor coefficients, Tensor levels, Tensor[] wz, "
    "str activation, float negative_slope, bool square_first, str backend) -> (Tensor, Tensor, Tensor[])"
)


def _levels(
    coefficients: Tensor,
    levels: Tensor,
    wz: list[Tensor],
    activation: str,
    negative_slope: float,
    square_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    implementation = load("picnn", resolve("picnn", levels.device, backend))
    value, gradient = implementation.picnn_levels(
        coefficients, levels, wz, activation=activation, negative_slope=negative_slope, square_first=square_first
    )
    return value, gradient


def _levels_backward(
    grad_value: Tensor,
    grad_gradient: Tensor,
    coefficients: Tensor,
    levels: Tensor,
    wz: list[Tensor],
    activation: str,
    negative_slope: float,
    square_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    implementation = load("picnn", resolve("picnn", levels.device, backend))
    d_coefficients, d_levels, d_wz = implementation.picnn_levels_backward(
        grad_value,
        grad_gradient,
        coefficients,
        levels,
        wz,
        activation=activation,
        negative_slope=negative_slope,
        square_first=square_first,
    )
    return d_coefficients, d_levels, d_wz


LIBRARY.impl("picnn_levels", _levels, "CompositeExplicitAutograd")
LIBRARY.impl("picnn_levels_backward", _levels_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("prmfast::picnn_levels", lib=LIBRARY)
def _levels_fake(coefficients: Tensor, levels: Tensor, wz: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return levels.new_empty(levels.shape), levels.new_empty(levels.shape)


@torch.library.register_fake("prmfast::picnn_levels_backward", lib=LIBRARY)
def _levels_backward_fake(
    grad_value: Tensor, grad_gradient: Tensor, coefficients: Tensor, levels: Tensor, wz: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return (
        coefficients.new_empty(coefficients.shape),
        levels.new_empty(levels.shape),
        [w.new_empty(w.shape) for w in wz],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    coefficients, levels, wz, *options = inputs
    ctx.save_for_backward(coefficients, levels, *wz)
    ctx.options = options


def _backward(ctx: Any, grad_value: Tensor, grad_gradient: Tensor) -> tuple[Any, ...]:
    coefficients, levels, *wz = ctx.saved_tensors
    grads = torch.ops.prmfast.picnn_levels_backward(grad_value, grad_gradient, coefficients, levels, wz, *ctx.options)
    return (*grads, None, None, None, None)


torch.library.register_autograd("prmfast::picnn_levels", _backward, setup_context=_setup_context, lib=LIBRARY)


def picnn_map(params: PicnnParams, context: Tensor, levels: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Equals ``g(x, h)`` and ``torch.autograd.grad(g.sum(), x)`` at every level x, without an autograd graph over the
    levels.

    The gradient T(x, h) = dg/dx is the conditional optimal transport map; for x ~ U(0, 1) it is the conditional
    quantile function ([D] arXiv 2605.06785 sec. 4; layers as in `PicnnParams`).

    Args:
        params: the network; all weights of one floating dtype, on the context's device.
        context: [B, c] float32 | float64 | float16 | bfloat16.
        levels: [M], the same for every row, or [B, M].
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
    if context.shape[1] != params.context_width:
        raise ValueError(
            f"picnn_map: context must have width {params.context_width} (the network's), got {context.shape[1]}"
        )
    if levels.ndim == 1:
        levels = levels.expand(context.shape[0], -1)
    elif levels.shape[0] != context.shape[0]:
        raise ValueError(f"picnn_map: levels must have {context.shape[0]} rows like context, got {levels.shape[0]}")
    if params.wz[0].dtype != dtype:
        params = params.to(dtype=dtype)
    coefficients = context_stage(params, context.to(dtype))
    wz, points = list(params.wz), levels.to(dtype)
    if resolve("picnn", context.device, backend) == "reference":  # plain torch needs no op around it
        return reference.picnn_levels(
            coefficients,
            points,
            wz,
            activation=params.activation,
            negative_slope=params.negative_slope,
            square_first=params.square_first,
        )
    out = torch.ops.prmfast.picnn_levels(
        coefficients, points, wz, params.activation, params.negative_slope, params.square_first, backend
    )
    return out[0], out[1]


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
    layout = CoefficientLayout(widths)
    rows = sum(int(weight.shape[0]) for weight, _ in params.heads)
    expected = layout.size if params.curvature else layout.size - 1
    if rows != expected:
        raise ValueError(f"picnn_map: params.heads must make {expected} coefficients for widths {widths}, got {rows}")
    return torch.float32 if dtype in _HALVES else dtype
