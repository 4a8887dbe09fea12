"""Room picnn on GPUs, and in Triton's interpreter: kernels run the levels stage, torch the GEMMs of the context stage.

float64 goes to plain torch on the same device. The context stage is that of `prmfast.kernels.picnn.context`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from prmfast.kernels.common.launch import INTERPRETED, Variant, check_device, pointers_of
from prmfast.kernels.picnn import adjoint, reference, tuning
from prmfast.kernels.picnn import triton_kernels as kernels
from prmfast.kernels.picnn.context import picnn_context, picnn_context_backward
from prmfast.kernels.picnn.params import CoefficientLayout, LevelOptions

__all__ = ["picnn_context", "picnn_context_backward", "picnn_levels", "picnn_levels_backward", "variants"]


def picnn_levels(
    rows: Tensor, levels: Tensor, wz: Sequence[Tensor], *, options: LevelOptions, tolerance: float, precision: str
) -> tuple[Tensor, Tensor]:
    """See the reference; every level is evaluated, whatever the tolerance."""
    if levels.dtype == torch.float64:
        return reference.picnn_levels(rows, levels, wz, options=options, tolerance=tolerance, precision=precision)
    check_device((rows, levels, *wz))
    value, gradient = levels.new_empty(levels.shape), levels.new_empty(levels.shape)
    if levels.numel() == 0:
        return value, gradient
    network = _Network(tuple(int(w.shape[1]) for w in wz), options)
    with torch.cuda.device_of(levels):
        packed = _pack(network, wz)
        raw = gradient if levels.shape[1] == 1 else torch.empty_like(gradient)
        _forward(
            network,
            packed,
            (rows.contiguous(), levels),
            (value, raw),
            None,
            tuning.forward_passes(network.units, precision),
        )
        if levels.shape[1] > 1:
            _keep_order(levels, raw, packed.convex, gradient)
    return value, gradient


def picnn_levels_backward(
    grads: tuple[Tensor, Tensor], rows: Tensor, levels: Tensor, wz: Sequence[Tensor], *, options: LevelOptions
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """d rows, d levels and d wz of sum(value * grads[0] + gradient * grads[1])."""
    if levels.dtype == torch.float64:
        return adjoint.picnn_levels_backward(grads, rows, levels, wz, options=options)
    check_device((rows, levels, *wz))
    if levels.numel() == 0:
        return torch.zeros_like(rows), levels.new_empty(levels.shape), [torch.zeros_like(w) for w in wz]
    count, m = levels.shape
    network = _Network(tuple(int(w.shape[1]) for w in wz), options)
    given = (grads[0].contiguous(), grads[1].contiguous(), rows.contiguous(), levels)
    d_rows, d_levels = rows.new_empty(rows.shape), levels.new_empty(levels.shape)
    d_wz: list[Tensor] = []
    together = tuning.contexts_of_a_tape(len(wz) * network.units, m)
    with torch.cuda.device_of(levels):
        packed = _pack(network, wz)
        for start in range(0, count, together):
            part = slice(start, start + together)
            d_rows[part], d_levels[part], sums = _backward_of_part(network, packed, [t[part] for t in given])
            d_wz = [total.add_(more) for total, more in zip(d_wz, sums, strict=True)] if d_wz else sums
    return d_rows, d_levels, [total[: w.shape[0], : w.shape[1]].contiguous() for total, w in zip(d_wz, wz, strict=True)]


def _forward(
    network: _Network,
    packed: _Packed,
    given: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    tape: Tensor | None,
    passes: int,
) -> None:
    """Launches the forward kernel on (rows, levels): to ``out``, or to the tape where there is one."""
    rows, levels = given
    count, m = levels.shape
    tile = tuning.forward_tile(network.units, m, keep=tape is not None)
    kernels.forward_points[(_programs(tile, count, m),)](
        rows,
        levels,
        packed.parts,
        packed.last,
        *out,
        out[0] if tape is None else tape,
        count,
        m,
        *levels.stride(),
        network.leak,
        network.options.curvature_floor,
        **network.constants(tile, m),
        PASSES=passes,
        KEEP=tape is not None,
        num_warps=tile.warps,
    )


def _backward_of_part(
    network: _Network, packed: _Packed, given: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """d rows, d levels and d wz (padded to whole tiles) of some contexts; given: both gradients, rows and levels."""
    by_value, by_gradient, rows, levels = given
    count, m = levels.shape
    tile = tuning.adjoint_tile(network.units)
    chunks = triton.cdiv(m, _together(tile, m))
    points = count * m
    tape = rows.new_empty(len(network.widths), 4 * points, network.units)
    _forward(network, packed, (rows, levels), (tape, tape), tape, tuning.backward_passes(network.units))
    d_rows, d_levels = rows.new_empty(count, chunks, rows.shape[1]), levels.new_empty(levels.shape)
    kernels.adjoint_points[(_programs(tile, count, m),)](
        by_value,
        by_gradient,
        rows,
        levels,
        packed.parts,
        packed.last,
        tape,
        d_rows,
        d_levels,
        count,
        m,
        *levels.stride(),
        network.leak,
        network.options.curvature_floor,
        **network.constants(tile, m),
        PASSES=tuning.backward_passes(network.units),
        num_warps=tile.warps,
    )
    adjoints, inputs = tape[:, : 2 * points], tape[:, 2 * points :]
    d_wz = list(torch.bmm(adjoints[1:].transpose(1, 2), inputs[:-1]).unbind(0))
    d_wz.append(torch.cat([by_value.view(1, -1), by_gradient.view(1, -1)], 1) @ inputs[-1])
    return d_rows.sum(1) if chunks > 1 else d_rows[:, 0], d_levels, d_wz


class _Network(NamedTuple):
    """Hidden widths k_0 .. k_{L-1} and what the kernels are compiled for."""

    widths: tuple[int, ...]
    options: LevelOptions

    @property
    def units(self) -> int:
        """Columns of a tile: tensor cores multiply 16 at least."""
        return max(16, int(triton.next_power_of_2(max(self.widths))))

    @property
    def leak(self) -> float:
        return self.options.negative_slope if self.options.activation == "leaky_relu" else 0.0

    def constants(self, tile: tuning.Tile, m: int) -> dict[str, Any]:
        """The constexpr that forward and backward kernel share."""
        layout, layers = CoefficientLayout((*self.widths, 1)), len(self.widths)
        return {
            "WIDTHS": self.widths,
            "SLOPES": tuple(layout.slope(i).start for i in range(layers + 1)),
            "GATES": tuple(layout.gate(i).start for i in range(1, layers + 1)),
            "ROW": layout.size - (not self.options.curvature),
            "UNITS": self.units,
            "BLOCK": tile.block,
            "TOGETHER": _together(tile, m),
            "ACTIVATION": "softplus" if self.options.activation == "softplus" else "leaky_relu",
            "SQUARE": self.options.square_first,
            "GATE": self.options.gate,
            "CURVATURE": self.options.curvature,
            "STACKED": tile.stacked,
            "EMULATED": INTERPRETED,
        }

    def packing(self) -> dict[str, Any]:
        """The constexpr of `pack_weights`."""
        sizes = [a * b for a, b in zip(self.widths, (*self.widths[1:], 1), strict=True)]
        starts = tuple(sum(sizes[:i]) for i in range(len(sizes)))
        return {
            "WIDTHS": self.widths,
            "STARTS": starts,
            "UNITS": self.units,
            "ROWS": tuning.PACKED_ROWS,
            "EMULATED": INTERPRETED,
        }


class _Packed(NamedTuple):
    """See `pack_weights`."""

    parts: Tensor
    last: Tensor
    convex: Tensor


def _pack(network: _Network, wz: Sequence[Tensor]) -> _Packed:
    layers, units = len(wz), network.units
    weights = torch.cat([w.reshape(-1) for w in wz])
    parts = weights.new_empty((layers - 1, 3, units, units), dtype=torch.bfloat16)
    programs = layers * units // tuning.PACKED_ROWS
    convex = weights.new_empty(programs, dtype=torch.int32)
    packed = _Packed(parts, weights.new_empty(units), convex)
    kernels.pack_weights[(programs,)](weights, *packed, **network.packing(), num_warps=tuning.PACK_WARPS)
    return packed


def _together(tile: tuning.Tile, m: int) -> int:
    """Levels of one context in a tile."""
    return min(tile.together, int(triton.next_power_of_2(m)))


def _programs(tile: tuning.Tile, count: int, m: int) -> int:
    together = _together(tile, m)
    return math.ceil(count / (tile.block // together)) * math.ceil(m / together)


def _keep_order(levels: Tensor, raw: Tensor, convex: Tensor, gradient: Tensor) -> None:
    """Launches the kernel of that name: from raw to gradient."""
    count, m = levels.shape
    blocks = _order_blocks(m)
    kernels.keep_order[(count * triton.cdiv(m, blocks["BLOCK"]),)](
        levels,
        raw,
        convex,
        gradient,
        m,
        *levels.stride(),
        len(convex),
        FLAGS=triton.next_power_of_2(len(convex)),
        **blocks,
        num_warps=tuning.ORDER_WARPS,
    )


def _order_blocks(m: int) -> dict[str, int]:
    """Levels a program puts in order, and levels that it compares them with at a time."""
    size = min(tuning.ORDER_BLOCK, max(16, triton.next_power_of_2(m)))
    return {"BLOCK": size, "OTHERS": size}


def variants() -> Iterator[Variant]:
    """What is launched for networks of every padded width, tiles of few and of many levels, and each option once."""
    softplus, leaky = LevelOptions(curvature=True), LevelOptions("leaky_relu", square_first=True, gate="relu")
    cases = [
        (_Network(widths, options), m)
        for widths, options, levels in (
            ((64, 64, 64, 64), softplus, (1, 2, 8, 16, 100)),
            ((64, 64, 64, 64), leaky, (8, 100)),
            ((32, 32), softplus, (8, 100)),
            ((16,), softplus, (11,)),
            ((128, 128), softplus, (8, 100)),
        )
        for m in levels
    ]
    for network, m in cases:
        yield _forward_variant(network, m, tuning.forward_passes(network.units, "float32"), keep=False)
        yield _forward_variant(network, m, tuning.backward_passes(network.units), keep=True)
        yield _adjoint_variant(network, m)
    network = cases[0][0]
    yield _forward_variant(network, 100, 1, keep=False)
    types = {"weights": "*fp32", "packed": "*bf16", "last": "*fp32", "convex": "*i32"}
    yield _variant(kernels.pack_weights, types, network.packing() | {"EMULATED": False}, tuning.PACK_WARPS)
    types = {"levels": "*fp32", "gradient": "*fp32", "convex": "*i32", "ordered": "*fp32", "m": "i32"}
    types |= {"level_stride": "i32", "level_step": "i32", "flags": "i32"}
    for m in (11, 100, 1000):
        yield _variant(kernels.keep_order, types, {"FLAGS": 16} | _order_blocks(m), tuning.ORDER_WARPS)


_POINT_TYPES = {
    "rows": "*fp32",
    "levels": "*fp32",
    "packed": "*bf16",
    "last": "*fp32",
    "count": "i32",
    "m": "i32",
    "level_stride": "i32",
    "level_step": "i32",
    "leak": "fp32",
    "floor": "fp32",
}


def _forward_variant(network: _Network, m: int, passes: int, *, keep: bool) -> Variant:
    tile = tuning.forward_tile(network.units, m, keep=keep)
    types = _POINT_TYPES | dict.fromkeys(("value", "gradient", "tape"), "*fp32")
    constants = network.constants(tile, m) | {"PASSES": passes, "KEEP": keep, "EMULATED": False}
    return _variant(kernels.forward_points, types, constants, tile.warps)


def _adjoint_variant(network: _Network, m: int) -> Variant:
    tile = tuning.adjoint_tile(network.units)
    outputs = ("grad_value", "grad_gradient", "tape", "d_rows", "d_levels")
    types = _POINT_TYPES | dict.fromkeys(outputs, "*fp32")
    constants = network.constants(tile, m) | {"PASSES": tuning.backward_passes(network.units), "EMULATED": False}
    return _variant(kernels.adjoint_points, types, constants, tile.warps)


def _variant(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> Variant:
    return Variant(kernel, types, constants, num_warps=warps, aligned=pointers_of(types))
