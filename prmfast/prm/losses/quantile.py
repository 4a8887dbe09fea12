"""The pinball loss of a quantile head ([U] arXiv 2506.09338)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prmfast.ops._contract import Check
from prmfast.prm.losses._common import PADDING, masked, ratio, read_labels


def weighted_quantile_loss(quantiles: Tensor, targets: Tensor, levels: Tensor | Sequence[float]) -> Tensor:
    """``mean max(level * e, (level - 1) * e)`` over N * M entries, e = target - quantile.

    quantiles: [N, M] predicted quantiles of the success probability (of logits: their sigmoid), float16 | bfloat16 |
    float32 | float64; float64 is kept, the others compute in float32. targets: [N] success rates in [0, 1], -100 for
    padding. levels: M numbers in [0, 1], never rounded to the dtype of the quantiles (bfloat16 would make 0.1 into
    0.10009766). A tie of target and quantile has the gradient half way, 0.5 - level. 0 if all rows are padding.
    """
    check = Check("weighted_quantile_loss")
    check.tensor("quantiles", quantiles, ndim=2)
    taus = levels if isinstance(levels, Tensor) else torch.tensor(list(levels), dtype=torch.float64)
    taus = check.tensor("levels", taus, ndim=1).to(quantiles.device)
    check.shape("levels", taus, (quantiles.shape[1],))
    if not bool(((taus >= 0) & (taus <= 1)).all()):
        raise ValueError(f"weighted_quantile_loss: levels must lie in [0, 1], got {taus.tolist()}")
    marks = read_labels(check, targets, quantiles.new_zeros(len(quantiles)), hard=False, name="targets")
    kept = (marks != PADDING).unsqueeze(1)
    error = torch.where(kept, marks.unsqueeze(1), 0.0) - masked(quantiles, kept)
    taus = taus.to(error.dtype)
    loss = torch.maximum(taus * error, (taus - 1.0) * error)  # 0 in padding, where the error is 0
    return ratio(loss.sum(), kept.sum().to(loss.dtype) * quantiles.shape[1])
