"""CondOT: the conditional quantile function of the success probability, increasing in the level by construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from prmfast.calibration import objectives
from prmfast.calibration.base import LEVELS, Inputs
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.network import (
    Context,
    FitData,
    NetworkCalibrator,
    NetworkFit,
    check_sizes,
    default_learning_rate,
)
from prmfast.calibration.picnn import ConditionalPicnn, Curve, beta_quantiles, smoothed_quantiles
from prmfast.ops import PicnnStep, picnn_map

Objective = Literal["binomial", "crps", "dual"]
Link = Literal["sigmoid", "clip"]
Selection = Literal["auto", "wql", "likelihood", "area"]
Source = Literal["uniform", "score"]

_LEVELS_PER_ROW = 8  # stratified; 16 changed nothing where it was tried: binomial, 4,000 rows, 1 and 8 rollouts
_VALIDATION_LEVELS = 32
_CONJUGATE_EVERY = 5  # dual: steps of the map between two steps of the conjugate potential
_DUAL_RATE = 2e-3


class CondOTCalibrator(NetworkCalibrator[ConditionalPicnn]):
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
        source: Source = "uniform",
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
        for name, value, allowed in (
            ("objective", objective, get_args(Objective)),
            ("link", link, get_args(Link)),
            ("selection", selection, get_args(Selection)),
            ("source", source, get_args(Source)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if source == "score" and objective != "dual":
            raise ValueError(f"source='score' needs objective='dual', got objective={objective!r}")
        check_sizes(width=width, depth=depth)
        self.objective, self.link, self.selection, self.source = objective, link, selection, source
        self.width, self.depth = width, depth

    def _architecture(
        self, context_width: int, encoder: tuple[int, ...], dropout: float, train: CalibrationData
    ) -> dict[str, Any]:
        sizes = {"width": self.width, "depth": self.depth}
        return {"context_width": context_width, "encoder": list(encoder), "dropout": dropout, **sizes}

    def _new_network(self, architecture: Mapping[str, Any]) -> ConditionalPicnn:
        return ConditionalPicnn(**architecture)

    def _new_fit(self, network: ConditionalPicnn, data: FitData, steps: int, generator: torch.Generator) -> NetworkFit:
        network.initialise(self._initial_curve(data.train), generator=generator)
        if self.objective != "dual":
            return _DirectFit(self, [network], data, steps, generator)
        conjugate = self._new_network(network.architecture).to(data.context.device)
        conjugate.initialise(_inverse_curve(data.train.target.double().numpy(force=True)), generator=generator)
        return _DualFit(self, [network, conjugate], data, steps, generator)

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
        params = self.network_.to(inputs.score.device).params()
        parts = []
        for rows, context in self._chunks(inputs):
            own = levels if levels.ndim == 1 else levels[rows]
            parts.append(rounded_up(self._apply_link(picnn_map(params, context, own)[1]), own))
        return torch.cat(parts) if parts else inputs.score.new_zeros(0, levels.shape[-1])


class _DirectFit(NetworkFit):
    """crps and binomial: one network, one loss."""

    def __init__(
        self,
        owner: CondOTCalibrator,
        networks: list[ConditionalPicnn],
        data: FitData,
        steps: int,
        generator: torch.Generator,
    ) -> None:
        self.owner, self.network, self.conjugate = owner, networks[0], networks[-1]
        usual = _DUAL_RATE if owner.objective == "dual" else default_learning_rate(len(data.train))
        super().__init__(networks, data, rate=owner.learning_rate or usual, steps=steps, generator=generator)
        self.target = data.train.target

    def advance(self, step: int) -> None:
        for network in self.networks:
            network.train()
        rows = self.batch(self.owner.batch_size)
        levels = objectives.stratified_levels(len(rows), _LEVELS_PER_ROW, self.generator).to(rows.device)
        self._descend_on(step, rows, levels)
        for schedule in self.schedules:
            schedule.step()

    def _descend_on(self, step: int, rows: Tensor, levels: Tensor) -> None:
        taken = self.network.step(self.data.context[rows], levels)
        mapped = self.owner._apply_link(taken.gradient)
        if self.owner.objective == "binomial":
            successes, trials = self.data.train.successes[rows].float(), self.data.train.trials[rows].float()
            grad = objectives.binomial_nll_gradient(mapped, successes, trials)
        else:
            grad = objectives.pinball_gradient(mapped, self.target[rows], levels)
        self._update_map(taken, mapped, grad)

    def _update_map(self, taken: PicnnStep, mapped: Tensor, grad: Tensor) -> None:
        """One step of the map's network, given d loss / d ``mapped``."""
        if self.owner.link == "sigmoid":
            grad = grad * mapped * (1.0 - mapped)
        self.network.take(taken.backward(grad_gradient=grad))
        self.update(0)

    def _map(self, context: Tensor, levels: Tensor) -> Tensor:
        return self.owner._apply_link(self.network(context, levels)[1])

    @torch.no_grad()
    def evaluate(self) -> float:
        self.network.eval()
        rule = self.owner.selection
        if rule == "auto":
            rule = "likelihood" if self.owner.objective == "binomial" else "wql"
        context, held_out = self.data.held_out_context, self.data.held_out
        if rule == "likelihood":
            levels = (torch.arange(_VALIDATION_LEVELS, device=context.device) + 0.5) / _VALIDATION_LEVELS
            mapped = self._map(context, levels)
            return float(objectives.binomial_nll(mapped, held_out.successes.float(), held_out.trials.float()))
        levels = torch.tensor(LEVELS, device=context.device)
        quantiles, target = self._map(context, levels).clamp(0.0, 1.0), held_out.target
        if rule == "wql":
            return float(objectives.pinball(quantiles, target, levels))
        curve = (target.unsqueeze(1) <= quantiles).double().mean(0)
        return float(torch.trapezoid((curve - levels.double()).abs(), levels.double()))


class _DualFit(_DirectFit):
    """The min-max of [D] eq. 2 and 3: the map's potential against its conjugate."""

    def _descend_on(self, step: int, rows: Tensor, levels: Tensor) -> None:
        conjugate, context = self.conjugate, self.data.context[rows]
        if self.owner.source == "score":
            levels = self._score_levels()[rows].unsqueeze(1)
        taken = self.network.step(context, levels)
        mapped = self.owner._apply_link(taken.gradient)
        slope = conjugate.step(context, mapped).gradient
        self._update_map(taken, mapped, objectives.dual_map_gradient(slope, levels))
        if step % _CONJUGATE_EVERY == 0:
            with torch.no_grad():
                mapped = self._map(context, levels)
            target = self.target[rows].unsqueeze(1)
            taken = conjugate.step(context, torch.cat([target, mapped], 1))
            conjugate.take(taken.backward(grad_value=objectives.dual_conjugate_gradient(target, mapped)))
            self.update(1)

    def _score_levels(self) -> Tensor:
        """The rank of each training row's own score as a level in (0, 1)."""
        order = self.data.train.score.argsort(stable=True).argsort(stable=True)
        return (order + 0.5) / len(order)


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
