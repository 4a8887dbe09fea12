"""Contract of the room candidate_td: likely next tokens of every row, and what a reward model says of each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates
from prmfast.kernels.candidate_td.reference import output_dtype
from prmfast.ops._backends import load, resolve
from prmfast.ops._contract import Check
from prmfast.ops._library import LIBRARY, implement, once_differentiable

_Four = tuple[Tensor, ...]

_OPTIONS = "float p_min, float beta, Tensor? sampled, float policy_temperature, float reward_temperature, str backend"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
LIBRARY.define(f"candidate_td(Tensor policy_logits, Tensor reward_logits, {_OPTIONS}) -> {_FOUR}")
LIBRARY.define(
    "linear_candidate_td(Tensor policy_hidden, Tensor reward_hidden, Tensor policy_weight, Tensor reward_weight, "
    f"{_OPTIONS}) -> {_FOUR}"
)
LIBRARY.define("token_logprob(Tensor logits, Tensor ids, float temperature, str backend) -> (Tensor, Tensor)")
LIBRARY.define(
    "token_logprob_backward(Tensor grad, Tensor logits, Tensor ids, Tensor norm, float temperature, str backend) "
    "-> Tensor"
)


def _implementation(tensor: Tensor, backend: str, **facts: Any) -> Any:
    """The module that takes a call of these facts: op, dtype where it is not the tensor's own, p_min."""
    return load("candidate_td", resolve("candidate_td", tensor.device, backend, **{"dtype": tensor.dtype, **facts}))


def _check_columns(check: Check, name: str, value: Tensor, dim: int) -> None:
    if value.shape[dim] == 0:
        what = "column" if dim == 1 else "row"
        raise ValueError(f"{check.op}: {name} must have at least one {what}, got shape {tuple(value.shape)}")


def _check_ids(check: Check, name: str, ids: Tensor, rows: int, columns: int) -> None:
    check.tensor(name, ids, ndim=1, dtypes=(torch.int64,))
    check.shape(name, ids, (rows,))
    outside = (ids < 0) | (ids >= columns)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"{check.op}: {name} must be >= 0 and < {columns} (there is no ignored id such as -100: leave such rows "
            f"out), got {int(ids[row])} in row {row}"
        )


def _check_options(check: Check, p_min: float, beta: float, temperatures: dict[str, float]) -> None:
    if not 0 < p_min <= 1:
        raise ValueError(f"{check.op}: p_min must be > 0 and <= 1, got {p_min}")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"{check.op}: beta must be > 0 and finite, got {beta}")
    for name, value in temperatures.items():
        if not 1e-30 <= value <= 1e30:  # beyond, 1 / temperature leaves float32
            raise ValueError(f"{check.op}: {name} must be >= 1e-30 and <= 1e30, got {value}")


def _candidate_td(
    policy_logits: Tensor,
    reward_logits: Tensor,
    p_min: float,
    beta: float,
    sampled: Tensor | None,
    policy_temperature: float,
    reward_temperature: float,
    backend: str,
) -> _Four:
    check = Check("candidate_td")
    check.tensor("policy_logits", policy_logits, ndim=2)
    check.tensor("reward_logits", reward_logits, ndim=2)
    _check_columns(check, "policy_logits", policy_logits, 1)
    check.shape("reward_logits", reward_logits, tuple(policy_logits.shape))
    check.same_device("policy_logits", policy_logits, reward_logits=reward_logits)
    temperatures = {"policy_temperature": policy_temperature, "reward_temperature": reward_temperature}
    _check_options(check, p_min, beta, temperatures)
    if sampled is not None:
        check.same_device("policy_logits", policy_logits, sampled=sampled)
        _check_ids(check, "sampled", sampled, *policy_logits.shape)
    facts = {"op": "candidate_td", "dtype": output_dtype(policy_logits, reward_logits), "p_min": p_min}
    run = _implementation(policy_logits, backend, **facts).candidate_td
    found: Candidates = run(policy_logits, reward_logits, p_min=p_min, beta=beta, sampled=sampled, **temperatures)
    return tuple(found)


def _linear_candidate_td(
    policy_hidden: Tensor,
    reward_hidden: Tensor,
    policy_weight: Tensor,
    reward_weight: Tensor,
    p_min: float,
    beta: float,
    sampled: Tensor | None,
    policy_temperature: float,
    reward_temperature: float,
    backend: str,
) -> _Four:
    check = Check("linear_candidate_td")
    _check_linear(check, "policy", policy_hidden, policy_weight)
    _check_linear(check, "reward", reward_hidden, reward_weight)
    rows, columns = policy_hidden.shape[0], policy_weight.shape[0]
    check.shape("reward_hidden", reward_hidden, (rows, reward_hidden.shape[1]))
    check.shape("reward_weight", reward_weight, (columns, reward_weight.shape[1]))
    others = {"reward_hidden": reward_hidden, "policy_weight": policy_weight, "reward_weight": reward_weight}
    check.same_device("policy_hidden", policy_hidden, **others)
    temperatures = {"policy_temperature": policy_temperature, "reward_temperature": reward_temperature}
    _check_options(check, p_min, beta, temperatures)
    if sampled is not None:
        check.same_device("policy_hidden", policy_hidden, sampled=sampled)
        _check_ids(check, "sampled", sampled, rows, columns)
    facts = {"op": "linear_candidate_td", "dtype": output_dtype(policy_hidden, reward_hidden), "p_min": p_min}
    found: Candidates = _implementation(policy_hidden, backend, **facts).linear_candidate_td(
        policy_hidden,
        reward_hidden,
        policy_weight=policy_weight,
        reward_weight=reward_weight,
        p_min=p_min,
        beta=beta,
        sampled=sampled,
        **temperatures,
    )
    return tuple(found)


def _check_linear(check: Check, side: str, hidden: Tensor, weight: Tensor) -> None:
    check.tensor(f"{side}_hidden", hidden, ndim=2)
    check.tensor(f"{side}_weight", weight, ndim=2, dtypes=(hidden.dtype,))
    _check_columns(check, f"{side}_weight", weight, 0)
    check.shape(f"{side}_weight", weight, (weight.shape[0], hidden.shape[1]))


def _check_token(check: Check, logits: Tensor, ids: Tensor, temperature: float) -> None:
    check.tensor("logits", logits, ndim=2)
    _check_columns(check, "logits", logits, 1)
    _check_options(check, 1.0, 1.0, {"temperature": temperature})
    check.same_device("logits", logits, ids=ids)
    _check_ids(check, "ids", ids, *logits.shape)


def _token_logprob(logits: Tensor, ids: Tensor, temperature: float, backend: str) -> tuple[Tensor, Tensor]:
    _check_token(Check("token_logprob"), logits, ids, temperature)
    logp, norm = _implementation(logits, backend, op="token_logprob").token_logprob(
        logits, ids, temperature=temperature
    )
    return logp, norm


def _token_logprob_backward(
    grad: Tensor, logits: Tensor, ids: Tensor, norm: Tensor, temperature: float, backend: str
) -> Tensor:
    run = _implementation(logits, backend, op="token_logprob").token_logprob_backward
    out: Tensor = run(grad, logits, ids, norm, temperature=temperature)
    return out


implement("candidate_td", _candidate_td)
implement("linear_candidate_td", _linear_candidate_td)
implement("token_logprob", _token_logprob)
implement("token_logprob_backward", _token_logprob_backward)


def _fake_candidates(like: Tensor, dtype: torch.dtype) -> _Four:
    entries = torch.library.get_ctx().new_dynamic_size()
    offsets = like.new_empty(like.shape[0] + 1, dtype=torch.int64)
    token_ids = like.new_empty(entries, dtype=torch.int64)
    return offsets, token_ids, like.new_empty(entries, dtype=dtype), like.new_empty(entries, dtype=dtype)


@torch.library.register_fake("prmfast::candidate_td", lib=LIBRARY)
def _candidate_td_fake(policy_logits: Tensor, reward_logits: Tensor, *_: Any) -> _Four:
    return _fake_candidates(policy_logits, output_dtype(policy_logits, reward_logits))


@torch.library.register_fake("prmfast::linear_candidate_td", lib=LIBRARY)
def _linear_candidate_td_fake(policy_hidden: Tensor, reward_hidden: Tensor, *_: Any) -> _Four:
    return _fake_candidates(policy_hidden, output_dtype(policy_hidden, reward_hidden))


@torch.library.register_fake("prmfast::token_logprob", lib=LIBRARY)
def _token_logprob_fake(logits: Tensor, ids: Tensor, temperature: float, backend: str) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=output_dtype(logits)), logits.new_empty(rows, 2, dtype=torch.float64)


@torch.library.register_fake("prmfast::token_logprob_backward", lib=LIBRARY)
def _token_logprob_backward_fake(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, ids, ctx.temperature, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, ids, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    saved = ctx.saved_tensors
    return torch.ops.prmfast.token_logprob_backward(grad, *saved, ctx.temperature, ctx.backend), None, None, None


torch.library.register_autograd("prmfast::token_logprob", _backward, setup_context=_setup_context, lib=LIBRARY)
once_differentiable("token_logprob", "token_logprob_backward")


def _numbers(check: Check, **values: object) -> tuple[float, ...]:
    return tuple(check.number(name, value) for name, value in values.items())


def _check_sampled(check: Check, sampled: Tensor | None) -> None:
    if sampled is not None:
        check.tensor("sampled", sampled, ndim=1, dtypes=(torch.int64,))


def candidate_td(
    policy_logits: Tensor,
    reward_logits: Tensor,
    *,
    p_min: float = 0.1,
    beta: float = 10.0,
    sampled: Tensor | None = None,
    policy_temperature: float = 1.0,
    reward_temperature: float = 1.0,
    backend: str = "auto",
) -> Candidates:
    """Equals ``(beta * (q - p))[p.exp() >= p_min]`` with ``p, q = log_softmax`` of policy and reward logits.

    The candidates of DistRL ([V] arXiv 2604.13197 eq. 10 and sec. 4.2): every token y that the sampling policy gives at
    least ``p_min``, with A_TD(s_t, y) = beta (log pi_phi(y|s_t) - log pi_old(y|s_t)). At most 1 / p_min a row. One pass
    over the logits and no [T, V] temporary but on backend "reference". p >= p_min (1 - 1e-5) counts, so that rounding
    does not decide where p_min is met exactly.

    Args:
        policy_logits: [T, V] float32 | float64 | float16 | bfloat16 of pi_old, the policy that sampled. -inf is a token
            of probability 0. Rows may be strided.
        reward_logits: [T, V] of pi_phi; its dtype may be another one.
        p_min: smallest probability of a candidate, in (0, 1].
        beta: scale of the advantage, > 0.
        sampled: int64 [T], a token that joins its row's candidates whatever its probability; None for no such token.
        policy_temperature: divides policy_logits before the softmax, 1e-30 to 1e30.
        reward_temperature: divides reward_logits before the softmax, 1e-30 to 1e30.
        backend: "auto" | "reference" | "cpu" | "triton" | "cuda".

    Returns:
        Candidates: offsets int64 [T + 1], token_ids int64 [n] increasing in a row, policy_logp [n] (natural log, <= 0)
        and advantage [n]: float32, float64 where a side is float64. Not differentiable. A forced token of probability 0
        has policy_logp -inf and advantage 0 where the reward side gives it 0 too.

    Raises:
        TypeError: a dtype or kind that is not accepted. ValueError: a shape, device or range that does not fit, an id
            outside [0, V), a row with NaN or +inf or with -inf only (named). RuntimeError: a backend that is missing.
    """
    check = Check("candidate_td")
    check.tensor("policy_logits", policy_logits, ndim=2)
    check.tensor("reward_logits", reward_logits, ndim=2)
    _check_sampled(check, sampled)
    p_min, beta = _numbers(check, p_min=p_min, beta=beta)
    temperatures = _numbers(check, policy_temperature=policy_temperature, reward_temperature=reward_temperature)
    policy, reward = policy_logits.detach(), reward_logits.detach()
    return Candidates(*torch.ops.prmfast.candidate_td(policy, reward, p_min, beta, sampled, *temperatures, backend))


def linear_candidate_td(
    policy_hidden: Tensor,
    reward_hidden: Tensor,
    *,
    policy_weight: Tensor,
    reward_weight: Tensor,
    p_min: float = 0.1,
    beta: float = 10.0,
    sampled: Tensor | None = None,
    policy_temperature: float = 1.0,
    reward_temperature: float = 1.0,
    backend: str = "auto",
) -> Candidates:
    """Equals ``candidate_td(policy_hidden @ policy_weight.T, reward_hidden @ reward_weight.T)``, no [T, V] tensor made.

    Logits are made and consumed in chunks of the vocabulary but on backend "reference". Half types are storage: their
    products are summed in float32 and never rounded to the half type.

    Args:
        policy_hidden: [T, d] float32 | float64 | float16 | bfloat16, last hidden states of pi_old.
        reward_hidden: [T, e] of pi_phi; its width and dtype may be other ones.
        policy_weight: [V, d] lm_head of pi_old, in the dtype of policy_hidden.
        reward_weight: [V, e] lm_head of pi_phi, in the dtype of reward_hidden.
        p_min: as in `candidate_td`, and so are beta, sampled and the temperatures.
        beta: scale of the advantage.
        sampled: int64 [T] or None.
        policy_temperature: > 0.
        reward_temperature: > 0.
        backend: "auto" | "reference" | "cpu" | "triton" | "cuda".

    Returns:
        As `candidate_td`; float64 where a hidden state is float64. Not differentiable.

    Raises:
        As `candidate_td`.
    """
    check = Check("linear_candidate_td")
    check.tensor("policy_hidden", policy_hidden, ndim=2)
    check.tensor("reward_hidden", reward_hidden, ndim=2)
    check.tensor("policy_weight", policy_weight, ndim=2)
    check.tensor("reward_weight", reward_weight, ndim=2)
    _check_sampled(check, sampled)
    p_min, beta = _numbers(check, p_min=p_min, beta=beta)
    temperatures = _numbers(check, policy_temperature=policy_temperature, reward_temperature=reward_temperature)
    given = [t.detach() for t in (policy_hidden, reward_hidden, policy_weight, reward_weight)]
    return Candidates(*torch.ops.prmfast.linear_candidate_td(*given, p_min, beta, sampled, *temperatures, backend))


def token_logprob(logits: Tensor, ids: Tensor, *, temperature: float = 1.0, backend: str = "auto") -> Tensor:
    """Equals ``torch.log_softmax(logits / temperature, 1).gather(1, ids[:, None])[:, 0]`` without a [T, V] temporary.

    Args:
        logits: [T, V] float32 | float64 | float16 | bfloat16. -inf is a token of probability 0. Rows may be strided.
        ids: int64 [T] in [0, V). -100 is not an ignored id here: leave such rows out.
        temperature: divides the logits before the softmax, 1e-30 to 1e30.
        backend: "auto" | "reference" | "cpu" | "triton" | "cuda".

    Returns:
        [T] float32, float64 for float64 logits. Differentiable once in the logits, gradient in their dtype:
        grad_t (1[v = id_t] - p_tv) / temperature.

    Raises:
        As `candidate_td`. NotImplementedError: a second derivative.
    """
    check = Check("token_logprob")
    check.tensor("logits", logits, ndim=2)
    check.tensor("ids", ids, ndim=1, dtypes=(torch.int64,))
    (temperature,) = _numbers(check, temperature=temperature)
    out: Tensor = torch.ops.prmfast.token_logprob(logits, ids, temperature, backend)[0]
    return out
