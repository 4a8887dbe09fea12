"""Room picnn: many levels per context, and one training step."""

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
from prmfast.kernels.picnn.params import CoefficientLayout, PicnnParams

SLOPE = 0.2
FEWEST_POINTS = 25  # an interpolated row has so many or more
SLICE = 16  # contexts that are compared with float64
RIVALS = ("torch eager", "torch.compile", "jax.jit")
STEP_VARIANTS = ("", "autograd")  # picnn_step as a fit calls it; picnn_map under torch.autograd


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


def _jax_potential(activation: str, widths: tuple[int, ...], floor: float) -> Callable[..., Any]:
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


def to_jax(tree: Any) -> Any:
    """Tensors of nested tuples as jax arrays that share their memory."""
    jax = require("jax")
    if isinstance(tree, Tensor):
        return jax.dlpack.from_dlpack(tree.detach().contiguous())
    return tuple(to_jax(item) for item in tree)


def to_torch(value: Any) -> Tensor:
    """A jax or numpy array as a tensor."""
    import numpy as np

    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def jitted(function: Callable[..., Any], *arguments: Any) -> Call:
    """``jax.jit(function)`` on arrays that are already jax's; a call ends when its result is there."""
    jax = require("jax")
    compiled = jax.jit(function)
    return Call(lambda: jax.block_until_ready(compiled(*arguments)))


def compiled(function: Callable[..., Any], *arguments: Any, grad: bool = False) -> Call:
    """``torch.compile`` with static shapes."""
    torch._dynamo.reset()
    fast = torch.compile(function, dynamic=False)

    def run() -> Any:
        with torch.set_grad_enabled(grad):
            return fast(*arguments)

    return Call(run)


def _error_over_mean(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).abs().max() / truth.abs().mean())


def _flops(rows: int, points: int, encoder: bool = True) -> float:
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
        function = _jax_potential(activation, params.widths, params.curvature_floor)
        x = levels.expand(rows, -1).contiguous()
        return jitted(function, *to_jax((params.encoder, params.heads[0], params.wz, context, x)))

    def check(out: Any) -> dict[str, float]:
        with torch.no_grad():
            truth = dual_numbers(params.to(dtype=torch.float64), context[:SLICE].double(), levels.double())
        limit = 3e-5 if activation == "softplus" else 1.0  # leaky: a step function, judged below
        errors = {
            "gradient_error_over_mean": _error_over_mean(out[1][:SLICE], truth[1]),
            "value_error_over_mean": _error_over_mean(out[0][:SLICE], truth[0]),
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
            "gemm", _flops(rows, count), "dual numbers at every level", avoidable=_interpolated(activation, count)
        ),
    )


def _step_losses(value: Any, gradient: Any, target: Any) -> Any:
    return ((gradient - target) ** 2).mean() + 0.1 * (value * value).mean()


def step_job(rows: int) -> Job:
    """Forward and backward of a loss on (value, gradient), one level per row, to every parameter of a calibrator.

    Nobody asks for the gradient to the hidden states or to the levels, as in a fit.
    """
    from prmfast.ops import picnn_map

    model = inputs.picnn_model()
    leaves = [p.detach().clone().requires_grad_() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    context = inputs.contexts(rows)
    levels, target = inputs.uniform(rows, 1, seed=2), inputs.uniform(rows, 1, seed=3)

    def params_of(values: list[Tensor]) -> PicnnParams:
        by_name = dict(zip(names, values, strict=True))
        raw = [by_name[n] for n in names if n.startswith("raw_wz")]
        layers = range(len(inputs.ENCODER))
        return PicnnParams(
            wz=tuple(F.softplus(r) for r in raw),
            heads=((by_name["head.weight"], by_name["head.bias"]),),
            encoder=tuple((by_name[f"encoder.{i}.weight"], by_name[f"encoder.{i}.bias"]) for i in layers),
            curvature=True,
            curvature_floor=1e-3,
        )

    def loss_by(function: Callable[..., Any], values: list[Tensor], h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        value, gradient = function(params_of(values), h, x)
        loss: Tensor = _step_losses(value, gradient, y)
        return loss

    def step(function: Callable[..., Any]) -> Any:
        loss = function(leaves, context, levels, target)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    def without_autograd() -> Any:
        taken = model.step(context, levels)
        grad_value, grad_gradient = 0.2 * taken.value / rows, 2 * (taken.gradient - target) / rows
        model.take(taken.backward(grad_value=grad_value, grad_gradient=grad_gradient))
        return (_step_losses(taken.value, taken.gradient, target), *(p.grad for p in model.parameters()))

    def in_torch_compile() -> Call:
        torch._dynamo.reset()
        return Call(functools.partial(step, torch.compile(functools.partial(loss_by, dual_numbers), dynamic=False)))

    def in_jax() -> Call:
        jax = require("jax")
        function = _jax_potential("softplus", (*([inputs.WIDTH] * inputs.DEPTH), 1), 1e-3)

        def loss(values: Any, h: Any, x: Any, y: Any) -> Any:
            p = params_by_name(dict(zip(names, values, strict=True)), jax.nn.softplus)
            value, gradient = function(*p, h, x)
            return _step_losses(value, gradient, y)

        def flat(values: Any, h: Any, x: Any, y: Any) -> Any:
            value, gradients = jax.value_and_grad(loss)(values, h, x, y)
            return (value, *gradients)

        return jitted(flat, *to_jax((tuple(leaves), context, levels, target)))

    def params_by_name(by_name: dict[str, Any], softplus: Callable[..., Any]) -> Any:
        encoder = [(by_name[f"encoder.{i}.weight"], by_name[f"encoder.{i}.bias"]) for i in range(len(inputs.ENCODER))]
        wz = [softplus(by_name[n]) for n in names if n.startswith("raw_wz")]
        return encoder, (by_name["head.weight"], by_name["head.bias"]), wz

    def check(out: Any) -> dict[str, float]:
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        loss = loss_by(dual_numbers, wide, context.double(), levels.double(), target.double())
        truth = (loss.detach(), *torch.autograd.grad(loss, wide))
        worst = max(_error_over_mean(o, t) for o, t in zip(out, truth, strict=True))
        assert worst <= 2e-3, f"gradient error {worst:.2e} of its mean magnitude"
        return {"gradient_error_over_mean": worst}

    def agree(out: Any, other: Any) -> None:
        for i, (mine, theirs) in enumerate(zip(out, other, strict=True)):
            scale = float(mine.abs().max())
            assert_close(f"output {i}", to_torch(theirs), mine, rtol=1e-3, atol=1e-3 * scale)

    work = 3 * _flops(rows, 1) - 2.0 * rows * inputs.HIDDEN * inputs.ENCODER[0]  # no gradient to the hidden states
    return Job(
        ours={
            "": Call(without_autograd),
            "autograd": Call(lambda: step(functools.partial(loss_by, picnn_map))),
        },
        rivals={
            "torch eager": Rival(lambda: Call(lambda: step(functools.partial(loss_by, dual_numbers)))),
            "torch.compile": Rival(in_torch_compile),
            "jax.jit": Rival(in_jax),
        },
        check=check,
        agree=agree,
        work=Work("gemm", work, "forward once, backward twice"),
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


def step_case(rows: int) -> Case:
    """A case of the training step."""
    return Case(
        room="picnn",
        op="training step",
        size=f"B={rows} M=1",
        dtype="float32",
        make=functools.partial(step_job, rows),
        tiny=functools.partial(step_job, 2),
        rivals=RIVALS,
        variants=STEP_VARIANTS,
    )
