"""IPVRM inside reinforcement learning: margins and weights from each prompt's success rate ([V] eq. 15 and 16)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prmfast.ops._contract import FLOATS, Check
from prmfast.prm.losses._common import compute_dtype, masked, option, ratio, read_labels, read_mask
from prmfast.prm.losses.implicit import margin_terms, prefix_values, weighted_mean

_LOGIT_LIMIT = math.log((1 - 1e-6) / 1e-6)  # mu is kept 1e-6 from 0 and 1, which float32 could not do to mu itself
OnlineVariant = Literal["paper", "released"]


class OnlineTerms(NamedTuple):
    """Margin [B] and weight [B] of each answer."""

    margin: Tensor
    weight: Tensor


def online_terms(
    labels: Tensor,
    groups: Tensor,
    *,
    margin: float = 5.0,
    adb: bool = True,
    dlw: bool = True,
    variant: OnlineVariant = "paper",
    dtype: torch.dtype = torch.float32,
) -> OnlineTerms:
    """Margin and weight of every answer from mu, the success rate of the answers of its prompt.

    labels: [B] in {0, 1}; groups: integers [B], equal for answers of one prompt, in any order.
    adb: the boundary moves with logit(mu), clamped to [1e-6, 1 - 1e-6]: margin - logit(mu) for a correct answer,
    margin + logit(mu) for a wrong one. dlw: weight 1 - mu for a correct answer, mu for a wrong one; otherwise 1.
    variant: "released" scales the weights of a prompt with n answers to the sum n, and prompts whose answers are all
    correct or all wrong get weight 0 and the plain margin.
    """
    check = Check("online_terms")
    option("online_terms: variant", variant, ("paper", "released"))
    check.tensor("labels", labels, ndim=1, dtypes=(*FLOATS, torch.int64, torch.int32, torch.bool))
    y = read_labels(check, labels, labels.new_zeros(labels.shape, dtype=dtype), hard=True)
    if bool((y < 0).any()):
        raise ValueError(f"online_terms: labels must be 0 or 1, got -100 at row {int((y < 0).nonzero()[0])}")
    check.tensor("groups", groups, ndim=1, dtypes=(torch.int64, torch.int32))
    check.shape("groups", groups, tuple(y.shape))
    base = check.number("margin", margin)
    _, prompt = torch.unique(groups, return_inverse=True)

    def total(values: Tensor) -> Tensor:
        """Sum over the answers of the same prompt, at every answer."""
        return torch.zeros_like(values).index_add_(0, prompt, values)[prompt]

    size = total(torch.ones_like(y))
    rate = total(y) / size
    shift = torch.logit(rate).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT) * (1.0 - 2.0 * y) if adb else torch.zeros_like(y)
    weight = torch.where(y == 1, 1.0 - rate, rate) if dlw else torch.ones_like(y)
    if variant == "paper":
        return OnlineTerms(base + shift, weight)
    mixed = (rate > 0) & (rate < 1)
    if dlw:
        weight = ratio(weight * size, total(weight))
    return OnlineTerms(torch.where(mixed, base + shift, base), torch.where(mixed, weight, 0.0))


def online_ipvrm_loss(
    log_ratio: Tensor,
    labels: Tensor,
    groups: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 10.0,
    margin: float = 5.0,
    adb: bool = True,
    dlw: bool = True,
    variant: OnlineVariant = "paper",
) -> Tensor:
    """``1/B sum_b weight_b * mean_t l_bt``: the loss of `ipvrm_loss` with the margins and weights of `online_terms`.

    log_ratio [B, T], mask [B, T] and dtypes as in `ipvrm_loss`; labels [B] in {0, 1} and groups [B] as in
    `online_terms`. The mean is over all B answers: one without a token adds 0. 0 for B = 0.
    """
    check = Check("online_ipvrm_loss")
    check.tensor("log_ratio", log_ratio, ndim=2)
    check.tensor("labels", labels, ndim=1, dtypes=(*FLOATS, torch.int64, torch.int32, torch.bool))
    check.shape("labels", labels, (log_ratio.shape[0],))
    dtype = compute_dtype(log_ratio)
    terms = online_terms(labels, groups, margin=margin, adb=adb, dlw=dlw, variant=variant, dtype=dtype)
    kept = read_mask(check, mask, log_ratio)
    values = prefix_values(log_ratio, mask=mask, beta=beta)
    y = labels.detach().to(dtype).unsqueeze(1)
    loss = torch.where(kept, margin_terms(masked(values, kept), y, terms.margin.unsqueeze(1)), 0.0).sum(1)
    return weighted_mean(check, ratio(loss, kept.sum(1).to(dtype)), terms.weight)
