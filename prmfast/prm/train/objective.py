"""A step loss by name, and how many of its units a batch has: what a global mean is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from prmfast.prm.losses import bce_loss, mse_loss, orm_loss, pqm_loss, weighted_quantile_loss
from prmfast.prm.losses._common import PADDING, option

LOSSES = ("pqm", "bce", "mse", "orm")
_VARIANTS = ("pqm", "theorem", "printed", "first_wrong")


@dataclass(frozen=True)
class StepObjective:
    """One of `LOSSES` of the logits at step rows, or with ``levels`` the quantile loss.

    Every loss is a mean over units: rows with a step for "pqm" and "orm", labelled steps for the others. So
    ``loss * units``, summed over the batches of an update and divided by all units, is the loss of the whole update,
    however it is shared out.

    variant, zeta and normalization are those of `pqm_loss`.
    """

    loss: str = "pqm"
    variant: str = "pqm"
    zeta: float = 4.0
    normalization: str = "paper"
    levels: Sequence[float] | None = None

    def __post_init__(self) -> None:
        option("loss", self.loss, LOSSES)
        option("variant", self.variant, _VARIANTS)
        option("normalization", self.normalization, ("paper", "released"))
        if self.normalization == "released" and self.variant in ("theorem", "printed"):
            raise ValueError(f"normalization must be 'paper' for variant={self.variant!r}, got 'released'")

    @property
    def hard(self) -> bool:
        """Whether labels must be 0 or 1."""
        return self.levels is None and self.loss in ("pqm", "orm")

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the units of logits [B, H, k] with labels [B, H]; 0 with zero gradient without a unit."""
        if self.levels is not None:
            kept = labels != PADDING
            return weighted_quantile_loss(logits[kept].sigmoid(), labels[kept], self.levels)
        scores = logits[..., 0]
        if self.loss == "pqm":
            return pqm_loss(
                scores,
                labels,
                zeta=self.zeta,
                variant=cast(Any, self.variant),
                normalization=cast(Any, self.normalization),
            )
        return {"bce": bce_loss, "mse": mse_loss, "orm": orm_loss}[self.loss](scores, labels)

    def units(self, labels: Tensor) -> Tensor:
        """Number of units, an int64 scalar."""
        kept = labels != PADDING
        return (kept.any(1) if self.hard else kept).sum()

    def check(self, labels: Sequence[Sequence[float]]) -> None:
        """ValueError that names the first row with a label that this loss cannot take."""
        for number, row in enumerate(labels):
            bad = [label for label in row if label not in (0.0, 1.0, PADDING)]
            if self.hard and bad:
                raise ValueError(
                    f"labels must be 0 or 1 for loss={self.loss!r}, got {bad[0]:g} in row {number}; success rates "
                    "need 'bce' or 'mse'"
                )


def as_float32(module: torch.nn.Module, hidden: Tensor) -> Tensor:
    """``module(hidden)`` outside of any autocast, in the dtype of its own parameters."""
    with torch.autocast(hidden.device.type, enabled=False):
        result: Tensor = module(hidden)
    return result
