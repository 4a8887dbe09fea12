"""The weights of a PICNN in one scalar input, in the one layout that every backend reads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("softplus", "leaky_relu", "relu")
GATES = ("softplus", "relu")
CONTEXT_ACTIVATIONS = ("silu", "relu", "tanh")

Linear = tuple[Tensor, Tensor]  # weight [out, in], bias [out]


class LevelOptions(NamedTuple):
    """What the levels stage needs beside tensors; the fields of `PicnnParams` of the same names."""

    activation: str = "softplus"
    negative_slope: float = 0.2
    square_first: bool = False
    gate: str = "softplus"
    curvature: bool = False
    curvature_floor: float = 0.0


@dataclass(frozen=True, slots=True)
class PicnnParams:
    """A network g(x, h), convex in the scalar x wherever every ``wz`` is >= 0 (prmfast's calibrators guarantee that).

    With u0 = phi(h), u_j = s(W_j u_{j-1} + b_j) and L hidden layers of widths k_0 .. k_{L-1}::

        z_0 = s(x v_0 + c_0),  squared where ``square_first``
        z_i = s(wz[i-1] (gate_i * z_{i-1}) + x v_i + c_i)
        g   = wz[L-1] (gate_L * z_{L-1}) + x v_L + c_L + kappa x^2 / 2

    v, c, gate and kappa are affine in u; gate and kappa go through softplus (or relu) and are >= 0.

    wz: L matrices, [k_i, k_{i-1}] and last [1, k_{L-1}].
    heads: one affine map that makes a whole coefficient row (see `coefficient_layout`) from u0, or, with transitions,
    one per
        hidden layer, the last one also serving the output layer.
    transitions: () or one per hidden layer, the released network's recursion of u.
    encoder: the layers of phi, () where the caller passes u0 itself.
    curvature: kappa's row is present; ``curvature_floor`` is added to it.
    """

    wz: tuple[Tensor, ...]
    heads: tuple[Linear, ...]
    transitions: tuple[Linear, ...] = ()
    encoder: tuple[Linear, ...] = ()
    activation: str = "softplus"
    negative_slope: float = 0.2
    square_first: bool = False
    gate: str = "softplus"
    encoder_activation: str = "silu"
    encoder_output_activation: bool = True
    curvature: bool = False
    curvature_floor: float = 0.0

    @property
    def widths(self) -> tuple[int, ...]:
        """k_0 .. k_{L-1}, then 1."""
        return (*(int(w.shape[1]) for w in self.wz), 1)

    @property
    def context_width(self) -> int:
        """The width of the context that the caller passes."""
        first = (*self.encoder, *self.transitions, *self.heads)[0]
        return int(first[0].shape[1])

    @property
    def options(self) -> LevelOptions:
        """What the levels stage reads beside the coefficient rows and wz."""
        return LevelOptions(*(getattr(self, name) for name in LevelOptions._fields))

    def tensors(self) -> tuple[Tensor, ...]:
        """Every weight, in a fixed order."""
        pairs = (*self.encoder, *self.transitions, *self.heads)
        return (*self.wz, *(t for pair in pairs for t in pair))

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> PicnnParams:
        """The same network with every weight converted; differentiable."""

        def pairs(linears: tuple[Linear, ...]) -> tuple[Linear, ...]:
            return tuple((w.to(dtype=dtype, device=device), b.to(dtype=dtype, device=device)) for w, b in linears)

        changed = {
            "wz": tuple(w.to(dtype=dtype, device=device) for w in self.wz),
            "heads": pairs(self.heads),
            "transitions": pairs(self.transitions),
            "encoder": pairs(self.encoder),
        }
        return PicnnParams(**{f.name: changed.get(f.name, getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class CoefficientLayout:
    """Where slope v_i, offset c_i and gate_i stand in a row [v_0 c_0 .. v_L c_L | gate_1 .. gate_L | kappa].

    A raw row is what the affine heads make; gates and kappa go through their activations in the levels stage. Without
    curvature a raw row ends before kappa.
    """

    widths: tuple[int, ...]  # k_0 .. k_{L-1}, 1

    @property
    def affine(self) -> int:
        """Entries before the gates."""
        return 2 * sum(self.widths)

    @property
    def size(self) -> int:
        """Entries of the row, kappa included."""
        return self.affine + sum(self.widths[:-1]) + 1

    def slope(self, i: int) -> slice:
        """v_i."""
        start = 2 * sum(self.widths[:i])
        return slice(start, start + self.widths[i])

    def offset(self, i: int) -> slice:
        """c_i."""
        start = 2 * sum(self.widths[:i]) + self.widths[i]
        return slice(start, start + self.widths[i])

    def gate(self, i: int) -> slice:
        """gate_i, i >= 1: multiplies z_{i-1}."""
        start = self.affine + sum(self.widths[: i - 1])
        return slice(start, start + self.widths[i - 1])

    @property
    def kappa(self) -> slice:
        """The curvature."""
        return slice(self.size - 1, self.size)
