"""Losses of implicit reward models, from the log-ratios of two language models ([V] arXiv 2604.13197)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prmfast.ops import token_logprob
from prmfast.ops._contract import Check
from prmfast.prm.losses._common import (
    compute_dtype,
    masked,
    masked_mean,
    option,
    ratio,
    read_labels,
    read_mask,
    softplus,
)
from prmfast.prm.losses.pointwise import Variant, binary_cross_entropy

Weighting = Literal["uniform", "early", "late"]
Reduction = Literal["sequence", "token"]


def token_log_ratio(policy_logits: Tensor, reference_logits: Tensor, ids: Tensor) -> Tensor:
    """``log pi(id | s) - log pi_ref(id | s)`` of rows: [N, V], [N, V] and int64 [N] -> [N], no [N, V] temporary.

    Differentiable in the policy's logits; the reference is a constant. Dtypes and errors as in `ops.token_logprob`.
    """
    return token_logprob(policy_logits, ids) - token_logprob(reference_logits.detach(), ids)


def prefix_values(log_ratio: Tensor, *, mask: Tensor | None = None, beta: float = 10.0) -> Tensor:
    """``v_t = beta / t * sum_{i <= t} log_ratio_i`` over the tokens of the mask: [B, T] -> [B, T] ([V] eq. 3, 7).

    P(correct | prefix) = sigmoid(v_t). t counts tokens of the mask; where the mask is false stands the last value
    before it, 0 in front. Computes in float32, float64 for float64.
    """
    check = Check("prefix_values")
    check.tensor("log_ratio", log_ratio, ndim=2)
    kept = read_mask(check, mask, log_ratio)
    count = kept.cumsum(1).clamp_min(1).to(compute_dtype(log_ratio))
    return check.number("beta", beta) * masked(log_ratio, kept).cumsum(1) / count


def prefix_value_loss(
    values: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    margin: float | Tensor = 5.0,
    weighting: Weighting = "uniform",
    reduction: Reduction = "sequence",
) -> Tensor:
    """``mean_b sum_t w_t l_t / sum_t w_t``, l = y softplus(m - v) + (1 - y) softplus(m + v): the margin loss of values.

    values: [B, T] logits of P(correct | prefix), of an implicit model (`prefix_values`) or a value head. Other
    arguments and the result as in `ipvrm_loss`.
    """
    check = Check("prefix_value_loss")
    check.tensor("values", values, ndim=2)
    return _reduce(check, values, labels, read_mask(check, mask, values), margin, weighting, reduction)


def ipvrm_loss(
    log_ratio: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 10.0,
    margin: float | Tensor = 5.0,
    weighting: Weighting = "uniform",
    reduction: Reduction = "sequence",
) -> Tensor:
    """`prefix_value_loss` of ``v_t = beta / t * sum_{i <= t} log_ratio_i`` ([V] eq. 9, 17 and 18).

    log_ratio: [B, T] log pi - log pi_ref of each token, float16 | bfloat16 | float32 | float64; float64 is kept, the
    others compute in float32. labels: [B], 1 correct, 0 wrong, or a success rate between. mask: [B, T] true for the
    tokens of the answer; all others may hold anything and never count. margin: m, one number or [B].
    weighting: of token t = 1..T of an answer: "uniform" 1, "late" t / T, "early" 1 - t / T.
    reduction: "sequence" is the paper's, a mean over the tokens of each answer, then over the answers with a positive
    total weight ("early" gives none to an answer of one token); "token" is the released one, a mean over the tokens
    of the whole batch.

    returns: a scalar, 0 with zero gradient where nothing counts.
    """
    check = Check("ipvrm_loss")
    check.tensor("log_ratio", log_ratio, ndim=2)
    values = prefix_values(log_ratio, mask=mask, beta=check.number("beta", beta))
    return _reduce(check, values, labels, read_mask(check, mask, log_ratio), margin, weighting, reduction)


def _reduce(
    check: Check, values: Tensor, labels: Tensor, kept: Tensor, margin: float | Tensor, weighting: str, reduction: str
) -> Tensor:
    option(f"{check.op}: weighting", weighting, ("uniform", "early", "late"))
    option(f"{check.op}: reduction", reduction, ("sequence", "token"))
    marks = _outcomes(check, labels, values)
    loss = margin_terms(masked(values, kept), marks.unsqueeze(1), _margin(check, margin, marks).unsqueeze(1))
    share = kept.cumsum(1).to(loss.dtype) / kept.sum(1, keepdim=True).clamp_min(1)
    weight = {"uniform": torch.ones_like(share), "late": share, "early": 1.0 - share}[weighting]
    weight = torch.where(kept, weight, 0.0)
    total, mass = (weight * loss).sum(1), weight.sum(1)
    if reduction == "token":
        return ratio(total.sum(), mass.sum())
    return masked_mean(ratio(total, mass), mass > 0)


def margin_terms(values: Tensor, labels: Tensor, margin: Tensor) -> Tensor:
    """``y softplus(m - v) + (1 - y) softplus(m + v)``, elementwise."""
    return labels * softplus(margin - values) + (1.0 - labels) * softplus(margin + values)


def _outcomes(check: Check, labels: Tensor, per_token: Tensor) -> Tensor:
    """Labels [B] in [0, 1] in the dtype of the computation; -100 is none here."""
    marks = read_labels(check, labels, per_token.new_zeros(per_token.shape[0]), hard=False)
    if bool((marks < 0).any()):
        row = int((marks < 0).nonzero()[0])
        raise ValueError(f"{check.op}: labels must be in [0, 1], got {marks[row].item():g} at row {row}")
    return marks


def _margin(check: Check, margin: float | Tensor, marks: Tensor) -> Tensor:
    """One margin for each row of ``marks`` [B]."""
    if not isinstance(margin, Tensor):
        return torch.full_like(marks, check.number("margin", margin, kind="a number or a tensor"))
    check.tensor("margin", margin, ndim=1)
    check.shape("margin", margin, tuple(marks.shape))
    return margin.detach().to(marks)


def implicit_prm_loss(
    log_ratio: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 0.05,
    margin: float | Tensor = 0.0,
    weight: Tensor | None = None,
    variant: Variant = "paper",
) -> Tensor:
    """``mean_b weight_b * BCE(sigmoid(beta * sum_t log_ratio_t), y_b)``, the outcome loss of an implicit PRM.

    log_ratio [B, T], labels [B] and mask [B, T] as in `ipvrm_loss`; a whole-sequence log-ratio is [B, 1]. margin, one
    number or [B], and weight [B] are those of `online_terms`. variant: "released" takes the logarithm of the rounded
    sigmoid, cut off at -100, without margin. Mean over all B; 0 for B = 0.
    """
    check = Check("implicit_prm_loss")
    option("implicit_prm_loss: variant", variant, ("paper", "released"))
    check.tensor("log_ratio", log_ratio, ndim=2)
    logits = check.number("beta", beta) * masked(log_ratio, read_mask(check, mask, log_ratio)).sum(1)
    marks = _outcomes(check, labels, log_ratio)
    margins = _margin(check, margin, marks)
    if variant == "released":
        if bool((margins != 0).any()):
            raise ValueError(f"implicit_prm_loss: margin must be 0 for variant='released', got {margin}")
        loss = binary_cross_entropy(logits, marks, variant)
    else:
        loss = margin_terms(logits, marks, margins)
    return weighted_mean(check, loss, weight)


def weighted_mean(check: Check, loss: Tensor, weight: Tensor | None) -> Tensor:
    """``sum(weight * loss) / B`` of [B], 0 for B = 0."""
    if weight is not None:
        check.tensor("weight", weight, ndim=1)
        check.shape("weight", weight, tuple(loss.shape))
        loss = weight.detach().to(loss) * loss
    return loss.sum() / max(loss.numel(), 1)


def dpo_rm_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    beta: float = 0.05,
    margin: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """``-logsigmoid(beta * (sum_t chosen_t - sum_t rejected_t) - margin)``, mean or sum over the pairs.

    chosen [P, T] and rejected [P, U]: log-ratios of the tokens of each pair of answers, masks alike; dtypes as in
    `ipvrm_loss`. 0 with no pair.
    """
    check = Check("dpo_rm_loss")
    first, second = _pair(check, chosen, chosen_mask, rejected, rejected_mask)
    difference = first.sum(1) - second.sum(1)
    return _bradley_terry(check, difference, beta, margin, reduction)


def q_rm_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    margin: float,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """``-logsigmoid(beta * (mean_t chosen_t - mean_t rejected_t) - margin)``: Q-RM, per token instead of per answer.

    Arguments as in `dpo_rm_loss`; an answer without a token has the mean 0 (arXiv 2505.23363, as a baseline of [V]).
    """
    check = Check("q_rm_loss")
    first, second = _pair(check, chosen, chosen_mask, rejected, rejected_mask)
    counts = [
        read_mask(check, mask, rewards).sum(1).clamp_min(1)
        for mask, rewards in ((chosen_mask, chosen), (rejected_mask, rejected))
    ]
    difference = first.sum(1) / counts[0] - second.sum(1) / counts[1]
    return _bradley_terry(check, difference, beta, margin, reduction)


def _pair(
    check: Check, chosen: Tensor, chosen_mask: Tensor | None, rejected: Tensor, rejected_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    check.tensor("chosen", chosen, ndim=2)
    check.tensor("rejected", rejected, ndim=2)
    if len(chosen) != len(rejected):
        raise ValueError(f"{check.op}: rejected must have {len(chosen)} rows like chosen, got {len(rejected)}")
    return (
        masked(chosen, read_mask(check, chosen_mask, chosen)),
        masked(rejected, read_mask(check, rejected_mask, rejected)),
    )


def _bradley_terry(check: Check, difference: Tensor, beta: float, margin: float, reduction: str) -> Tensor:
    option(f"{check.op}: reduction", reduction, ("mean", "sum"))
    loss = softplus(check.number("margin", margin) - check.number("beta", beta) * difference)
    return loss.sum() if reduction == "sum" else weighted_mean(check, loss, None)


def endogenous_rewards(logits: Tensor, ids: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``r_t = Q(s_t, y_t) - alpha logsumexp(Q(s_{t+1}, .) / alpha)``, the reward inside a language model (EndoRM).

    logits: [T, V], row t predicts ids[t], of a model that is not trained further; ids: int64 [T]. The value after the
    last token is 0. returns: [T] float32, float64 for float64 (arXiv 2506.23235, a baseline of [V]).
    """
    check = Check("endogenous_rewards")
    check.tensor("logits", logits, ndim=2)
    check.tensor("ids", ids, ndim=1, dtypes=(torch.int64,))
    check.shape("ids", ids, tuple(logits.shape[:1]))
    temperature = check.number("alpha", alpha)
    if not temperature > 0:
        raise ValueError(f"endogenous_rewards: alpha must be > 0, got {alpha}")
    values = logits.to(compute_dtype(logits))
    after = temperature * torch.logsumexp(values / temperature, 1)
    return values.gather(1, ids.unsqueeze(1)).squeeze(1) - torch.cat([after[1:], after.new_zeros(min(len(ids), 1))])
