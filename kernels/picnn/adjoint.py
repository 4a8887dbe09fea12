"""The adjoint of the levels stage in plain torch, where autograd is off: for what a GPU's kernels do not take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prmfast.kernels.picnn.params import CoefficientLayout, LevelOptions
from prmfast.kernels.picnn.reference import activate, softplus


def _respond(p: Tensor, options: LevelOptions, *, square: bool) -> tuple[Tensor, Tensor, Tensor]:
    """s(p), s'(p) and s''(p); of s^2 where squared."""
    z, first = activate(p, options.activation, options.negative_slope)
    second = first * (1 - first) if options.activation == "softplus" else torch.zeros_like(p)
    if square:
        z, first, second = z * z, 2 * z * first, 2 * (first * first + z * second)
    return z, first, second


def _respond_gate(raw: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The gate of a raw coefficient and its derivative."""
    return activate(raw, "softplus" if name == "softplus" else "relu", 0.0)


def picnn_levels_backward(
    grads: tuple[Tensor, Tensor], rows: Tensor, levels: Tensor, wz: Sequence[Tensor], *, options: LevelOptions
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """d rows [B, P], d levels [B, M] and d wz of sum(value * grads[0] + gradient * grads[1]).

    Forward with every layer's p and dp kept, then the adjoint of value and tangent from the last layer to the first.
    """
    layers = len(wz)
    layout = CoefficientLayout((*(int(w.shape[1]) for w in wz), 1))
    x = levels.unsqueeze(-1)  # [B, M, 1]
    by_value, by_gradient = (grad.unsqueeze(-1) for grad in grads)
    d_rows, d_wz = torch.zeros_like(rows), [torch.empty_like(w) for w in wz]

    def part(where: slice) -> Tensor:
        return rows[:, None, where]  # [B, 1, k]

    kept, inputs = [], []
    a = da = x
    for i in range(layers):
        slope, offset = part(layout.slope(i)), part(layout.offset(i))
        p, dp = (x * slope + offset, slope.expand(-1, x.shape[1], -1))
        if i:
            p, dp = p + a @ wz[i - 1].t(), dp + da @ wz[i - 1].t()
        z, first, second = _respond(p, options, square=options.square_first and i == 0)
        gate, gate_first = _respond_gate(part(layout.gate(i + 1)), options.gate)
        kept.append((dp, z, first, second, gate, gate_first))
        a, da = gate * z, gate * (first * dp)
        inputs.append((a, da))

    last_slope = part(layout.slope(layers))
    d_rows[:, layout.slope(layers)] = (x * by_value + by_gradient).sum(1)
    d_rows[:, layout.offset(layers)] = by_value.sum(1)
    d_x = last_slope * by_value
    if options.curvature:
        raw = part(layout.kappa)
        kappa = softplus(raw) + options.curvature_floor
        d_rows[:, layout.kappa] = ((0.5 * x * by_value + by_gradient) * x * torch.sigmoid(raw)).sum(1)
        d_x = d_x + kappa * (x * by_value + by_gradient)
    p_bar, dp_bar = by_value, by_gradient
    for i in range(layers - 1, -1, -1):
        dp, z, first, second, gate, gate_first = kept[i]
        a, da = inputs[i]
        d_wz[i] = (p_bar.flatten(0, 1).t() @ a.flatten(0, 1)) + (dp_bar.flatten(0, 1).t() @ da.flatten(0, 1))
        a_bar, da_bar = p_bar @ wz[i], dp_bar @ wz[i]
        d_rows[:, layout.gate(i + 1)] = ((a_bar * z + da_bar * (first * dp)) * gate_first).sum(1)
        z_bar, dz_bar = gate * a_bar, gate * da_bar
        p_bar, dp_bar = first * z_bar + second * dp * dz_bar, first * dz_bar
        d_rows[:, layout.slope(i)] = (x * p_bar + dp_bar).sum(1)
        d_rows[:, layout.offset(i)] = p_bar.sum(1)
        d_x = d_x + (p_bar * part(layout.slope(i))).sum(-1, keepdim=True)
    return d_rows, d_x.squeeze(-1), d_wz
