"""The slow truth of the room: plain torch, in float64 on whole [T, V] tensors, returned in the op's dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates

TOUCH = 1e-5
"""log p >= log p_min - TOUCH counts as p >= p_min, so that rounding never decides where ten equal logits meet 0.1."""


def output_dtype(*logits: Tensor) -> torch.dtype:
    """float64 where any side is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in logits) else torch.float32


def row_error(op: str, name: str, kind: str, row: int) -> ValueError:
    """The error of a row that has no softmax."""
    rule = "must hold no NaN, no +inf and a value above -inf in every row"
    return ValueError(f"{op}: {name} {rule}, got {kind} in row {row}")


def _peak_and_sum(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[T, V] -> the largest logit of each row and log sum exp((x - it) / temperature), both [T, 1] in float64."""
    peak = x.double().amax(1, keepdim=True)
    return peak, torch.logsumexp((x.double() - peak) / temperature, 1, keepdim=True)


def _log_softmax(op: str, **sides: tuple[Tensor, float]) -> tuple[Tensor, ...]:
    """log softmax(logits / temperature) [T, V] in float64 of each side, after the one check of all their rows."""
    norms = {name: _peak_and_sum(*side) for name, side in sides.items()}
    bad = torch.cat([~torch.isfinite(log_sum) for _, log_sum in norms.values()], 1)  # [T, sides]
    if bool(bad.any()):
        row, side = (int(i) for i in bad.nonzero()[0])
        name = list(sides)[side]
        x = sides[name][0][row]
        raise row_error(
            op, name, "NaN" if bool(x.isnan().any()) else "+inf" if bool((x > 0).any()) else "only -inf", row
        )
    return tuple(
        (x.double() - norms[name][0]) / temperature - norms[name][1] for name, (x, temperature) in sides.items()
    )


def candidate_td(
    policy_logits: Tensor,
    reward_logits: Tensor,
    *,
    p_min: float,
    beta: float,
    sampled: Tensor | None,
    policy_temperature: float,
    reward_temperature: float,
) -> Candidates:
    """Logits [T, V] of both sides -> every y with pi_old(y|s_t) >= p_min, and A = beta (log pi_phi - log pi_old)."""
    sides = {"policy_logits": (policy_logits, policy_temperature), "reward_logits": (reward_logits, reward_temperature)}
    policy, reward = _log_softmax("candidate_td", **sides)
    dtype = output_dtype(policy_logits, reward_logits)
    return _candidates(policy, reward, p_min, beta, sampled, dtype)


def _candidates(
    policy: Tensor, reward: Tensor, p_min: float, beta: float, sampled: Tensor | None, dtype: torch.dtype
) -> Candidates:
    chosen = policy >= math.log(p_min) - TOUCH
    if sampled is not None:
        chosen = chosen.scatter(1, sampled[:, None], True)
    row, token = chosen.nonzero(as_tuple=True)
    logp, logq = policy[row, token], reward[row, token]
    difference = torch.where(logp == logq, 0.0, logq - logp)  # a forced token of p = 0 on both sides: 0, not NaN
    offsets = torch.cat([row.new_zeros(1), chosen.sum(1).cumsum(0)])
    return Candidates(offsets, token.clone(), logp.to(dtype), (beta * difference).to(dtype))


def linear_candidate_td(
    policy_hidden: Tensor,
    reward_hidden: Tensor,
    *,
    policy_weight: Tensor,
    reward_weight: Tensor,
    p_min: float,
    beta: float,
    sampled: Tensor | None,
    policy_temperature: float,
    reward_temperature: float,
) -> Candidates:
    """`candidate_td` of hidden [T, d] @ weight[V, d]^T of each side, products and sums in float64."""
    policy_logits = policy_hidden.double() @ policy_weight.double().T
    reward_logits = reward_hidden.double() @ reward_weight.double().T
    sides = {"policy_logits": (policy_logits, policy_temperature), "reward_logits": (reward_logits, reward_temperature)}
    policy, reward = _log_softmax("linear_candidate_td", **sides)
    return _candidates(policy, reward, p_min, beta, sampled, output_dtype(policy_hidden, reward_hidden))


def token_logprob(logits: Tensor, ids: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits [T, V], ids [T] -> log softmax(logits / temperature)[t, ids[t]], and what `token_logprob_backward` needs.

    That is `norm`, float64 [T, 2]: a logit near the row's largest, and log sum exp((x - that logit) / temperature).
    One number would lose the second beside a logit of 1e38.
    """
    (logp,) = _log_softmax("token_logprob", logits=(logits, temperature))
    norm = torch.cat(_peak_and_sum(logits, temperature), 1)
    return logp.gather(1, ids[:, None])[:, 0].to(output_dtype(logits)), norm


def token_logprob_backward(grad: Tensor, logits: Tensor, ids: Tensor, norm: Tensor, *, temperature: float) -> Tensor:
    """grad [T] -> grad_t (1[v = id_t] - softmax_tv) / temperature [T, V] in the logits' dtype."""
    hot = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device).scatter(1, ids[:, None], 1.0)
    logp = (logits.double() - norm[:, :1]) / temperature - norm[:, 1:]
    weight = grad.double()[:, None]
    return torch.where(weight == 0, 0.0, weight * (hot - logp.exp()) / temperature).to(logits.dtype)
