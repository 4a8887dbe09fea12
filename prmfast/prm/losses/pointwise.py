"""Losses on single steps: cross-entropy, squared error, and the outcome alone ([Q] sec. 4, the baselines of PQM)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prmfast.ops._contract import Check
from prmfast.prm.losses._common import PADDING, masked, masked_mean, option, read_labels

Variant = Literal["paper", "released"]


def binary_cross_entropy(logits: Tensor, labels: Tensor, variant: str) -> Tensor:
    """Cross-entropy of each entry: from the logit, or as released from its sigmoid with logarithms cut off at -100."""
    if variant == "released":
        return torch.nn.functional.binary_cross_entropy(torch.sigmoid(logits), labels, reduction="none")
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def bce_loss(scores: Tensor, labels: Tensor, *, variant: Variant = "paper") -> Tensor:
    """``-mean(y log sigmoid(s) + (1 - y) log(1 - sigmoid(s)))`` over all steps of the batch.

    scores: logits of any shape, float16 | bfloat16 | float32 | float64 (float64 is kept, the others compute in
    float32); labels: the same shape, 0/1 or Monte-Carlo success rates in [0, 1], -100 for padding. 0 if all is padding.
    variant: "released" takes the logarithm of the rounded sigmoid, cut off at -100: exact only for moderate scores.
    """
    check = Check("bce_loss")
    option("bce_loss: variant", variant, ("paper", "released"))
    check.tensor("scores", scores, ndim=tuple(range(1, 5)))
    marks = read_labels(check, labels, scores, hard=False)
    kept = marks != PADDING
    return masked_mean(binary_cross_entropy(masked(scores, kept), torch.where(kept, marks, 0.0), variant), kept)


def mse_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """``mean((sigmoid(s) - y)^2)`` over all steps of the batch; arguments as in `bce_loss`."""
    check = Check("mse_loss")
    check.tensor("scores", scores, ndim=tuple(range(1, 5)))
    marks = read_labels(check, labels, scores, hard=False)
    kept = marks != PADDING
    return masked_mean((torch.sigmoid(masked(scores, kept)) - torch.where(kept, marks, 0.0)) ** 2, kept)


def orm_loss(scores: Tensor, labels: Tensor, *, variant: Variant = "paper") -> Tensor:
    """Cross-entropy of each row's last step against "the row has no wrong step": an outcome model from step labels.

    scores [B, H], labels [B, H] in {1, 0, -100}; dtypes and variant as in `bce_loss`. Mean over the rows with a step.
    """
    check = Check("orm_loss")
    option("orm_loss: variant", variant, ("paper", "released"))
    check.tensor("scores", scores, ndim=2)
    marks = read_labels(check, labels, scores, hard=True)
    kept = marks != PADDING
    place = torch.arange(marks.shape[1], device=marks.device).expand_as(marks)
    last = kept & (place == torch.where(kept, place, -1).amax(1, keepdim=True)) if marks.shape[1] else kept
    outcome = (~(marks == 0).any(1, keepdim=True)).to(marks.dtype).expand_as(marks)
    return masked_mean(binary_cross_entropy(masked(scores, last), outcome, variant), last)
