"""Room picnn: many levels per context."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prmfast.bench import inputs
from prmfast.bench.case import Call, Case, Job, Rival, Work, assert_close, require
from prmfast.bench.rivals import compiled, jitted, to_jax, to_torch
from prmfast.kernels.picnn.params import CoefficientLayout, PicnnParams

SLOPE = 0.2
FEWEST_POINTS = 25  # an interpolated row has so many or more
SLICE = 16  # contexts that are compared with float64
RIVALS = ("torch eager", "torch.compile", "jax.jit")


def coefficient_rows(params: PicnnParams, context: Tensor) -> Tensor:
    """`prmfast.kernels.picnn.reference.context_stage` with torch's own softplus, which is faster."""
    u = context
    for weight, bias in params.encoder:
        u = F.silu(F.linear(u, weight, bias))
    layout = CoefficientLayout(params.widths)
    row = F.linear(u, *params.heads[0])
    affine, rest = row[:, : layout.affine], F.softplus(row[:, layout.affine :])
    return torch.cat([affine, rest[:, :-1], rest[:, -1:] + params.curvature_floor], 1)


def dual_numbers(params: PicnnParams, context: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Value and tangent side by side in torch: no autograd over the levels."""
    layout = CoefficientLayout(params.widths)
    rows = coefficient_rows(params, context)

    def part(where: slice) -> Tensor:
        return rows[:, None, where]

    def activated(p: Tensor, dp: Tensor) -> tuple[Tensor, Tensor]:
        if params.activation == "softplus":
            return F.softplus(p), torch.sigmoid(p) * dp
        return F.leaky_relu(p, SLOPE), torch.where(p > 0, dp, SLOPE * dp)

    x = levels.expand(len(context), -1).unsqueeze(-1)
    slope = part(layout.slope(0))
    z, dz = activated(x * slope + part(layout.offset(0)), slope)
    for i, weight in enumerate(params.wz, start=1):
        gate, slope = part(layout.gate(i)), part(layout.slope(i))
        p = F.linear(gate * z, weight) + x * slope + part(layout.offset(i))
        dp = F.linear(gate * dz, weight) + slope
        z, dz = (p, dp) if i == len(params.wz) else activated(p, dp)
    kappa = part(layout.kappa)
    return (z + 0.5 * kappa * x * x).squeeze(-1), (dz + kappa * x).squeeze(-1)


def jax_potential(activation: str, widths: tuple[int, ...], floor: float) -> Callable[..., Any]:
    """g [B, M] of (encoder, head, wz, context, x) in jax."""
    jax = require("jax")
    jnp, nn = jax.numpy, jax.nn
    layout = CoefficientLayout(widths)

    def activate(p: Any) -> Any:
        return nn.softplus(p) if activation == "softplus" else nn.leaky_relu(p, SLOPE)

    def coefficients(encoder: Any, head: Any, context: Any) -> Any:
        u = context
        for weight, bias in encoder:
            u = nn.silu(u @ weight.T + bias)
        row = u @ head[0].T + head[1]
        gates = nn.softplus(row[:, layout.affine :])
        return jnp.concatenate([row[:, : layout.affine], gates.at[:, -1].add(floor)], 1)

    def potential(rows: Any, wz: Any, x: Any) -> Any:
        def part(where: slice) -> Any:
            return rows[:, None, where]

        x = x[..., None]
        z = activate(x * part(layout.slope(0)) + part(layout.offset(0)))
        for i, weight in enumerate(wz, start=1):
            p = (part(layout.gate(i)) * z) @ weight.T + x * part(layout.slope(i)) + part(layout.offset(i))
            z = p if i == len(wz) else activate(p)
        return (z + 0.5 * part(layout.kappa) * x * x)[..., 0]

    def value_and_map(encoder: Any, head: Any, wz: Any, context: Any, x: Any) -> Any:
        rows = coefficients(encoder, head, context)
        return jax.jvp(lambda t: potential(rows, wz, t), (x,), (jnp.ones_like(x),))

    return value_and_map


def error_over_mean(got: Tensor, truth: Tensor) -> float:
    """Largest error over the mean magnitude of the truth."""
    return float((got.double() - truth).abs().max() / truth.abs().mean())


def flops(rows: int, points: int, encoder: bool = True) -> float:
    """Multiply-adds of value and tangent at every level, and of the context stage, times two."""
    layers = (inputs.DEPTH - 1) * inputs.WIDTH**2 + inputs.WIDTH
    sizes = (inputs.HIDDEN, *inputs.ENCODER, 2 * (inputs.DEPTH * inputs.WIDTH + 1) + inputs.DEPTH * inputs.WIDTH + 1)
    context = sum(a * b for a, b in itertools.pairwise(sizes)) if encoder else 0
    return 2.0 * rows * (2 * points * layers + context)


def _interpolated(activation: str, count: int) -> bool:
    """Whether picnn_map may evaluate fewer points than there are levels."""
    return activation == "softplus" and count > FEWEST_POINTS


def map_job(activation: str, rows: int, count: int, hidden: int = inputs.HIDDEN) -> Job:
    """picnn_map of ``rows`` contexts at one row of ``count`` levels."""
    from dataclasses import replace

    from prmfast.ops import picnn_map

    with torch.no_grad():
        params = replace(inputs.picnn_model(hidden).params(), activation=activation, negative_slope=SLOPE)
        params = params.to(dtype=torch.float32)
    context, levels = inputs.contexts(rows, hidden), inputs.levels(count)

    def ours() -> Any:
        with torch.no_grad():
            return picnn_map(params, context, levels)

    def eager() -> Any:
        with torch.no_grad():
            return dual_numbers(params, context, levels)

    def in_jax() -> Call:
        function = jax_potential(activation, params.widths, params.curvature_floor)
        x = levels.expand(rows, -1).contiguous()
        return jitted(function, *to_jax((params.encoder, params.heads[0], params.wz, context, x)))

    def check(out: Any) -> dict[str, float]:
        with torch.no_grad():
            truth = dual_numbers(params.to(dtype=torch.float64), context[:SLICE].double(), levels.double())
        limit = 3e-5 if activation == "softplus" else 1.0  # leaky: a step function, judged below
        errors = {
            "gradient_error_over_mean": error_over_mean(out[1][:SLICE], truth[1]),
            "value_error_over_mean": error_over_mean(out[0][:SLICE], truth[0]),
        }
        assert errors["gradient_error_over_mean"] <= limit, errors
        assert errors["value_error_over_mean"] <= 3e-5, errors
        assert bool((out[1].diff(dim=1) >= 0).all()), "the map falls somewhere"
        if activation != "softplus":
            off = (out[1][:SLICE].double() - truth[1]).abs() > 3e-5 * truth[1].abs().mean()
            errors["share_at_a_kink"] = float(off.double().mean())
            assert errors["share_at_a_kink"] <= 1e-3, errors
        return errors

    def agree(out: Any, other: Any) -> None:
        scale = float(out[0].abs().mean())
        assert_close("value", to_torch(other[0]), out[0], rtol=1e-4, atol=1e-4 * scale)
        off = (to_torch(other[1]) - out[1]).abs() > 1e-4 * out[1].abs().mean()
        assert float(off.double().mean()) <= (0 if activation == "softplus" else 1e-3), "gradient"

    big = 4.0 * rows * count * inputs.WIDTH * 8
    return Job(
        ours={"": Call(ours)},
        rivals={
            "torch eager": Rival(lambda: Call(eager), extra_bytes=big),
            "torch.compile": Rival(lambda: compiled(dual_numbers, params, context, levels), extra_bytes=big),
            "jax.jit": Rival(in_jax, extra_bytes=big),
        },
        check=check,
        agree=agree,
        work=Work(
            "gemm", flops(rows, count), "dual numbers at every level", avoidable=_interpolated(activation, count)
        ),
    )


def map_case(activation: str, rows: int, count: int, hidden: int = inputs.HIDDEN) -> Case:
    """A case of picnn_map."""
    return Case(
        room="picnn",
        op="picnn_map",
        size=f"{activation} B={rows} M={count}",
        dtype="float32",
        make=functools.partial(map_job, activation, rows, count, hidden),
        tiny=functools.partial(map_job, activation, 2, 3),
        rivals=RIVALS,
    )
