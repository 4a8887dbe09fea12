"""The kernels that are launched: they pack weights, make values and gradients, order these, and make the adjoint."""

from __future__ import annotations

import triton
import triton.language as tl

from prmfast.kernels.picnn.triton_layers import (
    add_up,
    add_up_one,
    chosen,
    coefficient,
    coefficients,
    levels_of_tile,
    points_of_tile,
    products,
    respond,
    respond_gate,
    softplus,
    split,
    tape_at,
    tape_of_tile,
)


@triton.jit
def pack_weights(
    weights,
    packed,
    last,
    convex,
    WIDTHS: tl.constexpr,
    STARTS: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """The wz of all layers, one behind the other in ``weights``, as the tiles read them: ROWS inputs a program.

    packed [L - 1, 3, UNITS inputs, UNITS outputs]: the bfloat16 parts of each, zeros behind. last [UNITS]: the output
    layer. convex[program]: 1 where every weight that the program saw is >= 0.
    """
    LAYERS: tl.constexpr = len(WIDTHS)
    layer = tl.program_id(0) // (UNITS // ROWS)
    source = (tl.program_id(0) % (UNITS // ROWS)) * ROWS + tl.arange(0, ROWS)
    target = tl.arange(0, UNITS)
    for i in tl.static_range(LAYERS - 1):
        if layer == i:
            mask = (source < WIDTHS[i])[:, None] & (target < WIDTHS[i + 1])[None, :]
            w = tl.load(weights + STARTS[i] + target[None, :] * WIDTHS[i] + source[:, None], mask=mask, other=0.0)
            to = packed + (3 * i * UNITS + source)[:, None] * UNITS + target[None, :]
            parts = split(w, 6, EMULATED)
            for part in tl.static_range(3):
                tl.store(to + part * UNITS * UNITS, parts[part].to(tl.bfloat16))
            tl.store(convex + tl.program_id(0), tl.min(tl.min((w >= 0).to(tl.int32), 1), 0))
    if layer == LAYERS - 1:
        w = tl.load(weights + STARTS[LAYERS - 1] + source, mask=source < WIDTHS[LAYERS - 1], other=0.0)
        tl.store(last + source, w)
        tl.store(convex + tl.program_id(0), tl.min((w >= 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["count", "m", "level_stride", "level_step"])
def forward_points(
    rows,
    levels,
    packed,
    last,
    value,
    gradient,
    tape,
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
    KEEP: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Value and gradient [count, m] of rows [count, ROW] at levels: a tile of points a program.

    KEEP: instead of both, p and dp of every layer to tape [L, 4, count m, UNITS], for the backward pass.

    WIDTHS: k_0 .. k_{L-1}. SLOPES[i] is where v_i starts in a row, c_i stands behind it; GATES[i] where gate_{i+1}
    starts; kappa is last.
    """
    LAYERS: tl.constexpr = len(WIDTHS)
    SHARED: tl.constexpr = TOGETHER == BLOCK
    context, level, own, step, there = points_of_tile(count, m, BLOCK, TOGETHER)
    x = levels_of_tile(levels, context, level, own, step, there, level_stride, level_step)
    row = rows + context * ROW
    points = count.to(tl.int64) * m
    first_point = context * m + level
    point = (own * m + step).to(tl.uint32)  # unsigned: its upper half needs no register
    v = coefficients(row, own, there, SLOPES[0], WIDTHS[0], ROW, UNITS, SHARED)
    p = x[:, None] * v + coefficients(row, own, there, SLOPES[0] + WIDTHS[0], WIDTHS[0], ROW, UNITS, SHARED)
    if KEEP:
        kept = tape_of_tile(tape, 0, first_point, points, UNITS)
        tl.store(tape_at(kept, 0, point, points, UNITS), p, mask=there[:, None])
        tl.store(tape_at(kept, 1, point, points, UNITS), v, mask=there[:, None])
    z, first, _ = respond(p, leak, ACTIVATION, SQUARE)
    dz = first * v
    for i in range(1, LAYERS):
        start, width = chosen(SLOPES, i), chosen(WIDTHS, i)
        raw = coefficients(row, own, there, chosen(GATES, i - 1), chosen(WIDTHS, i - 1), ROW, UNITS, SHARED)
        gate, _ = respond_gate(raw, GATE)
        p, dp = products(gate * z, gate * dz, packed, i - 1, UNITS, PASSES, STACKED, False, EMULATED)
        v = coefficients(row, own, there, start, width, ROW, UNITS, SHARED)
        p += x[:, None] * v + coefficients(row, own, there, start + width, width, ROW, UNITS, SHARED)
        dp += v
        if KEEP:
            kept += 4 * points * UNITS
            tl.store(tape_at(kept, 0, point, points, UNITS), p, mask=there[:, None])
            tl.store(tape_at(kept, 1, point, points, UNITS), dp, mask=there[:, None])
        z, first, _ = respond(p, leak, ACTIVATION, False)
        dz = first * dp
    if not KEEP:
        raw = coefficients(row, own, there, GATES[LAYERS - 1], WIDTHS[LAYERS - 1], ROW, UNITS, SHARED)
        gate, _ = respond_gate(raw, GATE)
        gate = gate * tl.load(last + tl.arange(0, UNITS))[None, :]
        slope = coefficient(row, own, there, SLOPES[LAYERS], ROW, SHARED)
        g = tl.sum(gate * z, 1) + (x * slope + coefficient(row, own, there, SLOPES[LAYERS] + 1, ROW, SHARED))
        dg = tl.sum(gate * dz, 1) + slope
        if CURVATURE:
            kappa, _, _ = softplus(coefficient(row, own, there, ROW - 1, ROW, SHARED))
            kappa += floor
            g += 0.5 * kappa * x * x
            dg += kappa * x
        tl.store(value + first_point + point, g, mask=there)
        tl.store(gradient + first_point + point, dg, mask=there)


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

    tape [L, 4, points, UNITS]: parts 0 and 1 are p and dp of every layer, and in their place the adjoints of both when
    the program is done; it fills parts 2 and 3 with what the next layer read. d wz[i - 1] is the product of the
    adjoints of layer i and the inputs from layer i - 1, summed over both and all points.
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


@triton.jit(do_not_specialize=["m", "level_stride", "level_step", "flags"])
def keep_order(
    levels,
    gradient,
    convex,
    ordered,
    m,
    level_stride,
    level_step,
    flags,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """ordered[b, i]: the largest gradient [b, j] of the levels j up to level i, where every flag of ``convex`` is set.

    Rounding may have turned neighbours of an increasing map around. What is not a number stays where it is.
    """
    blocks = tl.cdiv(m, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    flag = tl.arange(0, FLAGS)
    increasing = tl.min(tl.load(convex + flag, mask=flag < flags, other=1), 0)
    x = tl.load(levels + row * level_stride + i.to(tl.int64) * level_step, mask=i < m, other=0.0)
    own = tl.load(gradient + row * m + i, mask=i < m, other=0.0)
    most = own
    if increasing != 0:
        for start in range(0, m, OTHERS):
            j = start + tl.arange(0, OTHERS)
            y = tl.load(levels + row * level_stride + j.to(tl.int64) * level_step, mask=j < m, other=0.0)
            other = tl.load(gradient + row * m + j, mask=j < m, other=float("nan"))
            counts = (y[None, :] <= x[:, None]) & (other[None, :] > own[:, None])
            best = tl.max(tl.where(counts, other[None, :], float("-inf")), 1)
            most = tl.where(best > most, best, most)
    tl.store(ordered + row * m + i, most, mask=i < m)
