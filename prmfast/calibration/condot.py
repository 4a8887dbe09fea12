"""CondOT: the conditional quantile function of the success probability, increasing in the level by construction."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from prmfast.calibration import objectives
from prmfast.calibration.base import LEVELS, Calibrator, Inputs, Standardiser, context_matrix
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.picnn import ConditionalPicnn, Curve, beta_quantiles, smoothed_quantiles
from prmfast.calibration.summary import SummaryContext
from prmfast.calibration.training import FitRecord, LoopOptions, checkpoint_folder, fingerprint, run
from prmfast.ops import picnn_map

Objective = Literal["binomial", "crps", "dual"]
Link = Literal["sigmoid", "clip"]
Context = Literal["auto", "mlp", "summary"]
Selection = Literal["auto", "wql", "likelihood", "area"]

_LEVELS_PER_ROW = 8  # stratified; 16 changed nothing for any objective
_VALIDATION_LEVELS = 32
_CONJUGATE_EVERY = 5  # dual: steps of the map between two steps of the conjugate potential
_SUMMARY_ENCODER = (32,)
_QUANTILE_ROWS = 8192  # rows a chunk


class CondOTCalibrator(Calibrator):
    """Fits T(beta, h) = dg/dx of a partially input-convex network: Q(beta | h), every level at once ([D] sec. 4, [C]).

    Args:
        objective: "binomial" (maximum likelihood of k of n; fits the law of p itself, which budgets need), "crps"
            (pinball at random levels; fits k/n) or "dual" (the paper's min-max; fits k/n).
        link: "sigmoid" bounds the map inside the network, "clip" cuts it to [0, 1] outside.
        context: "mlp" reads [hidden or features, logit score]; "summary" reads seven cross-fitted views of it; "auto"
            fits both where there are hidden states and keeps the better validation loss.
        width, depth: of the layers convex in the level.
        encoder, dropout: widths of the context MLP and its dropout; None chooses by the number of rows and their width.
        steps, learning_rate: None chooses by the number of rows.
        batch_size, patience: rows a step; evaluations without an improvement of 1e-4 before the fit stops.
        selection: validation loss that picks the kept weights; "auto" is "likelihood" for binomial, else "wql";
            "area" is the rule of [D] (it can prefer useless models).
        source: "uniform", or (dual only) "score": a row's level is the rank of its own score instead of a random one.
        seed, device: of the fit; quantiles are computed where the inputs are.
    """

    reads = "context"

    def __init__(
        self,
        objective: Objective = "binomial",
        *,
        link: Link = "sigmoid",
        context: Context = "auto",
        width: int = 32,
        depth: int = 2,
        encoder: Sequence[int] | None = None,
        dropout: float | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        batch_size: int = 256,
        patience: int = 175,
        selection: Selection = "auto",
        source: Literal["uniform", "score"] = "uniform",
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.objective, self.link, self.context, self.selection, self.source = (
            objective,
            link,
            context,
            selection,
            source,
        )
        self.width, self.depth, self.batch_size, self.patience, self.seed = width, depth, batch_size, patience, seed
        self.encoder = None if encoder is None else list(encoder)
        self.dropout, self.steps, self.learning_rate, self.device = dropout, steps, learning_rate, device
        self._check_arguments()

    def _check_arguments(self) -> None:
        choices = (("objective", Objective), ("link", Link), ("context", Context), ("selection", Selection))
        for name, allowed in choices:
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}")
        if self.source not in ("uniform", "score") or (self.source == "score" and self.objective != "dual"):
            raise ValueError(f"source must be 'uniform', or 'score' with objective='dual', got {self.source!r}")
        for name in ("width", "depth", "batch_size", "patience"):
            _whole(name, getattr(self, name))
        for size in self.encoder or ():
            _whole("encoder", size)
        if self.encoder == []:
            raise ValueError("encoder must have at least one layer, got ()")
        if self.steps is not None:
            _whole("steps", self.steps)
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")

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
        wide = train.hidden is not None
        kinds = (("mlp", "summary") if wide else ("mlp",)) if self.context == "auto" else (self.context,)
        results = []
        for kind in kinds:
            summary = SummaryContext(seed=self.seed) if kind == "summary" else None
            parts = (
                contexts
                if summary is None
                else (summary.fit_transform(train, contexts[0]), summary.transform(contexts[1]))
            )
            mark = fingerprint({**self.hyperparameters(), "kind": kind}, train.fingerprint(), held_out.fingerprint())
            options = LoopOptions(
                steps=self.steps or default_steps(len(train)),
                patience=self.patience,
                checkpoint_dir=checkpoint_folder(checkpoint_dir, kind),
                fingerprint=mark,
                description=f"CondOT {self.objective} ({kind})",
                show=progress,
            )
            results.append((kind, summary, *self._fit_network(train, held_out, parts, options, kind)))
        kind, summary, network, record = min(results, key=lambda result: result[3].best_loss)
        self.network_, self.standardiser_, self.summary_, self.record_ = network, standardiser.cpu(), summary, record
        self.context_kind_ = kind

    def _fit_network(
        self,
        train: CalibrationData,
        held_out: CalibrationData,
        contexts: tuple[Tensor, Tensor],
        options: LoopOptions,
        kind: str,
    ) -> tuple[ConditionalPicnn, FitRecord]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            generator = torch.Generator().manual_seed(self.seed)
            network = self._network(contexts[0].shape[1], len(train), kind)
            network.initialise(self._initial_curve(train), generator=generator)
            fit = _Fit(self, network.to(self.device), train, held_out, contexts, options.steps, generator)
            best, record = run(fit, options)
        network.load_state_dict(best)
        return network.cpu().eval().requires_grad_(False), record

    def _network(self, context_width: int, rows: int, kind: str) -> ConditionalPicnn:
        encoder, dropout = default_encoder(context_width, rows) if kind == "mlp" else (_SUMMARY_ENCODER, 0.1)
        encoder = encoder if self.encoder is None else tuple(self.encoder)
        dropout = dropout if self.dropout is None else self.dropout
        return ConditionalPicnn(context_width, encoder=encoder, dropout=dropout, width=self.width, depth=self.depth)

    def _initial_curve(self, train: CalibrationData) -> Curve:
        """The marginal quantile function that the map starts from, before the link."""
        if self.objective == "binomial":
            curve = beta_quantiles(train.successes.double().numpy(force=True), train.trials.double().numpy(force=True))
        else:
            curve = smoothed_quantiles(train.target.double().numpy(force=True))
        if self.link == "clip":
            return curve
        inside = np.clip(curve, 0.02, 0.98)
        return np.asarray(np.log(inside) - np.log1p(-inside))

    def _apply_link(self, raw: Tensor) -> Tensor:
        return torch.sigmoid(raw) if self.link == "sigmoid" else raw

    def _quantile(self, inputs: Inputs, levels: Tensor) -> Tensor:
        rows = len(inputs)
        parts = []
        for start in range(0, rows, _QUANTILE_ROWS):
            chunk = inputs.rows(start, min(start + _QUANTILE_ROWS, rows))
            own = levels if levels.ndim == 1 else levels[start : start + len(chunk)]
            parts.append(self._quantile_chunk(chunk, own))
        return torch.cat(parts) if parts else inputs.score.new_zeros(0, levels.shape[-1])

    def _quantile_chunk(self, inputs: Inputs, levels: Tensor) -> Tensor:
        device = inputs.score.device
        context = self.standardiser_.to(device)(context_matrix(inputs))
        if self.summary_ is not None:
            context = self.summary_.transform(context)
        _, raw = picnn_map(self.network_.to(device).params(), context, levels)
        return rounded_up(self._apply_link(raw), levels)

    def _state(self) -> dict[str, Tensor]:
        state = {f"network.{name}": tensor for name, tensor in self.network_.state_dict().items()}
        state |= {f"standardiser.{name}": tensor for name, tensor in self.standardiser_.state_dict().items()}
        return state | (self.summary_.state() if self.summary_ is not None else {})

    def _fitted(self) -> dict[str, Any]:
        return {
            "context_kind": self.context_kind_,
            "architecture": self.network_.architecture,
            "record": asdict(self.record_),
        }

    def _restore(self, tensors: Mapping[str, Tensor], fitted: Mapping[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.context_kind_ = fitted["context_kind"]
        self.record_ = FitRecord(**fitted["record"])
        self.network_ = ConditionalPicnn(**fitted["architecture"], width=self.width, depth=self.depth)
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
        owner: CondOTCalibrator,
        network: ConditionalPicnn,
        train: CalibrationData,
        held_out: CalibrationData,
        contexts: tuple[Tensor, Tensor],
        steps: int,
        generator: torch.Generator,
    ) -> None:
        self.owner, self.network, self.generator = owner, network, generator
        self.data, self.held_out, (self.context, self.held_out_context) = train, held_out, contexts
        self.target = train.target
        order = train.score.argsort(stable=True).argsort(stable=True)
        self.score_level = (order + 0.5) / len(train)
        rate = owner.learning_rate or default_learning_rate(len(train), owner.objective)
        self.networks = [network]
        if owner.objective == "dual":
            conjugate = ConditionalPicnn(**network.architecture, width=owner.width, depth=owner.depth)  # type: ignore[arg-type]
            conjugate.initialise(_inverse_curve(train.target.double().numpy(force=True)), generator=generator)
            self.networks.append(conjugate.to(contexts[0].device))
        self.optimisers = [
            torch.optim.AdamW(n.parameters(), lr=rate, weight_decay=1e-2, fused=True) for n in self.networks
        ]
        self.schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=steps) for o in self.optimisers]

    def advance(self, step: int) -> None:
        """One step on a random batch."""
        for n in self.networks:
            n.train()
        rows = torch.randint(len(self.data), (min(self.owner.batch_size, len(self.data)),), generator=self.generator)
        levels = objectives.stratified_levels(len(rows), _LEVELS_PER_ROW, self.generator)
        rows, levels = rows.to(self.context.device), levels.to(self.context.device)
        if self.owner.objective == "dual":
            self._advance_dual(step, rows, levels)
        else:
            mapped = self._map(self.context[rows], levels)
            self._descend(0, self._loss(mapped, rows, levels))
        for schedule in self.schedules:
            schedule.step()

    def _map(self, context: Tensor, levels: Tensor) -> Tensor:
        return self.owner._apply_link(self.network(context, levels)[1])

    def _loss(self, mapped: Tensor, rows: Tensor, levels: Tensor) -> Tensor:
        if self.owner.objective == "binomial":
            return objectives.binomial_nll(mapped, self.data.successes[rows].float(), self.data.trials[rows].float())
        return objectives.pinball(mapped, self.target[rows], levels)

    def _advance_dual(self, step: int, rows: Tensor, levels: Tensor) -> None:
        conjugate, context = self.networks[1], self.context[rows]
        if self.owner.source == "score":
            levels = self.score_level[rows].to(levels).unsqueeze(1)
        mapped = self._map(context, levels)
        self._descend(0, objectives.dual_map_loss(conjugate(context, mapped)[0], mapped, levels))
        if step % _CONJUGATE_EVERY == 0:
            with torch.no_grad():
                mapped = self._map(context, levels)
            points = torch.cat([self.target[rows].unsqueeze(1), mapped], 1)
            value, _ = conjugate(context, points)
            self._descend(1, objectives.dual_conjugate_loss(value[:, :1], value[:, 1:]))

    def _descend(self, which: int, loss: Tensor) -> None:
        optimiser = self.optimisers[which]
        for other in self.optimisers:
            other.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.networks[which].parameters(), 1.0)
        if math.isfinite(float(norm)):
            optimiser.step()

    @torch.no_grad()
    def evaluate(self) -> float:
        """The selection loss on the held-out rows."""
        self.network.eval()
        rule = self.owner.selection
        if rule == "auto":
            rule = "likelihood" if self.owner.objective == "binomial" else "wql"
        context = self.held_out_context
        if rule == "likelihood":
            levels = (torch.arange(_VALIDATION_LEVELS, device=context.device) + 0.5) / _VALIDATION_LEVELS
            mapped = self._map(context, levels)
            return float(objectives.binomial_nll(mapped, self.held_out.successes.float(), self.held_out.trials.float()))
        levels = torch.tensor(LEVELS, device=context.device)
        quantiles, target = self._map(context, levels).clamp(0.0, 1.0), self.held_out.target
        if rule == "wql":
            return float(objectives.pinball(quantiles, target, levels))
        curve = (target.unsqueeze(1) <= quantiles).double().mean(0)
        return float(torch.trapezoid((curve - levels.double()).abs(), levels.double()))

    def weights(self) -> dict[str, Tensor]:
        """The map's network."""
        return {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Networks, optimisers, schedules and the generator."""
        return {
            "networks": [n.state_dict() for n in self.networks],
            "optimisers": [o.state_dict() for o in self.optimisers],
            "schedules": [s.state_dict() for s in self.schedules],
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts `state` back."""
        for name in ("networks", "optimisers", "schedules"):
            for item, saved in zip(getattr(self, name), state[name], strict=True):
                item.load_state_dict(saved)
        self.generator.set_state(state["generator"])


def default_encoder(context_width: int, rows: int) -> tuple[tuple[int, ...], float]:
    """Widths and dropout of the context MLP, the main knob: an unregularised net loses to the marginal."""
    if context_width <= 20:
        return (128, 64), 0.1
    if context_width <= 512:
        return (64, 32), 0.4 if rows < 10_000 else 0.2
    return (256, 64), 0.4


def default_steps(rows: int) -> int:
    """1500 steps up to 4,000 rows, 2000 from 40,000 on, logarithmic between."""
    return round(1500 + 500 * min(1.0, max(0.0, math.log10(max(rows, 1) / 4000))))


def default_learning_rate(rows: int, objective: str) -> float:
    """1e-3; 2e-3 for the dual and from 20,000 rows on."""
    return 2e-3 if objective == "dual" or rows >= 20_000 else 1e-3


def rounded_up(quantiles: Tensor, levels: Tensor) -> Tensor:
    """Removes what float32 rounding may take from a map that increases exactly: the running maximum in level order."""
    order = levels.argsort(dim=-1, stable=True).expand(quantiles.shape)
    running = quantiles.gather(1, order).cummax(1).values
    return torch.empty_like(quantiles).scatter_(1, order, running)


def _inverse_curve(values: Curve) -> Curve:
    """The smoothed distribution function of ``values`` on an even grid: the conjugate potential's first gradient."""
    curve = smoothed_quantiles(values)
    grid = np.linspace(0.0, 1.0, len(curve))
    return np.asarray(np.interp(grid, curve + 1e-9 * np.arange(len(curve)), grid))


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
