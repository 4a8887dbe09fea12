"""Small context networks with a loss on top: what quantile regression and the beta-binomial head share."""

from __future__ import annotations

import abc
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prmfast.calibration.base import Calibrator, Inputs, Standardiser, context_matrix
from prmfast.calibration.condot import default_encoder, default_learning_rate, default_steps
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.summary import SummaryContext
from prmfast.calibration.training import FitRecord, LoopOptions, checkpoint_folder, fingerprint, run

Context = Literal["auto", "mlp", "summary"]

_ROWS = 65_536  # rows a chunk at inference


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


class NetworkCalibrator(Calibrator):
    """A calibrator whose distribution has a fixed number of parameters, given by a network of the context.

    A method of one's own says how many outputs it has, where they start and what their loss is.
    """

    network_: ContextNetwork
    standardiser_: Standardiser
    summary_: SummaryContext | None
    record_: FitRecord
    linear = False

    def __init__(
        self,
        *,
        context: Context,
        encoder: Sequence[int] | None,
        dropout: float | None,
        steps: int | None,
        learning_rate: float | None,
        batch_size: int,
        patience: int,
        seed: int,
        device: str,
    ) -> None:
        if context not in get_args(Context):
            raise ValueError(f"context must be one of {get_args(Context)}, got {context!r}")
        sizes = {"batch_size": batch_size, "patience": patience}
        sizes |= {} if steps is None else {"steps": steps}
        sizes |= {f"encoder[{i}]": size for i, size in enumerate(encoder or ())}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dropout is not None and not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if learning_rate is not None and not learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {learning_rate}")
        self.context, self.encoder = context, None if encoder is None else list(encoder)
        self.dropout, self.steps, self.learning_rate = dropout, steps, learning_rate
        self.batch_size, self.patience, self.seed, self.device = batch_size, patience, seed, device

    @abc.abstractmethod
    def _initial_outputs(self, train: CalibrationData) -> Tensor:
        """Raw outputs [o] that describe the marginal distribution."""

    @abc.abstractmethod
    def _loss(self, raw: Tensor, data: CalibrationData, rows: Tensor | slice) -> Tensor:
        """Mean loss of raw outputs [b, o] for those rows of ``data``; the validation loss is the same."""

    def _fit(
        self,
        data: CalibrationData,
        validation: CalibrationData | None,
        *,
        progress: bool,
        checkpoint_dir: str | os.PathLike[str] | None,
    ) -> None:
        train, held_out = data.split(seed=self.seed) if validation is None else (data, validation)
        train, held_out = train.to(self.device), held_out.to(self.device)
        raw = context_matrix(self._inputs(train))
        standardiser = Standardiser(raw.shape[1]).to(self.device).fit(raw)
        contexts = standardiser(raw), standardiser(context_matrix(self._inputs(held_out)))
        kinds: tuple[str, ...] = (self.context,)
        if self.context == "auto":
            kinds = ("mlp", "summary") if train.hidden is not None and not self.linear else ("mlp",)
        results = []
        for kind in kinds:
            summary = SummaryContext(seed=self.seed) if kind == "summary" else None
            parts = contexts
            if summary is not None:
                parts = summary.fit_transform(train, contexts[0]), summary.transform(contexts[1])
            options = LoopOptions(
                steps=self.steps or default_steps(len(train)),
                patience=self.patience,
                checkpoint_dir=checkpoint_folder(checkpoint_dir, kind),
                fingerprint=fingerprint(
                    {**self.hyperparameters(), "kind": kind}, train.fingerprint(), held_out.fingerprint()
                ),
                description=f"{type(self).__name__} ({kind})",
                show=progress,
            )
            network, record, architecture = self._fit_network(train, held_out, parts, options, kind)
            results.append((record.best_loss, kind, summary, network, record, architecture))
        best = min(results, key=lambda result: result[0])
        _, self.context_kind_, self.summary_, self.network_, self.record_, self.architecture_ = best
        self.standardiser_ = standardiser.cpu()

    def _fit_network(
        self,
        train: CalibrationData,
        held_out: CalibrationData,
        contexts: tuple[Tensor, Tensor],
        options: LoopOptions,
        kind: str,
    ) -> tuple[ContextNetwork, FitRecord, dict[str, Any]]:
        start = self._initial_outputs(train)
        encoder, dropout = default_encoder(contexts[0].shape[1], len(train)) if kind == "mlp" else ((32,), 0.1)
        encoder = encoder if self.encoder is None else tuple(self.encoder)
        architecture: dict[str, Any] = {
            "context_width": contexts[0].shape[1],
            "encoder": [] if self.linear else list(encoder),
            "dropout": dropout if self.dropout is None else self.dropout,
            "outputs": len(start),
        }
        # fork_rng: the fit is seeded, the caller's own random stream is left as it was
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = ContextNetwork(**architecture)
            network.start_at(start)
            fit = _Fit(self, network.to(self.device), (train, held_out), contexts, options.steps)
            weights, record = run(fit, options)
        network.load_state_dict(weights)
        return network.cpu().eval().requires_grad_(False), record, architecture

    def _raw(self, inputs: Inputs) -> Tensor:
        """Raw outputs [B, o] of the fitted network, where the inputs are."""
        device = inputs.score.device
        network, standardiser = self.network_.to(device), self.standardiser_.to(device)
        parts = []
        for start in range(0, len(inputs), _ROWS):
            context = standardiser(context_matrix(inputs.rows(start, start + _ROWS)))
            parts.append(network(context if self.summary_ is None else self.summary_.transform(context)))
        return torch.cat(parts) if parts else inputs.score.new_zeros(0, network.head.out_features)

    def _state(self) -> dict[str, Tensor]:
        state = {f"network.{name}": tensor for name, tensor in self.network_.state_dict().items()}
        state |= {f"standardiser.{name}": tensor for name, tensor in self.standardiser_.state_dict().items()}
        return state | (self.summary_.state() if self.summary_ is not None else {})

    def _fitted(self) -> dict[str, Any]:
        return {"context_kind": self.context_kind_, "architecture": self.architecture_, "record": asdict(self.record_)}

    def _restore(self, tensors: Mapping[str, Tensor], fitted: Mapping[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.context_kind_, self.architecture_ = fitted["context_kind"], dict(fitted["architecture"])
        self.record_ = FitRecord(**fitted["record"])
        self.network_ = ContextNetwork(**self.architecture_)
        self.network_.load_state_dict(part("network."))
        self.network_.eval().requires_grad_(False)
        scale = part("standardiser.")
        self.standardiser_ = Standardiser(len(scale["mean"]))
        self.standardiser_.load_state_dict(scale)
        self.summary_ = SummaryContext.from_state(tensors) if self.context_kind_ == "summary" else None


class _Fit:
    """The state of one fit, driven by `prmfast.calibration.training.run`."""

    def __init__(
        self,
        owner: NetworkCalibrator,
        network: ContextNetwork,
        data: tuple[CalibrationData, CalibrationData],
        contexts: tuple[Tensor, Tensor],
        steps: int,
    ) -> None:
        self.owner, self.network = owner, network
        (self.data, self.held_out), (self.context, self.held_out_context) = data, contexts
        rate = owner.learning_rate or default_learning_rate(len(self.data), "likelihood")
        self.optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, T_max=steps)

    def advance(self, step: int) -> None:
        """One step on a random batch."""
        self.network.train()
        rows = torch.randint(len(self.data), (min(self.owner.batch_size, len(self.data)),)).to(self.context.device)
        loss = self.owner._loss(self.network(self.context[rows]), self.data, rows)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if math.isfinite(float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0))):
            self.optimiser.step()
        self.schedule.step()

    @torch.no_grad()
    def evaluate(self) -> float:
        """The same loss on the held-out rows, without dropout."""
        self.network.eval()
        return float(self.owner._loss(self.network(self.held_out_context), self.held_out, slice(None)))

    def weights(self) -> dict[str, Tensor]:
        """A copy of the network."""
        return {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Network, optimiser and schedule; the loop keeps the random state."""
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts `state` back."""
        for name in ("network", "optimiser", "schedule"):
            getattr(self, name).load_state_dict(state[name])
