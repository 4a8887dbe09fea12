"""The trainable PICNN of a calibrator: context MLP, hard convexity, a first map close to a given quantile function."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prmfast.kernels.picnn.params import CoefficientLayout, PicnnParams
from prmfast.ops import PicnnGradients, PicnnStep, picnn_map, picnn_step

KNOT_STEEPNESS = 12.0  # slope of the first layer's units: a knot is about 1/6 wide
CONTEXT_SCALE = 0.1  # of the head's initial weights: the first map hardly depends on the context
CURVATURE_OFFSET = -3.0  # initial kappa = softplus(-3) = 0.049
CURVATURE_FLOOR = 1e-3  # least slope of T in x: 100 float32 roundings at a hundredth of a level
_SMALLEST_WEIGHT = 1e-4

Curve = npt.NDArray[np.float64]


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y > 0."""
    return y + torch.log(-torch.expm1(-y))


class ConditionalPicnn(nn.Module):
    """g(x, context) with T = dg/dx increasing in x for every context.

    u0 = MLP(context) (SiLU and dropout after each layer); one affine map of u0 makes every slope, offset and gate;
    the weights
    between layers are softplus(raw); (kappa(u0) + floor) x^2 / 2 on top keeps T strictly increasing in float32.

    Args:
        context_width: width of the (standardised) context.
        encoder: widths of the MLP.
        dropout: after each layer of the MLP.
        width, depth: of the layers convex in x.
    """

    def __init__(self, context_width: int, *, encoder: Sequence[int], dropout: float, width: int, depth: int) -> None:
        super().__init__()
        sizes_given = {"context_width": context_width, "encoder": list(encoder), "dropout": dropout}
        self.architecture = {**sizes_given, "width": width, "depth": depth}
        sizes = (context_width, *encoder)
        self.encoder = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.dropout = dropout
        self.widths = (*([width] * depth), 1)
        self.layout = CoefficientLayout(self.widths)
        self.raw_wz = nn.ParameterList(
            nn.Parameter(torch.zeros(self.widths[i + 1], self.widths[i])) for i in range(len(self.widths) - 1)
        )
        self.head = nn.Linear(sizes[-1], self.layout.size)

    def params(self, *, with_encoder: bool = True) -> PicnnParams:
        """The network as the op reads it; without the encoder the op's context is u0."""
        return PicnnParams(
            wz=tuple(F.softplus(raw) for raw in self.raw_wz),
            heads=((self.head.weight, self.head.bias),),
            encoder=tuple((layer.weight, layer.bias) for layer in self._layers()) if with_encoder else (),
            curvature=True,
            curvature_floor=CURVATURE_FLOOR,
        )

    def _layers(self) -> list[nn.Linear]:
        return [layer for layer in self.encoder if isinstance(layer, nn.Linear)]

    def at(self, u0: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Value and map [B, M] at ``levels`` from encoded contexts."""
        return picnn_map(self.params(with_encoder=False), u0, levels)

    def forward(self, context: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Value and map [B, M], with dropout in training mode."""
        return picnn_map(self.params(), context, levels, encoder_scale=self._dropout_masks(context))

    @torch.no_grad()
    def step(self, context: Tensor, levels: Tensor) -> PicnnStep:
        """The same without an autograd graph; the step's gradients go to `take`."""
        return picnn_step(self.params(), context, levels, encoder_scale=self._dropout_masks(context))

    @torch.no_grad()
    def take(self, gradients: PicnnGradients) -> None:
        """Sets the ``grad`` of every parameter."""
        for raw, grad in zip(self.raw_wz, gradients.wz, strict=True):
            raw.grad = grad * torch.sigmoid(raw)  # wz = softplus(raw)
        linears = [tensor for layer in (*self._layers(), self.head) for tensor in (layer.weight, layer.bias)]
        for parameter, grad in zip(linears, gradients.linears, strict=True):
            parameter.grad = grad

    def _dropout_masks(self, context: Tensor) -> list[Tensor]:
        if not self.training or self.dropout == 0:
            return []
        keep = 1.0 - self.dropout
        sizes = [layer.out_features for layer in self._layers()]
        return [context.new_empty(len(context), size).bernoulli_(keep).div_(keep) for size in sizes]

    @torch.no_grad()
    def initialise(self, curve: Curve, *, generator: torch.Generator) -> None:
        """Makes T close to ``curve`` (its values on an even grid of [0, 1]) for every context.

        First layer: knots over [0, 1]. Deeper layers: near the identity. Last layer: non-negative least squares to
        ``curve``.
        """
        for layer in self._layers():
            bound = layer.in_features**-0.5
            _draw(layer.weight, bound, generator)
            _draw(layer.bias, bound, generator)
        bound = CONTEXT_SCALE * self.head.in_features**-0.5
        _draw(self.head.weight, bound, generator)
        bias, width = self.head.bias.zero_(), self.widths[0]
        knots = torch.linspace(0.0, 1.0, width)
        bias[self.layout.slope(0)] = KNOT_STEEPNESS
        bias[self.layout.offset(0)] = -KNOT_STEEPNESS * knots
        for i in range(1, len(self.widths)):
            bias[self.layout.gate(i)] = float(inverse_softplus(torch.tensor(1.0)))
        bias[self.layout.kappa] = CURVATURE_OFFSET
        for raw in list(self.raw_wz)[:-1]:
            near_identity = 0.9 * torch.eye(*raw.shape) + 0.01 * torch.rand(raw.shape, generator=generator)
            raw.copy_(inverse_softplus(near_identity.clamp_min(_SMALLEST_WEIGHT)))
        self._fit_last_layer(curve)

    def _fit_last_layer(self, curve: Curve) -> None:
        from scipy.optimize import nnls

        grid = torch.linspace(0.0, 1.0, len(curve))
        width = self.widths[-2]
        response = np.empty((len(curve), width))
        raw_last, slope = self.raw_wz[-1], self.layout.slope(len(self.widths) - 1)
        u0 = self._mean_context()
        for unit in range(width):
            raw_last.fill_(-40.0)
            raw_last[0, unit] = inverse_softplus(torch.tensor(1.0))
            response[:, unit] = self._map_at(u0, grid)
        raw_last.fill_(-40.0)
        base = self._map_at(u0, grid)
        design = np.column_stack([response - base[:, None], np.ones(len(curve)), -np.ones(len(curve))])
        # a little ridge spreads the weight over neighbouring knots
        ridge = 1e-3 * np.eye(design.shape[1])
        solution, _ = nnls(np.vstack([design, ridge]), np.concatenate([curve - base, np.zeros(design.shape[1])]))
        weights = torch.tensor(solution[:width], dtype=raw_last.dtype).clamp_min(_SMALLEST_WEIGHT)
        raw_last[0] = inverse_softplus(weights)
        self.head.bias[slope] = float(solution[width] - solution[width + 1])

    def _mean_context(self) -> Tensor:
        """u0 of the mean of the standardised contexts."""
        layers = self._layers()
        u = layers[0].weight.new_zeros(1, layers[0].in_features)
        for layer in layers:
            u = F.silu(layer(u))
        return u

    def _map_at(self, u0: Tensor, grid: Tensor) -> Curve:
        return np.asarray(self.at(u0, grid.to(u0))[1][0].double().numpy(force=True))


def _draw(weight: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fills ``weight`` uniformly within +-bound; drawn where the generator is, so that every device starts alike."""
    weight.copy_(torch.empty(weight.shape, dtype=weight.dtype).uniform_(-bound, bound, generator=generator))


def smoothed_quantiles(values: Curve, *, points: int = 101, bandwidth: float = 0.03) -> Curve:
    """Quantile function of ``values`` on an even grid, smoothed by a Gaussian of ``bandwidth`` levels; increasing."""
    from scipy.ndimage import gaussian_filter1d

    grid = np.linspace(0.0, 1.0, points)
    return np.asarray(gaussian_filter1d(np.quantile(values, grid), bandwidth * (points - 1), mode="nearest"))


def beta_quantiles(successes: Curve, trials: Curve, *, points: int = 101) -> Curve:
    """Quantile function of the Beta law whose first two moments match k of n: a first guess of the law of p itself.

    With one trial per row the spread of p cannot be seen; then, and where sampling noise hides it, a concentration of
    2 is taken.
    """
    from scipy.stats import beta

    mean = float(np.clip(successes.sum() / trials.sum(), 0.01, 0.99))
    concentration = 2.0
    pairs = trials * (trials - 1)
    if pairs.sum() > 0:
        second = float((successes * (successes - 1)).sum() / pairs.sum())  # unbiased for E[p^2]
        variance = second - mean**2
        if variance > 1e-4:
            concentration = float(np.clip(mean * (1 - mean) / variance - 1, 0.3, 50.0))
    grid = (np.arange(points) + 0.5) / points
    return np.asarray(beta.ppf(grid, mean * concentration, (1 - mean) * concentration))
