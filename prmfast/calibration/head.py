"""Calibrators whose distribution has a fixed number of parameters: a network of the context makes them all."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prmfast.calibration.base import Inputs
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.network import FitData, NetworkCalibrator, NetworkFit, default_learning_rate


class ContextNetwork(nn.Module):
    """Standardised context [B, c] -> raw outputs [B, o]: linear layers, SiLU, dropout; no layer is a linear head."""

    def __init__(self, context_width: int, *, encoder: Sequence[int], dropout: float, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = context_width
        for size in encoder:
            layers += [nn.Linear(width, size), nn.SiLU(), nn.Dropout(dropout)]
            width = size
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, outputs)

    @torch.no_grad()
    def start_at(self, bias: Tensor) -> None:
        """Makes every output close to ``bias`` for every context."""
        self.head.weight.mul_(0.1)
        self.head.bias.copy_(bias)

    def forward(self, context: Tensor) -> Tensor:
        """Raw outputs."""
        raw: Tensor = self.head(self.body(context))
        return raw


class HeadCalibrator(NetworkCalibrator[ContextNetwork]):
    """A method of one's own says where the raw outputs start and what their loss is."""

    linear = False

    @abc.abstractmethod
    def _initial_outputs(self, train: CalibrationData) -> Tensor:
        """Raw outputs [o] that describe the marginal distribution."""

    @abc.abstractmethod
    def _loss(self, raw: Tensor, data: CalibrationData, rows: Tensor | slice) -> Tensor:
        """Mean loss of raw outputs [b, o] for those rows of ``data``; the validation loss is the same."""

    def _kinds(self, train: CalibrationData) -> tuple[str, ...]:
        kinds = super()._kinds(train)
        return kinds[:1] if self.linear else kinds

    def _architecture(
        self, context_width: int, encoder: tuple[int, ...], dropout: float, train: CalibrationData
    ) -> dict[str, Any]:
        return {
            "context_width": context_width,
            "encoder": [] if self.linear else list(encoder),
            "dropout": dropout,
            "outputs": len(self._initial_outputs(train)),
        }

    def _new_network(self, architecture: Mapping[str, Any]) -> ContextNetwork:
        return ContextNetwork(**architecture)

    def _new_fit(self, network: ContextNetwork, data: FitData, steps: int, generator: torch.Generator) -> NetworkFit:
        network.start_at(self._initial_outputs(data.train))
        return _HeadFit(self, network, data, steps, generator)

    def _raw(self, inputs: Inputs) -> Tensor:
        """Raw outputs [B, o] of the fitted network, where the inputs are."""
        network = self.network_.to(inputs.score.device)
        parts = [network(context) for _, context in self._chunks(inputs)]
        return torch.cat(parts) if parts else inputs.score.new_zeros(0, network.head.out_features)


class _HeadFit(NetworkFit):
    def __init__(
        self, owner: HeadCalibrator, network: ContextNetwork, data: FitData, steps: int, generator: torch.Generator
    ) -> None:
        self.owner = owner
        rate = owner.learning_rate or default_learning_rate(len(data.train))
        super().__init__([network], data, rate=rate, steps=steps, generator=generator)

    def advance(self, step: int) -> None:
        network = self.networks[0].train()
        rows = self.batch(self.owner.batch_size)
        self.descend(0, self.owner._loss(network(self.data.context[rows]), self.data.train, rows))
        self.schedules[0].step()

    @torch.no_grad()
    def evaluate(self) -> float:
        network = self.networks[0].eval()
        return float(self.owner._loss(network(self.data.held_out_context), self.data.held_out, slice(None)))
