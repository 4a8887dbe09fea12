"""The slow truth of the room: plain torch, any float dtype, differentiable by autograd.

x is one number, so value and tangent come from one forward pass of dual numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prmfast.kernels.picnn.params import CoefficientLayout, LevelOptions, PicnnParams


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact for every x; F.softplus turns linear at 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


def activate(x: Tensor, name: str, negative_slope: float) -> tuple[Tensor, Tensor]:
    """s(x) and s'(x)."""
    if name == "softplus":
        return softplus(x), torch.sigmoid(x)
    slope = negative_slope if name == "leaky_relu" else 0.0
    return F.leaky_relu(x, slope), torch.where(x > 0, torch.ones_like(x), torch.full_like(x, slope))


def context_activation(x: Tensor, name: str) -> Tensor:
    """Of an encoder layer."""
    if name == "silu":
        return F.silu(x)
    return F.relu(x) if name == "relu" else torch.tanh(x)


def _gate(x: Tensor, name: str) -> Tensor:
    return softplus(x) if name == "softplus" else F.relu(x)


def context_stage(params: PicnnParams, context: Tensor, encoder_scale: Sequence[Tensor] = ()) -> Tensor:
    """context [B, c] -> raw coefficient rows [B, P], in the order of `CoefficientLayout`.

    encoder_scale: () or one [B, w] a layer of the encoder, multiplied into its output (dropout).
    """
    u = context
    for i, (weight, bias) in enumerate(params.encoder):
        u = F.linear(u, weight, bias)
        if i + 1 < len(params.encoder) or params.encoder_output_activation:
            u = context_activation(u, params.encoder_activation)
        if encoder_scale:
            u = u * encoder_scale[i]
    if not params.transitions:
        return F.linear(u, *params.heads[0])
    affine, rest = [], []
    for i, (transition, head) in enumerate(zip(params.transitions, params.heads, strict=True)):
        u, _ = activate(F.linear(u, *transition), params.activation, params.negative_slope)
        row = F.linear(u, *head)
        last = i + 1 == len(params.heads)
        own = 2 * params.widths[i] + (2 if last else 0)  # v_i c_i, and v_L c_L beside the last hidden layer's
        affine.append(row[:, :own])
        rest.append(row[:, own:])
    return torch.cat([*affine, *rest], 1)


def picnn_levels(
    rows: Tensor, levels: Tensor, wz: Sequence[Tensor], *, options: LevelOptions, tolerance: float, precision: str
) -> tuple[Tensor, Tensor]:
    """Value g and gradient dg/dx, both [B, M], at levels [B, M] from raw coefficient rows [B, P]; always exact."""
    del tolerance, precision  # what faster backends may leave out
    layout = CoefficientLayout((*(int(w.shape[1]) for w in wz), 1))
    x = levels.unsqueeze(-1)  # [B, M, 1]

    def part(where: slice) -> Tensor:
        return rows[:, None, where]  # [B, 1, k]

    def act(p: Tensor) -> tuple[Tensor, Tensor]:
        return activate(p, options.activation, options.negative_slope)

    z, dz = act(x * part(layout.slope(0)) + part(layout.offset(0)))
    dz = dz * part(layout.slope(0))
    if options.square_first:
        z, dz = z * z, 2 * z * dz
    for i, weight in enumerate(wz, start=1):
        gate, slope = _gate(part(layout.gate(i)), options.gate), part(layout.slope(i))
        p = F.linear(gate * z, weight) + x * slope + part(layout.offset(i))
        dp = F.linear(gate * dz, weight) + slope
        if i == len(wz):
            z, dz = p, dp
        else:
            z, first = act(p)
            dz = first * dp
    if options.curvature:
        kappa = softplus(part(layout.kappa)) + options.curvature_floor
        z, dz = z + 0.5 * kappa * x * x, dz + kappa * x
    return z.squeeze(-1), dz.squeeze(-1)
