"""Contract of the room dist_ppo: the clipped distributional policy loss, from logits or from a linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.dist_ppo.reference import Rule
from prmfast.ops._backends import load, resolve
from prmfast.ops._contract import Check
from prmfast.ops._dist_ppo_checks import check_all, check_layer, check_out, check_rows
from prmfast.ops._library import LIBRARY, implement, once_differentiable

_RULE = "Tensor[] candidates, Tensor? row_weight, float[] rule, str backend"
_STATE = "Tensor offsets, Tensor token_ids, Tensor lse, Tensor coefficients, float temperature"
LIBRARY.define(f"dist_ppo(Tensor logits, {_RULE}) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(f"dist_ppo_backward(Tensor grad, Tensor logits, {_STATE}, str backend) -> Tensor")
LIBRARY.define(f"dist_ppo_with_grad(Tensor logits, {_RULE}) -> (Tensor, Tensor)")
LIBRARY.define(f"dist_ppo_with_grad_out(Tensor logits, {_RULE}, Tensor(a!) out) -> Tensor")
LIBRARY.define(f"dist_ppo_with_grad_(Tensor(a!) logits, {_RULE}) -> Tensor")
LIBRARY.define(f"linear_dist_ppo(Tensor hidden, Tensor weight, {_RULE}) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"linear_dist_ppo_backward(Tensor grad, Tensor hidden, Tensor weight, {_STATE}, bool[] wanted, str backend)"
    " -> (Tensor, Tensor)"
)


def _implementation(tensor: Tensor, backend: str, op: str = "dist_ppo") -> Any:
    return load("dist_ppo", resolve("dist_ppo", tensor.device, backend, dtype=tensor.dtype, op=op))


def _parse(candidates: list[Tensor], rule: list[float]) -> tuple[Candidates, Rule]:
    low, high, dual, temperature = rule
    return Candidates(*candidates), Rule(low, high, None if math.isinf(dual) else dual, temperature)


# --- implementations


def _result(loss: Tensor, like: Tensor) -> Tensor:
    return loss.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _loss(
    logits: Tensor, candidates: list[Tensor], row_weight: Tensor | None, rule: list[float], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    check, (held, parsed) = Check("dist_ppo_loss"), _parse(candidates, rule)
    check.tensor("logits", logits, ndim=2)
    weights = check_all(check, held, row_weight, like=logits, vocabulary=logits.shape[1])
    loss, lse, coefficients = _implementation(logits, backend).dist_ppo(logits, held, weights, parsed)
    check_rows(check, lse)
    return _result(loss, logits), lse, coefficients


def _backward(
    grad: Tensor,
    logits: Tensor,
    offsets: Tensor,
    token_ids: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    out: Tensor = _implementation(logits, backend).dist_ppo_backward(
        logits, offsets, token_ids, lse=lse, coefficients=coefficients * grad, temperature=temperature
    )
    return out


def _into(
    logits: Tensor,
    candidates: list[Tensor],
    row_weight: Tensor | None,
    rule: list[float],
    backend: str,
    *,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check, (held, parsed) = Check("dist_ppo_loss_and_grad"), _parse(candidates, rule)
    check.tensor("logits", logits, ndim=2)
    weights = check_all(check, held, row_weight, like=logits, vocabulary=logits.shape[1])
    implementation = _implementation(logits, backend)
    if out is None:
        out = implementation.empty_like(logits)
    else:
        check_out(check, "logits" if out is logits else "out", out, logits)
    loss, lse = implementation.dist_ppo_with_grad(logits, held, weights, parsed, out=out)
    check_rows(check, lse)
    return _result(loss, logits), out


def _with_grad(
    logits: Tensor, candidates: list[Tensor], row_weight: Tensor | None, rule: list[float], backend: str
) -> tuple[Tensor, Tensor]:
    return _into(logits, candidates, row_weight, rule, backend, out=None)


def _with_grad_out(
    logits: Tensor,
    candidates: list[Tensor],
    row_weight: Tensor | None,
    rule: list[float],
    backend: str,
    out: Tensor,
) -> Tensor:
    return _into(logits, candidates, row_weight, rule, backend, out=out)[0]


def _with_grad_(
    logits: Tensor, candidates: list[Tensor], row_weight: Tensor | None, rule: list[float], backend: str
) -> Tensor:
    return _into(logits, candidates, row_weight, rule, backend, out=logits)[0]


def _linear(
    hidden: Tensor,
    weight: Tensor,
    candidates: list[Tensor],
    row_weight: Tensor | None,
    rule: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check, (held, parsed) = Check("linear_dist_ppo_loss"), _parse(candidates, rule)
    check_layer(check, hidden, weight)
    weights = check_all(check, held, row_weight, like=hidden, vocabulary=weight.shape[0])
    loss, lse, coefficients = _implementation(hidden, backend, "linear_dist_ppo").linear_dist_ppo(
        hidden, weight, held, row_weight=weights, rule=parsed
    )
    check_rows(check, lse)
    return _result(loss, hidden), lse, coefficients


def _linear_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    token_ids: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    temperature: float,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    d_hidden, d_weight = _implementation(hidden, backend, "linear_dist_ppo").linear_dist_ppo_backward(
        hidden,
        weight,
        offsets,
        token_ids=token_ids,
        lse=lse,
        coefficients=coefficients * grad,
        temperature=temperature,
        wanted=(wanted[0], wanted[1]),
    )
    return d_hidden, d_weight


for _name, _function in (
    ("dist_ppo", _loss),
    ("dist_ppo_backward", _backward),
    ("dist_ppo_with_grad", _with_grad),
    ("dist_ppo_with_grad_out", _with_grad_out),
    ("dist_ppo_with_grad_", _with_grad_),
    ("linear_dist_ppo", _linear),
    ("linear_dist_ppo_backward", _linear_backward),
):
    implement(_name, _function)


# --- shapes without values


def _scalar(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _saved(like: Tensor, candidates: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    lse = like.new_empty(like.shape[0], dtype=torch.float64)
    return _scalar(like), lse, lse.new_empty(candidates[1].shape[0])


@torch.library.register_fake("prmfast::dist_ppo", lib=LIBRARY)
def _loss_fake(logits: Tensor, candidates: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _saved(logits, candidates)


@torch.library.register_fake("prmfast::linear_dist_ppo", lib=LIBRARY)
def _linear_fake(hidden: Tensor, weight: Tensor, candidates: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _saved(hidden, candidates)


@torch.library.register_fake("prmfast::dist_ppo_backward", lib=LIBRARY)
def _backward_fake(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("prmfast::dist_ppo_with_grad", lib=LIBRARY)
def _with_grad_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _scalar(logits), logits.new_empty(logits.shape)


@torch.library.register_fake("prmfast::dist_ppo_with_grad_out", lib=LIBRARY)
def _with_grad_out_fake(logits: Tensor, *_: Any) -> Tensor:
    return _scalar(logits)


@torch.library.register_fake("prmfast::dist_ppo_with_grad_", lib=LIBRARY)
def _with_grad_in_place_fake(logits: Tensor, *_: Any) -> Tensor:
    return _scalar(logits)


@torch.library.register_fake("prmfast::linear_dist_ppo_backward", lib=LIBRARY)
def _linear_backward_fake(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    token_ids: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    temperature: float,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if wanted[0] else (0,)),
        weight.new_empty(weight.shape if wanted[1] else (0,)),
    )


# --- derivatives


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, candidates, _, rule, ctx.backend = inputs
    ctx.temperature = rule[3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, *candidates[:2], *output[1:])


def _derivative(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    logits, *state = ctx.saved_tensors
    out = torch.ops.prmfast.dist_ppo_backward(grad, logits, *state, ctx.temperature, ctx.backend)
    return out, [None] * 4, None, None, None


def _linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, candidates, _, rule, ctx.backend = inputs
    ctx.temperature = rule[3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, *candidates[:2], *output[1:])


def _linear_derivative(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:2])
    d_hidden, d_weight = torch.ops.prmfast.linear_dist_ppo_backward(
        grad, *ctx.saved_tensors, ctx.temperature, wanted, ctx.backend
    )
    return d_hidden if wanted[0] else None, d_weight if wanted[1] else None, [None] * 4, None, None, None


_register = torch.library.register_autograd
_register("prmfast::dist_ppo", _derivative, setup_context=_setup_context, lib=LIBRARY)
once_differentiable("dist_ppo_loss", "dist_ppo_backward")
_register("prmfast::linear_dist_ppo", _linear_derivative, setup_context=_linear_setup_context, lib=LIBRARY)
once_differentiable("linear_dist_ppo_loss", "linear_dist_ppo_backward")


# --- the public functions


def _number(check: Check, name: str, value: object, rule: str, good: Any) -> float:
    number = check.number(name, value)
    if not good(number):
        raise ValueError(f"{check.op}: {name} must {rule}, got {value}")
    return number


def _arguments(
    op: str,
    candidates: Candidates,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    row_weight: Tensor | None,
    temperature: float,
) -> tuple[list[Tensor], Tensor | None, list[float]]:
    """What the ops take behind the logits, numbers checked."""
    check = Check(op)
    if not isinstance(candidates, Candidates):
        raise TypeError(f"{op}: candidates must be Candidates, got {type(candidates).__name__}")
    for name, tensor in zip(Candidates._fields, candidates, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: candidates.{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if row_weight is not None and not isinstance(row_weight, Tensor):
        raise TypeError(f"{op}: row_weight must be a torch.Tensor or None, got {type(row_weight).__name__}")
    dual = math.inf
    if dual_clip is not None:
        dual = _number(check, "dual_clip", dual_clip, "be > 1 or None", lambda x: x > 1)
    rule = [
        _number(check, "clip_low", clip_low, "lie in [0, 1)", lambda x: 0 <= x < 1),
        _number(check, "clip_high", clip_high, "be >= 0 and finite", lambda x: 0 <= x < math.inf),
        dual,
        _number(check, "temperature", temperature, "be > 0 and finite", lambda x: 0 < x < math.inf),
    ]
    return list(candidates), row_weight, rule


def dist_ppo_loss(
    logits: Tensor,
    candidates: Candidates,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    row_weight: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Equals ``-sum_t w_t sum_c pi_old * min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A)``.

    rho = exp(log pi_theta(c|s_t) - policy_logp), pi_theta = softmax(logits / temperature), A the advantage of
    candidate c: Dist-PPO, [V] arXiv 2604.13197 eq. 12.
    With w_t = 1/T this is the paper's loss of one sequence; its released code is ``row_weight = 1 / sum(pi_old)``, the
    sum over all candidates, in every row, ``dual_clip=3`` and ``clip_high=clip_low``. No [T, V] tensor is made before
    the backward pass, which makes one: the gradient. Sums over the vocabulary are float32 (float64 for float64 logits),
    the arithmetic of a candidate is float64.

    Args:
        logits: [T, V] of pi_theta, float32 | float64 | float16 | bfloat16; rows may be strided. -inf is a token that is
            masked out.
        candidates: the tokens that count, `Candidates` of T rows. An entry with policy_logp = -inf contributes 0. A row
            without candidates contributes 0 and is not read, whatever stands in it.
        clip_low: in [0, 1).
        clip_high: >= 0.
        dual_clip: c > 1: where A < 0 the term is at least c * pi_old * A. None: no such bound.
        row_weight: [T], any floating dtype; default 1/T.
        temperature: > 0; divides the logits.
        backend: "auto" | "reference" | "cpu" | "triton" | "cuda".

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 where there are no candidates. Differentiable once, in the
        logits alone: candidates and row_weight are constants.

    Raises:
        TypeError: a dtype or kind that is not accepted. ValueError: shapes, devices or ranges that do not fit,
            candidates whose offsets, ids, probabilities or advantages are none (named by row or entry), a row with
            candidates that holds NaN or +inf or nothing but -inf (named). RuntimeError: a backend that is missing here.
    """
    arguments = _arguments(
        "dist_ppo_loss",
        candidates,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        row_weight=row_weight,
        temperature=temperature,
    )
    Check("dist_ppo_loss").tensor("logits", logits, ndim=2)
    loss: Tensor = torch.ops.prmfast.dist_ppo(logits, *arguments, backend)[0]
    return loss


def dist_ppo_loss_and_grad(
    logits: Tensor,
    candidates: Candidates,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    row_weight: Tensor | None = None,
    temperature: float = 1.0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Equals ``loss = dist_ppo_loss(...); loss, torch.autograd.grad(loss, logits)[0]`` in one call.

    A row is turned into its gradient while it is still in the cache. The gradient goes back with
    ``model_logits.backward(grad)``.

    Args:
        logits: as in `dist_ppo_loss`; never differentiated through.
        candidates: as in `dist_ppo_loss`.
        clip_low: as in `dist_ppo_loss`.
        clip_high: as in `dist_ppo_loss`.
        dual_clip: as in `dist_ppo_loss`.
        row_weight: as in `dist_ppo_loss`.
        temperature: as in `dist_ppo_loss`.
        out: where the gradient goes: a [T, V] tensor of the logits' dtype with contiguous columns, every element of
            which is written; or the logits themselves, which are then lost. Default: new memory, whose page faults cost
            as much as the computation: keep a buffer. After a ValueError about a row its contents are undefined.
        backend: as in `dist_ppo_loss`.

    Returns:
        The loss as of `dist_ppo_loss`, and the gradient [T, V] in the logits' dtype (``out`` where it is given).

    Raises:
        As `dist_ppo_loss`; ValueError also for an ``out`` that overlaps itself or a part of the logits.
    """
    arguments = _arguments(
        "dist_ppo_loss_and_grad",
        candidates,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        row_weight=row_weight,
        temperature=temperature,
    )
    Check("dist_ppo_loss_and_grad").tensor("logits", logits, ndim=2)
    held = logits.detach()
    if out is None:
        loss, grad = torch.ops.prmfast.dist_ppo_with_grad(held, *arguments, backend)
        return loss, grad
    if out is logits:
        return torch.ops.prmfast.dist_ppo_with_grad_(held, *arguments, backend), out
    Check("dist_ppo_loss_and_grad").tensor("out", out, ndim=2)
    return torch.ops.prmfast.dist_ppo_with_grad_out(held, *arguments, backend, out.detach()), out


def linear_dist_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    candidates: Candidates,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    row_weight: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Equals ``dist_ppo_loss(hidden @ weight.T, candidates, ...)`` without the [T, V] logits or their gradient.

    The vocabulary is taken in blocks; the backward pass multiplies each block again, turns it into its gradient and
    multiplies on. Only the block, at most 32 MB, is held besides inputs and gradients. Rows without candidates are left
    out of all products, rows whose candidates are all clipped out of those of the backward pass. Half types are
    multiplied and accumulated as float32.

    Args:
        hidden: [T, d] float32 | float64 | float16 | bfloat16.
        weight: [V, d], the output layer, in the hidden states' dtype.
        candidates: as in `dist_ppo_loss`.
        clip_low: as in `dist_ppo_loss`.
        clip_high: as in `dist_ppo_loss`.
        dual_clip: as in `dist_ppo_loss`.
        row_weight: as in `dist_ppo_loss`.
        temperature: as in `dist_ppo_loss`.
        backend: "auto" | "reference" | "cpu" | "triton" | "cuda"; the reference makes the [T, V] logits.

    Returns:
        A scalar, as `dist_ppo_loss`. Differentiable once, in hidden and weight; a gradient that nobody wants is not
        computed.

    Raises:
        As `dist_ppo_loss`.
    """
    arguments = _arguments(
        "linear_dist_ppo_loss",
        candidates,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        row_weight=row_weight,
        temperature=temperature,
    )
    check_layer(Check("linear_dist_ppo_loss"), hidden, weight)
    loss: Tensor = torch.ops.prmfast.linear_dist_ppo(hidden, weight, *arguments, backend)[0]
    return loss
