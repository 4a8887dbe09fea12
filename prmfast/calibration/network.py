"""Calibrators that are a network of the context: what CondOT, quantile regression and the beta-binomial head share."""

from __future__ import annotations

import abc
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from prmfast._threads import one_thread
from prmfast.calibration.base import Calibrator, Inputs, Standardiser, context_matrix
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.summary import SummaryContext
from prmfast.calibration.training import FitRecord, LoopOptions, checkpoint_folder, fingerprint, run

Context = Literal["auto", "mlp", "summary"]
Network = TypeVar("Network", bound=nn.Module)

_SUMMARY_ENCODER = ((32,), 0.1)
_ROWS = 8192  # rows a chunk at inference
_ONE_THREAD_BELOW = 300_000  # weights


@dataclass(frozen=True, slots=True)
class FitData:
    """Training and held-out rows beside their contexts [N, c] as the network reads them."""

    train: CalibrationData
    held_out: CalibrationData
    context: Tensor
    held_out_context: Tensor


class NetworkFit(abc.ABC):
    """The state of one fit, driven by `prmfast.calibration.training.run`: networks, optimisers, schedules, generator.

    The first network is the one that is kept.
    """

    def __init__(
        self, networks: Sequence[nn.Module], data: FitData, *, rate: float, steps: int, generator: torch.Generator
    ) -> None:
        self.networks, self.data, self.generator = list(networks), data, generator
        self.optimisers = [
            torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2, fused=True) for network in networks
        ]
        self.schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=steps) for o in self.optimisers]

    @abc.abstractmethod
    def advance(self, step: int) -> None:
        """One optimisation step."""

    @abc.abstractmethod
    def evaluate(self) -> float:
        """The loss on the held-out rows."""

    def batch(self, size: int) -> Tensor:
        """Random rows of the training data, on their device."""
        rows = len(self.data.train)
        return torch.randint(rows, (min(size, rows),), generator=self.generator).to(self.data.context.device)

    def descend(self, which: int, loss: Tensor) -> None:
        """One clipped step of a network down a loss that autograd knows."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.update(which)

    def update(self, which: int) -> None:
        """One clipped step of a network along the gradients that it holds; what is not finite is dropped."""
        norm = torch.nn.utils.clip_grad_norm_(self.networks[which].parameters(), 1.0)
        if math.isfinite(float(norm)):
            self.optimisers[which].step()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the kept network."""
        return {name: tensor.detach().clone() for name, tensor in self.networks[0].state_dict().items()}

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on."""
        return {
            "networks": [network.state_dict() for network in self.networks],
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts `state` back."""
        for name in ("networks", "optimisers", "schedules"):
            for item, saved in zip(getattr(self, name), state[name], strict=True):
                item.load_state_dict(saved)
        self.generator.set_state(state["generator"])


class NetworkCalibrator(Calibrator, Generic[Network]):
    """A calibrator whose quantiles come from a network of the standardised context, or of a summary of it.

    A method of one's own says how its network is built, fitted and read.
    """

    network_: Network
    standardiser_: Standardiser
    summary_: SummaryContext | None
    record_: FitRecord
    context_kind_: str

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
        sizes: dict[str, object] = {"batch_size": batch_size, "patience": patience}
        sizes |= {} if steps is None else {"steps": steps}
        sizes |= {f"encoder[{i}]": size for i, size in enumerate(encoder or ())}
        check_sizes(**sizes)
        if encoder is not None and len(encoder) == 0:
            raise ValueError("encoder must have at least one layer, got ()")
        if dropout is not None and not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if learning_rate is not None and not learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {learning_rate}")
        self.context, self.encoder = context, None if encoder is None else list(encoder)
        self.dropout, self.steps, self.learning_rate = dropout, steps, learning_rate
        self.batch_size, self.patience, self.seed, self.device = batch_size, patience, seed, device

    @abc.abstractmethod
    def _architecture(
        self, context_width: int, encoder: tuple[int, ...], dropout: float, train: CalibrationData
    ) -> dict[str, Any]:
        """Arguments of `_new_network`, ready for JSON."""

    @abc.abstractmethod
    def _new_network(self, architecture: Mapping[str, Any]) -> Network:
        """The network, with any weights."""

    @abc.abstractmethod
    def _new_fit(self, network: Network, data: FitData, steps: int, generator: torch.Generator) -> NetworkFit:
        """Gives ``network`` its first weights and makes the state of its fit."""

    def _kinds(self, train: CalibrationData) -> tuple[str, ...]:
        if self.context != "auto":
            return (self.context,)
        return ("mlp",) if train.hidden is None else ("mlp", "summary")

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
        results = []
        for kind in self._kinds(train):
            summary = SummaryContext(seed=self.seed) if kind == "summary" else None
            parts = contexts
            if summary is not None:
                parts = (
                    summary.fit_transform(train, contexts[0], progress=progress),
                    summary.transform(contexts[1]),
                )
            settings = {**self.hyperparameters(), "kind": kind}
            options = LoopOptions(
                steps=self.steps or default_steps(len(train)),
                patience=self.patience,
                checkpoint_dir=checkpoint_folder(checkpoint_dir, kind),
                fingerprint=fingerprint(settings, train.fingerprint(), held_out.fingerprint()),
                description=f"{type(self).__name__} ({kind})",
                show=progress,
            )
            network, record, architecture = self._fit_network(FitData(train, held_out, *parts), options, kind)
            results.append((record.best_loss, kind, summary, network, record, architecture))
        best = min(results, key=lambda result: result[0])
        _, self.context_kind_, self.summary_, self.network_, self.record_, self.architecture_ = best
        self.standardiser_ = standardiser.cpu()

    def _fit_network(self, data: FitData, options: LoopOptions, kind: str) -> tuple[Network, FitRecord, dict[str, Any]]:
        width = data.context.shape[1]
        encoder, dropout = default_encoder(width, len(data.train)) if kind == "mlp" else _SUMMARY_ENCODER
        encoder = encoder if self.encoder is None else tuple(self.encoder)
        dropout = dropout if self.dropout is None else self.dropout
        architecture = self._architecture(width, encoder, dropout, data.train)
        # fork_rng: the fit is seeded, the caller's own random stream is left as it was
        device = torch.device(self.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            generator = torch.Generator().manual_seed(self.seed)
            network = self._new_network(architecture).to(self.device)
            small = sum(weight.numel() for weight in network.parameters()) < _ONE_THREAD_BELOW
            with one_thread(small):
                weights, record = run(self._new_fit(network, data, options.steps, generator), options)
        network.load_state_dict(weights)
        return network.cpu().eval().requires_grad_(False), record, architecture

    def _chunks(self, inputs: Inputs) -> Iterator[tuple[slice, Tensor]]:
        """(rows, context as the network reads it) of every chunk, where the inputs are."""
        standardiser = self.standardiser_.to(inputs.score.device)
        for start in range(0, len(inputs), _ROWS):
            rows = slice(start, min(start + _ROWS, len(inputs)))
            context = standardiser(context_matrix(inputs.rows(rows.start, rows.stop)))
            yield rows, context if self.summary_ is None else self.summary_.transform(context)

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
        self.network_ = self._new_network(self.architecture_)
        self.network_.load_state_dict(part("network."))
        self.network_.eval().requires_grad_(False)
        scale = part("standardiser.")
        self.standardiser_ = Standardiser(len(scale["mean"]))
        self.standardiser_.load_state_dict(scale)
        self.summary_ = SummaryContext.from_state(tensors) if self.context_kind_ == "summary" else None


def check_sizes(**sizes: object) -> None:
    """TypeError, ValueError: each must be a whole number of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def default_encoder(context_width: int, rows: int) -> tuple[tuple[int, ...], float]:
    """Widths and dropout of the context MLP, the main knob: an unregularised net loses to the marginal."""
    if context_width <= 20:
        return (128, 64), 0.1
    if context_width <= 512:
        return (64, 32), 0.4 if rows < 10_000 else 0.2
    return (256, 64), 0.4


def default_steps(rows: int) -> int:
    """1500 steps at 4,000 rows and 2000 from 40,000 on, logarithmic between; fewer below, 400 at least."""
    if rows < 4000:
        return max(400, round(1500 * math.sqrt(rows / 4000)))
    return round(1500 + 500 * min(1.0, math.log10(rows / 4000)))


def default_learning_rate(rows: int) -> float:
    """1e-3, and 2e-3 from 20,000 rows on."""
    return 2e-3 if rows >= 20_000 else 1e-3
