"""Sizes that are chosen, not derived, with the reason beside each."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_SIDE = 64
"""AMX: rows and depth of a product of the context stage; fewer leave tiles half empty."""

LEAST_PRODUCT = 1 << 22
"""AMX: multiply-adds of such a product; below, packing costs more than the tiles save."""

WIDEST = 128
"""Triton: units of the widest layer; a tile of twice as many does not fit into registers."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Points and warps of a program; stacked: value and tangent go through a product as one matrix of 2 block rows.

    A warp of tensor cores holds 16 rows of a product and all their columns: value and tangent of 16 points are 64 registers
    a thread at 64 columns. Stacked, a warp has one of the two.
    """

    block: int
    warps: int
    stacked: bool


_WHOLE, _STACKED, _WIDE = Tile(64, 4, False), Tile(32, 4, True), Tile(16, 4, True)


def tile(units: int) -> Tile:
    """Where every point has its own coefficients, and in the backward pass. Wide layers: 32 rows, so every product is made
    twice, but nothing spills.
    """
    return _STACKED if units <= 64 else _WIDE


def forward_tile(units: int, m: int) -> Tile:
    """Many levels share one row of coefficients a tile, which leaves registers for value and tangent of 16 points a warp."""
    return _WHOLE if units <= 64 and m > _STACKED.block else tile(units)


PASSES, EXACT_PASSES = {"float32": 3, "bfloat16": 1}, 6
"""bfloat16 products that make up one of the network. Gradients of weights are sums that cancel: float32's own accuracy."""

TAPE_BYTES = 1 << 28
"""Largest tape of a backward pass with its inputs; more contexts take turns."""


def contexts_of_a_tape(numbers: int, m: int) -> int:
    """How many contexts with m levels share a tape, at ``numbers`` units a point."""
    return max(1, TAPE_BYTES // (16 * numbers * m))


PACKED_ROWS, PACK_WARPS = 16, 4
"""Rows of a matrix that a program packs: 128 programs for three layers of 64 are done in one wave."""

ORDER_BLOCK, ORDER_WARPS = 64, 4
"""Levels that a program compares with as many others at a time: 32 comparisons a thread."""
