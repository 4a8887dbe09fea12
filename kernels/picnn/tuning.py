"""Sizes that are chosen, not derived, with the reason beside each."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_SIDE = 64
"""AMX: rows and depth of a product of the context stage; fewer leave tiles half empty."""

LEAST_PRODUCT = 1 << 22
"""AMX: multiply-adds of such a product; below, packing costs more than the tiles save."""

CUDA_WIDEST, CUDA_DEEPEST = 64, 6
"""Width and number of hidden layers: value and tangent of a row stay in registers, all weights in shared memory."""

CUDA_NARROWEST = 16
"""Networks up to this width are left to Triton, which makes six products of bfloat16 parts: three, as here, were 3.5e-5
off on released checkpoints of 8 units, whose few terms do not average out."""

CUDA_HEAD_INPUTS, CUDA_HEAD_LEVELS = 512, 1024
"""Of the serving head: inputs of an affine head that its launch holds, and levels whose quantiles a block keeps."""

TRITON_WIDEST = 128
"""Units of the widest layer: at 256, one row of a product takes every register that a thread has."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Points of a Triton program, the most of them that are levels of one context, and warps.

    stacked: value and tangent go through a product as one matrix.

    A warp of tensor cores holds 16 rows of a product and all their columns: value and tangent of 16 points are 64
    registers a thread at 64 columns. Stacked, a warp has one of the two.
    """

    block: int
    together: int
    warps: int
    stacked: bool


_WHOLE, _STACKED, _SMALL = Tile(64, 64, 4, False), Tile(32, 16, 4, True), Tile(16, 16, 4, True)


def forward_tile(units: int, m: int, *, keep: bool) -> Tile:
    """Many levels share one row of coefficients a tile: registers are left for value and tangent of 16 points a warp.

    Not so where every point has its own coefficients, or the tape is kept: stacked. More than 64 units: half as many
    points, and two warps make the same products, but nothing spills.
    """
    if units > 64:
        return _SMALL
    return _WHOLE if m > _STACKED.block and not keep else _STACKED


def adjoint_tile(units: int) -> Tile:
    """Seven numbers a unit are alive where the forward pass has four; a training step has few points and many cores."""
    return _SMALL if units <= 64 else Tile(16, 16, 8, True)


def forward_passes(units: int, precision: str) -> int:
    """bfloat16 products that make up one of the network: six are float32's own accuracy, three 2^-17 of each term.

    The error of three averages over the terms of a sum; narrow layers have few, and products are a small part of their
    time.
    """
    if precision == "bfloat16":
        return 1
    return 6 if units <= 32 else 3


def backward_passes(units: int) -> int:
    """Gradients of weights are sums that cancel: six. Beyond 64 units three parts do not fit into registers."""
    return 6 if units <= 64 else 3


TAPE_BYTES = 1 << 28
"""Largest tape of a backward pass with its inputs; more contexts take turns."""


def contexts_of_a_tape(numbers: int, m: int) -> int:
    """How many contexts with m levels share a tape, at ``numbers`` units a point."""
    return max(1, TAPE_BYTES // (16 * numbers * m))


PACKED_ROWS, PACK_WARPS = 16, 4
"""Rows of a matrix that a program packs: 128 programs for three layers of 64 are done in one wave."""

ORDER_BLOCK, ORDER_WARPS = 64, 4
"""Levels that a program compares with as many others at a time: 32 comparisons a thread."""
