"""Quantile regression on PRM features: one output per level, nothing that keeps the levels in order [U]."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from prmfast.calibration.base import LEVELS, Inputs, check_levels
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.head import HeadCalibrator
from prmfast.calibration.metrics import crossing_rate
from prmfast.calibration.network import Context
from prmfast.calibration.objectives import pinball

Head = Literal["linear", "mlp"]
Link = Literal["sigmoid", "identity"]
Point = Literal["median", "mean"]


def qr_forward(hidden: Tensor, weight: Tensor, bias: Tensor, *, link: Link = "identity") -> Tensor:
    """``q = hidden @ weight.T + bias``, through a sigmoid with link="sigmoid": [N, D], [M, D], [M] -> [N, M]."""
    raw = functional.linear(hidden, weight, bias)
    return torch.sigmoid(raw) if link == "sigmoid" else raw


class QuantileRegressionCalibrator(HeadCalibrator):
    """The baseline of [U] and [D]: pinball regression of k/n at fixed levels, from the same inputs as CondOT.

    Args:
        head: "linear" in the standardised context, or a small "mlp" of the sizes that CondOT takes.
        levels: ascending, at least two; `quantile` at other levels is linear between them and constant beyond them.
        link: "sigmoid" keeps quantiles in (0, 1).
        sort: rearranges each row's quantiles into ascending order ("sorted (rearranged)" in tables).
        point: what `expected` gives unless asked otherwise, "median" as [D] judges it, or "mean".
        context, encoder, dropout, steps, learning_rate, batch_size, patience, seed, device: as in CondOTCalibrator.

    After `fit`, ``crossing_rate_`` is the share of adjacent levels that cross on the held-out rows, before any sorting.
    """

    def __init__(
        self,
        head: Head = "linear",
        *,
        levels: Sequence[float] = LEVELS,
        link: Link = "identity",
        sort: bool = False,
        point: Point = "median",
        context: Context = "mlp",
        encoder: Sequence[int] | None = None,
        dropout: float | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        batch_size: int = 256,
        patience: int = 175,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        for name, value, allowed in (
            ("head", head, ("linear", "mlp")),
            ("link", link, ("sigmoid", "identity")),
            ("point", point, ("median", "mean")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        super().__init__(
            context=context,
            encoder=encoder,
            dropout=dropout,
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            patience=patience,
            seed=seed,
            device=device,
        )
        checked = check_levels(list(levels), 1, torch.device("cpu"))
        if len(checked) < 2 or bool((checked.diff() <= 0).any()):
            raise ValueError(f"levels must be at least 2 and ascending, got {list(levels)}")
        self.head, self.levels, self.link, self.sort, self.point = head, list(levels), link, sort, point
        self.linear = head == "linear"
        self._levels = checked

    @property
    def name(self) -> str:
        """What tables and plots call this model."""
        return f"QR {self.head}{', sorted (rearranged)' if self.sort else ''}"

    def _initial_outputs(self, train: CalibrationData) -> Tensor:
        marginal = np.quantile(train.target.double().numpy(force=True), self.levels)
        start = torch.from_numpy(marginal).float()
        return torch.logit(start.clamp(0.02, 0.98)) if self.link == "sigmoid" else start

    def _loss(self, raw: Tensor, data: CalibrationData, rows: Tensor | slice) -> Tensor:
        quantiles = torch.sigmoid(raw) if self.link == "sigmoid" else raw
        return pinball(quantiles, data.target[rows], self._levels.to(raw.device))

    def _fit(
        self,
        data: CalibrationData,
        validation: CalibrationData | None,
        *,
        progress: bool,
        checkpoint_dir: str | os.PathLike[str] | None,
    ) -> None:
        super()._fit(data, validation, progress=progress, checkpoint_dir=checkpoint_dir)
        self.provenance_ = self.provenance_.model_copy(update={"levels": self.levels})
        held_out = data.split(seed=self.seed)[1] if validation is None else validation
        with torch.no_grad():
            self.crossing_rate_ = crossing_rate(self._raw(self._inputs(held_out)))

    def _quantile(self, inputs: Inputs, levels: Tensor) -> Tensor:
        raw = self._raw(inputs)
        values = torch.sigmoid(raw) if self.link == "sigmoid" else raw
        if self.sort:
            values = values.sort(dim=1).values
        own = self._levels.to(levels.device)
        right = torch.searchsorted(own, levels.contiguous()).clamp(1, len(own) - 1)
        share = ((levels - own[right - 1]) / (own[right] - own[right - 1])).clamp(0.0, 1.0)
        shape = (len(values), levels.shape[-1])
        right, share = right.expand(shape), share.expand(shape)
        low, high = values.gather(1, right - 1), values.gather(1, right)
        # lerp with weight 1 need not return the end point exactly
        return torch.where(share == 1.0, high, torch.lerp(low, high, share))

    def expected(
        self, data: CalibrationData | Tensor, score: Tensor | None = None, *, kind: Point | None = None
    ) -> Tensor:
        """The median [B], or with kind="mean" the trapezoid over 11 levels; ``kind`` defaults to ``point``."""
        chosen = self.point if kind is None else kind
        if chosen == "median":
            return self.quantile(data, 0.5, score)[:, 0]
        if chosen == "mean":
            return super().expected(data, score)
        raise ValueError(f"kind must be 'median' or 'mean', got {chosen!r}")

    def _fitted(self) -> dict[str, Any]:
        return {**super()._fitted(), "crossing_rate": self.crossing_rate_}

    def _restore(self, tensors: Mapping[str, Tensor], fitted: Mapping[str, Any]) -> None:
        super()._restore(tensors, fitted)
        self.crossing_rate_ = float(fitted["crossing_rate"])
