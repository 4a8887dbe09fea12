"""The 0/1-inflated beta-binomial head: a parametric law of p itself, fitted by the exact likelihood of k of n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prmfast.calibration.base import Inputs
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.head import HeadCalibrator
from prmfast.calibration.network import Context

_LOG_CONCENTRATION = (-3.0, 7.0)  # alpha + beta between 0.05 and 1,100


@dataclass(frozen=True, slots=True)
class InflatedBeta:
    """p is 0, 1, or Beta(alpha, beta) with log probabilities ``log_weights`` [B, 3]; alpha, beta [B]; float64."""

    log_weights: Tensor
    alpha: Tensor
    beta: Tensor

    @classmethod
    def from_raw(cls, raw: Tensor) -> InflatedBeta:
        """From network outputs [B, 4]: two logits against the Beta part, logit of its mean, log of alpha + beta."""
        raw = raw.double()
        weights = torch.log_softmax(torch.cat((raw[:, :2], torch.zeros_like(raw[:, :1])), dim=1), dim=1)
        low, high = _LOG_CONCENTRATION
        # a scaled sigmoid, not a clamp: the gradient never dies at the ends
        concentration = torch.exp(low + (high - low) * torch.sigmoid(raw[:, 3]))
        mean = torch.sigmoid(raw[:, 2]) * (1.0 - 2e-4) + 1e-4
        return cls(weights, mean * concentration, (1.0 - mean) * concentration)

    @property
    def atoms(self) -> tuple[Tensor, Tensor]:
        """P(p = 0) and P(p = 1), each [B]."""
        weights = self.log_weights.exp()
        return weights[:, 0], weights[:, 1]

    def mean(self) -> Tensor:
        """E[p] exactly."""
        weights = self.log_weights.exp()
        return weights[:, 1] + weights[:, 2] * self.alpha / (self.alpha + self.beta)

    def log_likelihood(self, successes: Tensor, trials: Tensor) -> Tensor:
        """log P(k of n) without the binomial coefficient, [B]: the mixture with p integrated out."""
        k, n = successes.double(), trials.double()
        zero, one, inside = self.log_weights.unbind(1)
        inner = inside + _log_beta(self.alpha + k, self.beta + n - k) - _log_beta(self.alpha, self.beta)
        never = torch.where(k == 0, zero, -torch.inf)
        always = torch.where(k == n, one, -torch.inf)
        return torch.logsumexp(torch.stack((inner, never, always)), dim=0)

    def quantile(self, levels: Tensor) -> Tensor:
        """Exact inverse of the mixture's distribution function at levels [M] or [B, M]: [B, M] float64."""
        from scipy.special import betaincinv

        zero, one, alpha, beta = (x.numpy(force=True)[:, None] for x in (*self.atoms, self.alpha, self.beta))
        at = np.broadcast_to(levels.double().numpy(force=True), (len(zero), levels.shape[-1]))
        inner = np.clip((at - zero) / np.maximum(1.0 - zero - one, 1e-300), 0.0, 1.0)
        values = np.where(at <= zero, 0.0, np.where(at >= 1.0 - one, 1.0, betaincinv(alpha, beta, inner)))
        return torch.from_numpy(values).to(self.alpha.device)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


class BetaBinomialCalibrator(HeadCalibrator):
    """p given the context is 0 with pi0, 1 with pi1, else Beta(alpha, beta); four outputs of CondOT's context network.

    Any number of trials per row enters by its exact likelihood. Quantiles invert the mixture exactly and `expected` is
    its exact mean. Arguments as in CondOTCalibrator.
    """

    def __init__(
        self,
        *,
        context: Context = "auto",
        encoder: Sequence[int] | None = None,
        dropout: float | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        batch_size: int = 256,
        patience: int = 175,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
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

    def _initial_outputs(self, train: CalibrationData) -> Tensor:
        """Mean and spread of k/n; the atoms start at half the share of rows with several trials that sit on them."""
        k, n = train.successes.double(), train.trials.double()
        several = n > 1
        at_end = [float(((k == end) & several).sum() / several.sum().clamp(min=1)) for end in (torch.zeros_like(n), n)]
        zero, one = (min(max(0.5 * share, 0.01), 0.4) for share in at_end)
        rate = float(k.sum() / n.sum())
        mean = min(max((rate - one) / (1.0 - zero - one), 0.05), 0.95)
        rest = 1.0 - zero - one
        logits = [np.log(zero / rest), np.log(one / rest), np.log(mean / (1.0 - mean))]
        low, high = _LOG_CONCENTRATION
        share = (np.log(2.0) - low) / (high - low)
        return torch.tensor([*logits, np.log(share / (1.0 - share))], dtype=torch.float32)

    def _loss(self, raw: Tensor, data: CalibrationData, rows: Tensor | slice) -> Tensor:
        law = InflatedBeta.from_raw(raw)
        return -law.log_likelihood(data.successes[rows], data.trials[rows]).mean()

    def law(self, data: CalibrationData | Tensor, score: Tensor | None = None) -> InflatedBeta:
        """The fitted law of every row."""
        with torch.no_grad():
            return InflatedBeta.from_raw(self._raw(self._inputs(data, score)))

    def _quantile(self, inputs: Inputs, levels: Tensor) -> Tensor:
        return InflatedBeta.from_raw(self._raw(inputs)).quantile(levels).float()

    def expected(self, data: CalibrationData | Tensor, score: Tensor | None = None) -> Tensor:
        """The exact mean of the law, [B] float32."""
        return self.law(data, score).mean().float()
