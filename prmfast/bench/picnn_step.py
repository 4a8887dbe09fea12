"""Room picnn: one training step of a calibrator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prmfast.bench import inputs
from prmfast.bench.case import Call, Case, Job, Rival, Work, assert_close, require
from prmfast.bench.picnn import RIVALS, dual_numbers, error_over_mean, flops, jax_potential
from prmfast.bench.rivals import jitted, to_jax, to_torch
from prmfast.kernels.picnn.params import PicnnParams

VARIANTS = ("", "autograd")  # picnn_step as a fit calls it; picnn_map under torch.autograd
FLOOR = 1e-3  # of the curvature


def _loss(value: Any, gradient: Any, target: Any) -> Any:
    return ((gradient - target) ** 2).mean() + 0.1 * (value * value).mean()


def _parts(by_name: dict[str, Any], softplus: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """Encoder, head and the non-negative wz of a calibrator's parameters by name."""
    encoder = tuple((by_name[f"encoder.{i}.weight"], by_name[f"encoder.{i}.bias"]) for i in range(len(inputs.ENCODER)))
    wz = tuple(softplus(value) for name, value in by_name.items() if name.startswith("raw_wz"))
    return encoder, (by_name["head.weight"], by_name["head.bias"]), wz


class _Step:
    """Loss and gradients of ``rows`` contexts, one level each, to every parameter of a calibrator.

    Nobody asks for the gradient to the hidden states or to the levels, as in a fit. Every method but ``check`` and
    ``agree`` gives (loss, gradients in the order of the parameters).
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.model = inputs.picnn_model()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.leaves = [p.detach().clone().requires_grad_() for p in self.model.parameters()]
        self.context = inputs.contexts(rows)
        self.levels, self.target = inputs.uniform(rows, 1, seed=2), inputs.uniform(rows, 1, seed=3)

    def without_autograd(self) -> Any:
        taken = self.model.step(self.context, self.levels)
        grad_value, grad_gradient = 0.2 * taken.value / self.rows, 2 * (taken.gradient - self.target) / self.rows
        self.model.take(taken.backward(grad_value=grad_value, grad_gradient=grad_gradient))
        return (_loss(taken.value, taken.gradient, self.target), *(p.grad for p in self.model.parameters()))

    def loss_by(
        self, function: Callable[..., Any], values: Sequence[Tensor], h: Tensor, x: Tensor, y: Tensor
    ) -> Tensor:
        """The loss of parameters ``values``, value and map by ``function(params, context, levels)``."""
        encoder, head, wz = _parts(dict(zip(self.names, values, strict=True)), F.softplus)
        params = PicnnParams(wz=wz, heads=(head,), encoder=encoder, curvature=True, curvature_floor=FLOOR)
        value, gradient = function(params, h, x)
        loss: Tensor = _loss(value, gradient, y)
        return loss

    def by_autograd(self, loss_of: Callable[..., Tensor]) -> Any:
        loss = loss_of(self.leaves, self.context, self.levels, self.target)
        return (loss.detach(), *torch.autograd.grad(loss, self.leaves))

    def in_torch_compile(self) -> Call:
        torch._dynamo.reset()
        fast = torch.compile(functools.partial(self.loss_by, dual_numbers), dynamic=False)
        return Call(functools.partial(self.by_autograd, fast))

    def in_jax(self) -> Call:
        jax = require("jax")
        function = jax_potential("softplus", (*([inputs.WIDTH] * inputs.DEPTH), 1), FLOOR)

        def loss(values: Any, h: Any, x: Any, y: Any) -> Any:
            parts = _parts(dict(zip(self.names, values, strict=True)), jax.nn.softplus)
            value, gradient = function(*parts, h, x)
            return _loss(value, gradient, y)

        def flat(values: Any, h: Any, x: Any, y: Any) -> Any:
            value, gradients = jax.value_and_grad(loss)(values, h, x, y)
            return (value, *gradients)

        return jitted(flat, *to_jax((tuple(self.leaves), self.context, self.levels, self.target)))

    def check(self, out: Any) -> dict[str, float]:
        wide = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        loss = self.loss_by(dual_numbers, wide, self.context.double(), self.levels.double(), self.target.double())
        truth = (loss.detach(), *torch.autograd.grad(loss, wide))
        worst = max(error_over_mean(o, t) for o, t in zip(out, truth, strict=True))
        assert worst <= 2e-3, f"gradient error {worst:.2e} of its mean magnitude"
        return {"gradient_error_over_mean": worst}

    def agree(self, out: Any, other: Any) -> None:
        for i, (mine, theirs) in enumerate(zip(out, other, strict=True)):
            scale = float(mine.abs().max())
            assert_close(f"output {i}", to_torch(theirs), mine, rtol=1e-3, atol=1e-3 * scale)


def step_job(rows: int) -> Job:
    """Forward and backward of a loss on (value, gradient), one level per row, to every parameter of a calibrator."""
    from prmfast.ops import picnn_map

    step = _Step(rows)
    ours, eager = (functools.partial(step.loss_by, function) for function in (picnn_map, dual_numbers))
    work = 3 * flops(rows, 1) - 2.0 * rows * inputs.HIDDEN * inputs.ENCODER[0]  # no gradient to the hidden states
    return Job(
        ours={"": Call(step.without_autograd), "autograd": Call(functools.partial(step.by_autograd, ours))},
        rivals={
            "torch eager": Rival(lambda: Call(functools.partial(step.by_autograd, eager))),
            "torch.compile": Rival(step.in_torch_compile),
            "jax.jit": Rival(step.in_jax),
        },
        check=step.check,
        agree=step.agree,
        work=Work("gemm", work, "forward once, backward twice"),
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
        variants=VARIANTS,
    )
