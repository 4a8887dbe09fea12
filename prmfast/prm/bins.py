"""Success rates as bin tokens, the label format of quantile-regression training sets ([U] arXiv 2506.09338).

A training text carries one extra token per step whose id, counted from a pivot, is the bin of the step's success
rate; every other label is -100. Binning floors: k of 8 is exact in 9 bins and not in 11. Training on the rates
themselves (`losses.weighted_quantile_loss`) needs none of this.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prmfast.ops._contract import Check
from prmfast.prm.losses._common import PADDING


def rate_bins(rates: Tensor, n_bins: int) -> Tensor:
    """Bin of each success rate [N] in [0, 1]: the largest i with i / (n_bins - 1) <= rate; int64 [N]."""
    check = Check("rate_bins")
    check.tensor("rates", rates, ndim=1, dtypes=(torch.float64, torch.float32))
    check.integer("n_bins", n_bins, low=2)
    values = rates.detach().cpu().double().numpy()
    if not ((values >= 0) & (values <= 1)).all():
        row = int(np.flatnonzero(~((values >= 0) & (values <= 1)))[0])
        raise ValueError(f"rate_bins: rates must lie in [0, 1], got {values[row]} at row {row}")
    return torch.from_numpy(np.digitize(values, np.linspace(0.0, 1.0, n_bins)) - 1).to(rates.device)


def bin_rates(labels: Tensor, *, pivot: int, n_bins: int) -> Tensor:
    """``(label - pivot) / (n_bins - 1)`` of bin tokens, float64 of the shape of ``labels`` (integers); -100 stays."""
    check = Check("bin_rates")
    check.tensor("labels", labels, ndim=(1, 2), dtypes=(torch.int64, torch.int32))
    check.integer("n_bins", n_bins, low=2)
    kept = labels != PADDING
    bad = kept & ((labels < pivot) | (labels >= pivot + n_bins))
    if bool(bad.any()):
        token = int(labels[bad][0])
        raise ValueError(f"bin_rates: labels must lie in [{pivot}, {pivot + n_bins}) or be -100, got {token}")
    return torch.where(kept, (labels - pivot).double() / (n_bins - 1), float(PADDING))


def step_rows(logits: Tensor, labels: Tensor, *, offset: int = 1) -> tuple[Tensor, Tensor]:
    """The rows of ``logits`` [B, T, K] that answer the labels [B, T] other than -100, and those labels: [N, K] and [N].

    A label's row stands ``offset`` tokens before it: 1 for Qwen2.5-Math-PRM and Math-Shepherd, 2 for ReasonEval.
    """
    check = Check("step_rows")
    check.tensor("logits", logits, ndim=3)
    check.tensor("labels", labels, ndim=2, dtypes=(torch.int64, torch.int32))
    check.shape("labels", labels, tuple(logits.shape[:2]))
    check.integer("offset", offset, low=0)
    row, place = (labels != PADDING).nonzero(as_tuple=True)
    if bool((place < offset).any()):
        raise ValueError(f"step_rows: labels must stand at column {offset} or later, got one at {int(place.min())}")
    return logits[row, place - offset], labels[row, place]
