"""The adjoint of value and tangent, from the tape that `forward_points` leaves in memory.

Forward and adjoint are two launches, not one kernel: each holds one layer in registers, and what passes between them is in
memory either way (in the L2 cache for the shapes that training has).
"""

from __future__ import annotations

import triton
import triton.language as tl

from prmfast.kernels.picnn.triton_kernels import (
    chosen,
    coefficient,
    coefficients,
    levels_of_tile,
    points_of_tile,
    products,
    respond,
    respond_gate,
    softplus,
    tape_at,
    tape_of_tile,
)


@triton.jit
def add_up(
    x,
    d_row,
    rows_left,
    start,
    width,
    ROW: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Stores the sum of x [BLOCK, UNITS] over the levels of each context as entries start .. of its row of gradients.

    d_row: the tile's first row of gradients. rows_left: how many there are from it on.
    """
    unit = tl.arange(0, UNITS)
    if TOGETHER == BLOCK:
        tl.store(d_row + start + unit, tl.sum(x, 0), mask=unit < width)
    else:
        if TOGETHER > 1:
            x = tl.sum(tl.reshape(x, (BLOCK // TOGETHER, TOGETHER, UNITS)), 1)
        own = tl.arange(0, BLOCK // TOGETHER)
        mask = (own < rows_left)[:, None] & (unit < width)[None, :]
        to = (own * ROW + start)[:, None] + unit[None, :]
        tl.store(d_row + to.to(tl.uint32), x, mask=mask)


@triton.jit
def add_up_one(x, d_row, rows_left, at, ROW: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """The same of one entry a point, x [BLOCK]."""
    if TOGETHER == BLOCK:
        tl.store(d_row + at, tl.sum(x, 0))
    else:
        if TOGETHER > 1:
            x = tl.sum(tl.reshape(x, (BLOCK // TOGETHER, TOGETHER)), 1)
        own = tl.arange(0, BLOCK // TOGETHER)
        tl.store(d_row + own * ROW + at, x, mask=own < rows_left)


@triton.jit(do_not_specialize=["count", "m", "level_stride", "level_step"])
def adjoint_points(
    grad_value,
    grad_gradient,
    rows,
    levels,
    packed,
    last,
    tape,
    d_rows,
    d_levels,
    count,
    m,
    level_stride,
    level_step,
    leak,
    floor,
    WIDTHS: tl.constexpr,
    SLOPES: tl.constexpr,
    GATES: tl.constexpr,
    ROW: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SQUARE: tl.constexpr,
    GATE: tl.constexpr,
    CURVATURE: tl.constexpr,
    PASSES: tl.constexpr,
    STACKED: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """d levels [count, m], d rows [count, chunks, ROW] and what the gradients of the weights are products of.

    tape [L, 4, points, UNITS]: parts 0 and 1 are p and dp of every layer, and in their place the adjoints of both when the
    program is done; it fills parts 2 and 3 with what the next layer read. d wz[i - 1] is the product of the adjoints of layer
    i and the inputs from layer i - 1, summed over both and all points.
    """
    LAYERS: tl.constexpr = len(WIDTHS)
    SHARED: tl.constexpr = TOGETHER == BLOCK
    context, level, own, step, there = points_of_tile(count, m, BLOCK, TOGETHER)
    x = levels_of_tile(levels, context, level, own, step, there, level_stride, level_step)
    row = rows + context * ROW
    d_row = d_rows + (context * tl.cdiv(m, TOGETHER) + level // TOGETHER) * ROW
    rows_left = count - context
    points = count.to(tl.int64) * m
    first_point = context * m + level
    point = (own * m + step).to(tl.uint32)  # unsigned: its upper half needs no register
    keep = there[:, None]

    by_value = tl.load(grad_value + first_point + point, mask=there, other=0.0)
    by_gradient = tl.load(grad_gradient + first_point + point, mask=there, other=0.0)
    slope = coefficient(row, own, there, SLOPES[LAYERS], ROW, SHARED)
    d_x = slope * by_value
    add_up_one(x * by_value + by_gradient, d_row, rows_left, SLOPES[LAYERS], ROW, BLOCK, TOGETHER)
    add_up_one(by_value, d_row, rows_left, SLOPES[LAYERS] + 1, ROW, BLOCK, TOGETHER)
    if CURVATURE:
        kappa, kappa_first, _ = softplus(coefficient(row, own, there, ROW - 1, ROW, SHARED))
        d_x += (kappa + floor) * (x * by_value + by_gradient)
        d_kappa = (0.5 * x * by_value + by_gradient) * x * kappa_first
        add_up_one(d_kappa, d_row, rows_left, ROW - 1, ROW, BLOCK, TOGETHER)
    w = tl.load(last + tl.arange(0, UNITS))[None, :]
    a = by_value[:, None] * w
    da = by_gradient[:, None] * w
    kept = tape_of_tile(tape, LAYERS - 1, first_point, points, UNITS)
    for j in range(LAYERS):
        i = LAYERS - 1 - j
        start, width = chosen(SLOPES, i), chosen(WIDTHS, i)
        p = tl.load(tape_at(kept, 0, point, points, UNITS), mask=keep, other=0.0)
        dp = tl.load(tape_at(kept, 1, point, points, UNITS), mask=keep, other=0.0)
        z, first, second = respond(p, leak, ACTIVATION, False)
        if SQUARE:
            second = tl.where(i == 0, 2.0 * (first * first + z * second), second)
            first = tl.where(i == 0, 2.0 * z * first, first)
            z = tl.where(i == 0, z * z, z)
        gates = chosen(GATES, i)
        raw = coefficients(row, own, there, gates, width, ROW, UNITS, SHARED)
        gate, gate_first = respond_gate(raw, GATE)
        dz = first * dp
        add_up((a * z + da * dz) * gate_first, d_row, rows_left, gates, width, ROW, UNITS, BLOCK, TOGETHER)
        tl.store(tape_at(kept, 2, point, points, UNITS), gate * z, mask=keep)
        tl.store(tape_at(kept, 3, point, points, UNITS), gate * dz, mask=keep)
        da = gate * da
        p = first * (gate * a) + second * dp * da
        dp = first * da
        v = coefficients(row, own, there, start, width, ROW, UNITS, SHARED)
        d_x += tl.sum(p * v, 1)
        add_up(x[:, None] * p + dp, d_row, rows_left, start, width, ROW, UNITS, BLOCK, TOGETHER)
        add_up(p, d_row, rows_left, start + width, width, ROW, UNITS, BLOCK, TOGETHER)
        if i > 0:
            tl.debug_barrier()
            tl.store(tape_at(kept, 0, point, points, UNITS), p, mask=keep)
            tl.store(tape_at(kept, 1, point, points, UNITS), dp, mask=keep)
            a, da = products(p, dp, packed, i - 1, UNITS, PASSES, STACKED, True, EMULATED)
            kept -= 4 * points * UNITS
    tl.store(d_levels + first_point + point, d_x, mask=there)
