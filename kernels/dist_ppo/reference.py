"""The slow truth of the room: plain torch in float64, over the rows that have candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prmfast.kernels.candidate_td.candidates import Candidates


class Rule(NamedTuple):
    """How the objective is clipped, and the temperature of the softmax."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    temperature: float


def terms(logp: Tensor, candidates: Candidates, rule: Rule) -> Tensor:
    """pi_old * min(rho A, clip(rho) A) of every entry [nnz], with pi_old multiplied in: pi_old * rho = pi_theta.

    So written nothing overflows, however large rho = pi_theta / pi_old is.
    """
    new, old, advantage = logp.exp(), candidates.policy_logp.double().exp(), candidates.advantage.double()
    clipped = new.clamp(old * (1 - rule.clip_low), old * (1 + rule.clip_high))
    term = torch.minimum(new * advantage, clipped * advantage)
    if rule.dual_clip is not None:
        term = torch.where(advantage < 0, torch.maximum(term, rule.dual_clip * old * advantage), term)
    return term.masked_fill(candidates.policy_logp.isneginf(), 0.0)


def slopes(logp: Tensor, candidates: Candidates, rule: Rule) -> Tensor:
    """d terms / d logp [nnz], as autograd has it: an exact tie of two branches takes half of each."""
    new, old, advantage = logp.exp(), candidates.policy_logp.double().exp(), candidates.advantage.double()
    low, high = old * (1 - rule.clip_low), old * (1 + rule.clip_high)
    open_, shut = new * advantage, new.clamp(low, high) * advantage
    inside = ((new >= low) & (new <= high)).double()  # the clipped branch moves too
    share = torch.where(open_ == shut, 0.5 + 0.5 * inside, (open_ < shut).double())
    if rule.dual_clip is not None:
        term, floor = torch.minimum(open_, shut), rule.dual_clip * old * advantage
        capped = torch.where(term == floor, 0.5 * share, torch.where(term > floor, share, 0.0))
        share = torch.where(advantage < 0, capped, share)
    return (share * open_).masked_fill(candidates.policy_logp.isneginf(), 0.0)


def entry_rows(offsets: Tensor) -> Tensor:
    """The row of every entry, [nnz]."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())


def settle(
    entry_logits: Tensor, lse: Tensor, candidates: Candidates, row_weight: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """The loss [] and d loss / d log pi_theta of every entry, from the entries' logits and the rows' log-sum-exp."""
    rows = entry_rows(candidates.offsets)
    logp, weight = entry_logits.double() / rule.temperature - lse[rows], row_weight.double()[rows]
    return -(weight * terms(logp, candidates, rule)).sum(), -(weight * slopes(logp, candidates, rule))


def dist_ppo(logits: Tensor, candidates: Candidates, row_weight: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """The loss [], log-sum-exp of logits / temperature [T] (0 in rows without candidates), d loss / d log pi [nnz]."""
    active = candidates.offsets.diff() > 0
    lse = logits.new_zeros(len(logits), dtype=torch.float64)
    lse[active] = (logits[active].double() / rule.temperature).logsumexp(1)
    entry_logits = logits[entry_rows(candidates.offsets), candidates.token_ids]
    loss, coefficients = settle(entry_logits, lse, candidates, row_weight, rule)
    return loss, lse, coefficients


def dist_ppo_backward(
    logits: Tensor, offsets: Tensor, token_ids: Tensor, *, lse: Tensor, coefficients: Tensor, temperature: float
) -> Tensor:
    """d loss / d logits [T, V]: (sum over a row's entries of g_c (1[v = c] - pi_theta(v))) / temperature."""
    rows = entry_rows(offsets)
    total = torch.zeros_like(lse).index_add(0, rows, coefficients)
    grad = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    moved = total != 0
    grad[moved] = -total[moved, None] * (logits[moved].double() / temperature - lse[moved, None]).exp()
    grad.index_put_((rows, token_ids), coefficients, accumulate=True)
    return (grad / temperature).to(logits.dtype)


def empty_like(logits: Tensor) -> Tensor:
    """Memory for a gradient [T, V] in rows of their own."""
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def dist_ppo_with_grad(
    logits: Tensor, candidates: Candidates, row_weight: Tensor, rule: Rule, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss [] and log-sum-exp [T]; the gradient goes to ``out`` [T, V], which may be the logits."""
    loss, lse, coefficients = dist_ppo(logits, candidates, row_weight, rule)
    if bool(lse.isfinite().all()):
        entries = candidates.offsets, candidates.token_ids
        grad = dist_ppo_backward(logits, *entries, lse=lse, coefficients=coefficients, temperature=rule.temperature)
        out.copy_(grad)
    return loss, lse


def linear_dist_ppo(
    hidden: Tensor, weight: Tensor, candidates: Candidates, *, row_weight: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """`dist_ppo` of the logits hidden @ weight.T."""
    return dist_ppo(hidden.double() @ weight.double().T, candidates, row_weight, rule)


def linear_dist_ppo_backward(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    token_ids: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    temperature: float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients to hidden [T, d] and weight [V, d]; one that is not wanted is empty, [0]."""
    h, w = hidden.double(), weight.double()
    grad = dist_ppo_backward(h @ w.T, offsets, token_ids, lse=lse, coefficients=coefficients, temperature=temperature)
    d_hidden = (grad @ w).to(hidden.dtype) if wanted[0] else hidden.new_empty(0)
    d_weight = (grad.T @ h).to(weight.dtype) if wanted[1] else weight.new_empty(0)
    return d_hidden, d_weight
