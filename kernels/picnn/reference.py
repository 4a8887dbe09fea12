"""The slow truth of the room: plain torch, any float dtype, differentiable by autograd.

x is one number, so value and tangent come from one forward pass of dual numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prmfast.kernels.picnn.params import CoefficientLayout, PicnnParams


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact for every x; F.softplus turns linear at 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


def activate(x: Tensor, name: str, negative_slope: float) -> tuple[Tensor, Tensor]:
    """s(x) and s'(x)."""
    if name == "softplus":
        return softplus(x), torch.sigmoid(x)
    slope = negative_slope if name == "leaky_relu" else 0.0
    return F.leaky_relu(x, slope), torch.where(x > 0, torch.ones_like(x), torch.full_like(x, slope))


def _context_activation(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return F.silu(x)
    return F.relu(x) if name == "relu" else torch.tanh(x)


def _gate(x: Tensor, name: str) -> Tensor:
    return softplus(x) if name == "softplus" else F.relu(x)


def context_stage(params: PicnnParams, context: Tensor) -> Tensor:
    """context [B, c] -> coefficient rows [B, P], in the order of `CoefficientLayout`."""
    u = context
    for i, (weight, bias) in enumerate(params.encoder):
        u = F.linear(u, weight, bias)
        if i + 1 < len(params.encoder) or params.encoder_output_activation:
            u = _context_activation(u, params.encoder_activation)
    layout = CoefficientLayout(params.widths)
    if not params.transitions:
        row = F.linear(u, *params.heads[0])
        affine, gates, kappa = (
            row[:, : layout.affine],
            row[:, layout.affine : layout.size - 1],
            row[:, layout.size - 1 :],
        )
    else:
        slopes, gate_rows = [], []
        for i, (transition, head) in enumerate(zip(params.transitions, params.heads, strict=True)):
            u, _ = activate(F.linear(u, *transition), params.activation, params.negative_slope)
            row = F.linear(u, *head)
            last = i + 1 == len(params.heads)
            own = 2 * params.widths[i] + (2 if last else 0)  # v_i c_i, and v_L c_L beside the last hidden layer's
            slopes.append(row[:, :own])
            gate_rows.append(row[:, own:])
        affine, gates = torch.cat(slopes, 1), torch.cat(gate_rows, 1)
        kappa = gates[:, gates.shape[1] :]
    kappa = softplus(kappa) + params.curvature_floor if params.curvature else affine.new_zeros(len(affine), 1)
    return torch.cat([affine, _gate(gates, params.gate), kappa], 1)


def picnn_levels(
    coefficients: Tensor,
    levels: Tensor,
    wz: list[Tensor],
    *,
    activation: str,
    negative_slope: float,
    square_first: bool,
) -> tuple[Tensor, Tensor]:
    """Value g and gradient dg/dx, both [B, M], at levels [B, M] from coefficient rows [B, P]."""
    layout = CoefficientLayout((*(int(w.shape[1]) for w in wz), 1))
    x = levels.unsqueeze(-1)  # [B, M, 1]

    def part(where: slice) -> Tensor:
        return coefficients[:, None, where]  # [B, 1, k]

    z, dz = activate(x * part(layout.slope(0)) + part(layout.offset(0)), activation, negative_slope)
    dz = dz * part(layout.slope(0))
    if square_first:
        z, dz = z * z, 2 * z * dz
    for i, weight in enumerate(wz, start=1):
        gate, slope = part(layout.gate(i)), part(layout.slope(i))
        p = F.linear(gate * z, weight) + x * slope + part(layout.offset(i))
        dp = F.linear(gate * dz, weight) + slope
        if i == len(wz):
            z, dz = p, dp
        else:
            z, first = activate(p, activation, negative_slope)
            dz = first * dp
    kappa = part(layout.kappa)
    return (z + 0.5 * kappa * x * x).squeeze(-1), (dz + kappa * x).squeeze(-1)
