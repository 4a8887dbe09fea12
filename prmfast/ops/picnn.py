"""Contract of the room picnn: value and input gradient of a PICNN at many levels per context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prmfast._ranges import nvtx
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
from prmfast.ops._library import LIBRARY, implement, once_differentiable

_HALVES = (torch.float16, torch.bfloat16)
_N_OPTIONS = len(LevelOptions._fields)
_OPTIONS = "str activation, float negative_slope, bool square_first, str gate, bool curvature, float curvature_floor"

_NO_ACTIVATION = "none"
_PLAIN = (Tensor, torch.nn.Parameter)

PRECISIONS = ("float32", "bfloat16")

TOLERANCE = 1e-5
"""Interpolated rows: the estimated error of the gradient over its mean magnitude in the row is below this."""

LIBRARY.define(
    f"picnn_levels(Tensor rows, Tensor levels, Tensor[] wz, {_OPTIONS}, float tolerance, str precision, str backend) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "picnn_levels_backward(Tensor grad_value, Tensor grad_gradient, Tensor rows, Tensor levels, Tensor[] wz, "
    f"{_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor[])"
)
LIBRARY.define(
    "picnn_network(Tensor context, Tensor levels, Tensor[] linears, Tensor[] scales, Tensor[] wz, str activations, "
    f"{_OPTIONS}, float tolerance, str precision, str backend) -> (Tensor, Tensor, Tensor, Tensor[])"
)
LIBRARY.define(
    "picnn_network_backward(Tensor grad_value, Tensor grad_gradient, Tensor context, Tensor levels, Tensor[] linears, "
    "Tensor[] scales, Tensor[] wz, Tensor rows, Tensor[] before, str activations, bool context_gradient, "
    f"{_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor[], Tensor[])"
)


def _names(activations: str) -> list[str]:
    """The encoder's activations from how the schema carries them: one word a layer, joined by commas."""
    return activations.split(",") if activations else []


def _resolved(levels: Tensor, wz: Sequence[Tensor], backend: str) -> str:
    """The backend that takes a call of this dtype and these widths."""
    widths = tuple(int(w.shape[1]) for w in wz)
    return resolve("picnn", levels.device, backend, dtype=levels.dtype, widths=widths)


def _implementation(levels: Tensor, wz: Sequence[Tensor], backend: str) -> Any:
    return load("picnn", _resolved(levels, wz, backend))


def _levels(rows: Tensor, levels: Tensor, wz: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    *options, tolerance, precision, backend = rest
    value, gradient = _implementation(levels, wz, backend).picnn_levels(
        rows, levels, wz, options=LevelOptions(*options), tolerance=tolerance, precision=precision
    )
    return value, gradient


def _levels_backward(
    grad_value: Tensor, grad_gradient: Tensor, rows: Tensor, levels: Tensor, wz: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *options, backend = rest
    d_rows, d_levels, d_wz = _implementation(levels, wz, backend).picnn_levels_backward(
        (grad_value, grad_gradient), rows, levels, wz, options=LevelOptions(*options)
    )
    return d_rows, d_levels, d_wz


def _network(
    context: Tensor, levels: Tensor, linears: list[Tensor], scales: list[Tensor], wz: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    activations, *options, tolerance, precision, backend = rest
    implementation = _implementation(levels, wz, backend)
    rows, before = implementation.picnn_context(context, linears, scales, activations=_names(activations))
    value, gradient = implementation.picnn_levels(
        rows, levels, wz, options=LevelOptions(*options), tolerance=tolerance, precision=precision
    )
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
    implementation = _implementation(levels, wz, backend)
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
    implement(_name, _function)


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
    rows, levels, wz, *options, _, _, backend = inputs
    ctx.save_for_backward(rows, levels, *wz)
    ctx.options = (*options, backend)


def _levels_autograd(ctx: Any, grad_value: Tensor, grad_gradient: Tensor) -> tuple[Any, ...]:
    rows, levels, *wz = ctx.saved_tensors
    grads = torch.ops.prmfast.picnn_levels_backward(grad_value, grad_gradient, rows, levels, wz, *ctx.options)
    return (*grads, *[None] * (_N_OPTIONS + 3))


def _network_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    context, levels, linears, scales, wz, activations, *options, _, _, backend = inputs
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
    return d_context, d_levels, d_linears, [None] * len(scales), d_wz, *[None] * (_N_OPTIONS + 4)


torch.library.register_autograd("prmfast::picnn_levels", _levels_autograd, setup_context=_levels_setup, lib=LIBRARY)
torch.library.register_autograd("prmfast::picnn_network", _network_autograd, setup_context=_network_setup, lib=LIBRARY)
once_differentiable("picnn_map", "picnn_levels_backward")
once_differentiable("picnn_map", "picnn_network_backward")


class _Call(NamedTuple):
    """The checked arguments of one call, in the dtype to compute in."""

    params: PicnnParams
    context: Tensor
    levels: Tensor  # [B, M]
    scales: list[Tensor]

    def linears(self) -> list[Tensor]:
        """Weight and bias of every layer of the encoder, then the head's."""
        return [tensor for pair in (*self.params.encoder, *self.params.heads) for tensor in pair]

    def activations(self) -> str:
        """As the schema carries them."""
        names = [self.params.encoder_activation] * len(self.params.encoder)
        if names and not self.params.encoder_output_activation:
            names[-1] = _NO_ACTIVATION
        return ",".join(names)


def _checked(
    op: str, params: PicnnParams, context: Tensor, levels: Tensor, scales: Sequence[Tensor], tolerance: float
) -> _Call:
    check = Check(op)
    check.tensor("context", context, ndim=2)
    check.tensor("levels", levels, ndim=(1, 2))
    check.same_device("context", context, levels=levels)
    dtype = _check_params(check, params, context)
    _check_scales(check, params, context, scales)
    if not tolerance >= 0:
        raise ValueError(f"{op}: tolerance must be >= 0, got {tolerance}")
    if levels.ndim == 1:
        levels = levels.expand(context.shape[0], -1)
    elif levels.shape[0] != context.shape[0]:
        raise ValueError(f"{op}: levels must have {context.shape[0]} rows like context, got {levels.shape[0]}")
    if params.wz[0].dtype != dtype:
        params = params.to(dtype=dtype)
    return _Call(params, context.to(dtype), levels.to(dtype), [scale.to(dtype) for scale in scales])


def picnn_map(
    params: PicnnParams,
    context: Tensor,
    levels: Tensor,
    *,
    encoder_scale: Sequence[Tensor] = (),
    tolerance: float = TOLERANCE,
    precision: str = "float32",
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
        tolerance: float32 and softplus: a row with many levels may be evaluated at 33 or 65 Chebyshev points and
            interpolated where the estimated error of its gradient is below this times its mean magnitude; 0 never
            interpolates.
        precision: "float32", or "bfloat16" where a result that is 1e-2 off may be had sooner: CPUs with AMX then round
            weights and activations of the hidden layers to bfloat16; others stay with float32.
        backend: "auto" | "reference" | "cpu" | "triton" | "cuda".

    Returns:
        value g and gradient dg/dx, both [B, M], in the weights' dtype (float32 where the weights are a half type: the
        half types are storage only). Both are differentiable once, to the context, the levels and every weight.

    Raises:
        TypeError: a dtype or kind that is not accepted. ValueError: shapes, widths or devices that do not fit, an
        unknown
            activation. RuntimeError: a backend that is missing here.
    """
    call = _checked("picnn_map", params, context, levels, encoder_scale, tolerance)
    if precision not in PRECISIONS:
        raise ValueError(f"picnn_map: precision must be one of {PRECISIONS}, got {precision!r}")
    wz, options = list(call.params.wz), call.params.options
    if _resolved(call.levels, wz, backend) == "reference":  # plain torch needs no op around it
        rows = context_stage(call.params, call.context, call.scales)
        return reference.picnn_levels(rows, call.levels, wz, options=options, tolerance=tolerance, precision=precision)
    if call.params.transitions:
        rows = context_stage(call.params, call.context, call.scales)
        out = torch.ops.prmfast.picnn_levels(rows, call.levels, wz, *options, tolerance, precision, backend)
        return out[0], out[1]
    linears = call.linears()
    arguments = (
        call.context,
        call.levels,
        linears,
        call.scales,
        wz,
        call.activations(),
        *options,
        tolerance,
        precision,
    )
    if _is_plain_call((call.context, call.levels, *linears, *wz)):
        with nvtx("prmfast::picnn_network"):
            value, gradient, _, _ = _network(*arguments, backend)
        return value, gradient
    out = torch.ops.prmfast.picnn_network(*arguments, backend)
    return out[0], out[1]


def _is_plain_call(tensors: Sequence[Tensor]) -> bool:
    """Nobody traces, compiles or differentiates: a few rows are served in the time that the dispatcher takes."""
    if torch.compiler.is_compiling() or any(type(tensor) not in _PLAIN for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


class PicnnGradients(NamedTuple):
    """Gradients of a loss: context [B, c] or None, levels [B, M], and one for each of the weights.

    linears: weight and bias of every layer of params.encoder, then of the head.
    """

    context: Tensor | None
    levels: Tensor
    linears: list[Tensor]
    wz: list[Tensor]


class PicnnStep(NamedTuple):
    """One forward pass that remembers what its backward pass needs. value and gradient: [B, M], detached."""

    value: Tensor
    gradient: Tensor
    pull_back: Callable[[Tensor, Tensor, bool], PicnnGradients]

    @torch.no_grad()
    def backward(
        self, *, grad_value: Tensor | None = None, grad_gradient: Tensor | None = None, context_gradient: bool = False
    ) -> PicnnGradients:
        """Gradients of any loss from its derivatives by value and by gradient (None: 0), both [B, M]."""
        zeros = torch.zeros_like(self.value) if grad_value is None or grad_gradient is None else None
        first, second = (grad if grad is not None else zeros for grad in (grad_value, grad_gradient))
        for name, grad in (("grad_value", first), ("grad_gradient", second)):
            if grad is None or grad.shape != self.value.shape or grad.dtype != self.value.dtype:
                raise ValueError(
                    f"PicnnStep.backward: {name} must be {self.value.dtype} of shape {tuple(self.value.shape)}, "
                    f"got {None if grad is None else (grad.dtype, tuple(grad.shape))}"
                )
        assert first is not None
        assert second is not None
        return self.pull_back(first, second, context_gradient)


@torch.no_grad()
def picnn_step(
    params: PicnnParams,
    context: Tensor,
    levels: Tensor,
    *,
    encoder_scale: Sequence[Tensor] = (),
    backend: str = "auto",
) -> PicnnStep:
    """Equals `picnn_map` and then ``torch.autograd.grad`` of a loss on (value, gradient), without autograd.

    For training loops: the forward pass, the tangent and the backward pass to every weight are a handful of GEMMs and
    two kernels, and no graph of small tensors is built. Networks with transitions are not trained this way.

    Args:
        params, context, levels, encoder_scale, backend: as `picnn_map`; the levels are never interpolated.

    Returns:
        `PicnnStep`: value and gradient, and `backward` from the loss's derivatives by them.

    Raises:
        As `picnn_map`; ValueError where params has transitions.
    """
    call = _checked("picnn_step", params, context, levels, encoder_scale, 0.0)
    if params.transitions:
        raise ValueError(f"picnn_step: params must have no transitions, got {len(params.transitions)}")
    wz, linears, options = list(call.params.wz), call.linears(), call.params.options
    implementation, activations = _implementation(call.levels, wz, backend), _names(call.activations())
    if implementation is reference:
        return _reference_step(call)
    rows, before = implementation.picnn_context(call.context, linears, call.scales, activations=activations)
    value, gradient = implementation.picnn_levels(
        rows, call.levels, wz, options=options, tolerance=0.0, precision="float32"
    )

    def pull_back(grad_value: Tensor, grad_gradient: Tensor, context_gradient: bool) -> PicnnGradients:
        d_rows, d_levels, d_wz = implementation.picnn_levels_backward(
            (grad_value, grad_gradient), rows, call.levels, wz, options=options
        )
        d_context, d_linears = implementation.picnn_context_backward(
            d_rows,
            call.context,
            linears,
            call.scales,
            before,
            activations=activations,
            context_gradient=context_gradient,
        )
        return PicnnGradients(d_context if context_gradient else None, d_levels, d_linears, d_wz)

    return PicnnStep(value, gradient, pull_back)


def _reference_step(call: _Call) -> PicnnStep:
    """The same by autograd of the reference."""
    params, scales = call.params, call.scales
    leaves = [t.detach().requires_grad_() for t in (call.context, call.levels, *call.linears(), *params.wz)]
    context, levels, *weights = leaves
    linears, wz = weights[: -len(params.wz)], weights[-len(params.wz) :]
    pairs = list(zip(linears[::2], linears[1::2], strict=True))
    own = replace(params, encoder=tuple(pairs[:-1]), heads=(pairs[-1],), wz=tuple(wz))
    with torch.enable_grad():
        rows = context_stage(own, context, scales)
        outputs = reference.picnn_levels(rows, levels, wz, options=params.options, tolerance=0.0, precision="float32")

    def pull_back(grad_value: Tensor, grad_gradient: Tensor, context_gradient: bool) -> PicnnGradients:
        grads = list(torch.autograd.grad(outputs, leaves, (grad_value, grad_gradient), retain_graph=True))
        split = len(grads) - len(wz)
        return PicnnGradients(grads[0] if context_gradient else None, grads[1], grads[2:split], grads[split:])

    return PicnnStep(outputs[0].detach(), outputs[1].detach(), pull_back)


def _check_scales(check: Check, params: PicnnParams, context: Tensor, scales: Sequence[Tensor]) -> None:
    if scales and len(scales) != len(params.encoder):
        raise ValueError(
            f"{check.op}: encoder_scale must have one tensor for each of {len(params.encoder)} layers, "
            f"got {len(scales)}"
        )
    for i, (scale, (weight, _)) in enumerate(zip(scales, params.encoder, strict=False)):
        check.tensor(f"encoder_scale[{i}]", scale, ndim=2)
        check.shape(f"encoder_scale[{i}]", scale, (context.shape[0], int(weight.shape[0])))
        check.same_device("context", context, **{f"encoder_scale[{i}]": scale})


def _check_params(check: Check, params: PicnnParams, context: Tensor) -> torch.dtype:
    """Shapes, devices, dtypes and names of the network; the dtype to compute in."""
    if not isinstance(params, PicnnParams):
        raise TypeError(f"{check.op}: params must be PicnnParams, got {type(params).__name__}")
    for name, value, allowed in (
        ("activation", params.activation, ACTIVATIONS),
        ("gate", params.gate, GATES),
        ("encoder_activation", params.encoder_activation, CONTEXT_ACTIVATIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{check.op}: params.{name} must be one of {allowed}, got {value!r}")
    if not params.wz or len(params.heads) != (len(params.transitions) or 1):
        raise ValueError(
            f"{check.op}: params must have wz and one head (or one per transition), got {len(params.heads)} heads"
        )
    dtype = check.tensor("params.wz[0]", params.wz[0], ndim=2, dtypes=FLOATS).dtype
    for i, tensor in enumerate(params.tensors()):
        check.same_device("context", context, **{f"params.tensors()[{i}]": tensor})
        if tensor.dtype != dtype:
            raise TypeError(
                f"{check.op}: every weight must have dtype {dtype} like wz[0], got {tensor.dtype} in tensor {i}"
            )
    widths = params.widths
    for i, weight in enumerate(params.wz):
        check.shape(f"params.wz[{i}]", weight, (widths[i + 1], widths[i]))
    if context.shape[1] != params.context_width:
        raise ValueError(
            f"{check.op}: context must have width {params.context_width} (the network's), got {context.shape[1]}"
        )
    layout = CoefficientLayout(widths)
    rows = sum(int(weight.shape[0]) for weight, _ in params.heads)
    expected = layout.size if params.curvature else layout.size - 1
    if rows != expected:
        raise ValueError(f"{check.op}: params.heads must make {expected} coefficients for widths {widths}, got {rows}")
    return torch.float32 if dtype in _HALVES else dtype
