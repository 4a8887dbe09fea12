"""What both passes of the Triton backend share, the forward kernel, and the two small kernels around it.

A tile is BLOCK points: BLOCK / TOGETHER contexts with TOGETHER levels each, one point a row, one unit a column. Where a
tile has one context only (SHARED), its coefficients are one row for the whole tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def points_of_tile(count, m, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """The first context of the program's tile and its first level; and for each point, [BLOCK]: how many contexts and levels
    further on it is, and whether there is such a point.
    """
    chunks = tl.cdiv(m, TOGETHER)
    context = (tl.program_id(0) // chunks).to(tl.int64) * (BLOCK // TOGETHER)
    level = (tl.program_id(0) % chunks) * TOGETHER
    lane = tl.arange(0, BLOCK)
    there = (level + lane % TOGETHER < m) & (context + lane // TOGETHER < count)
    return context, level, lane // TOGETHER, lane % TOGETHER, there


@triton.jit
def levels_of_tile(levels, context, level, next_context, next_level, there, level_stride, level_step):
    """x of each point, [BLOCK]."""
    levels += context * level_stride + level.to(tl.int64) * level_step
    to = next_context.to(tl.int64) * level_stride + next_level.to(tl.int64) * level_step
    return tl.load(levels + to, mask=there, other=0.0)


@triton.jit
def chosen(TABLE: tl.constexpr, i):
    """TABLE[i] for an i known at run time only: layers share one loop body, which keeps registers and compilation short."""
    found = 0
    for j in tl.static_range(len(TABLE)):
        found = tl.where(i == j, TABLE[j], found)
    return found


@triton.jit
def coefficients(row, next_context, there, start, width, ROW: tl.constexpr, UNITS: tl.constexpr, SHARED: tl.constexpr):
    """Entries start .. start + width - 1 of each point's row, zeros behind: [1, UNITS] where shared, else [BLOCK, UNITS].

    row: the tile's first row, of ROW entries.
    """
    unit = tl.arange(0, UNITS)
    if SHARED:
        return tl.load(row + start + unit, mask=unit < width, other=0.0)[None, :]
    else:
        to = (next_context * ROW + start)[:, None] + unit[None, :]
        return tl.load(row + to.to(tl.uint32), mask=there[:, None] & (unit < width)[None, :], other=0.0)


@triton.jit
def coefficient(row, next_context, there, at, ROW: tl.constexpr, SHARED: tl.constexpr):
    """One entry of each point's row: one number where shared, else [BLOCK]."""
    if SHARED:
        return tl.load(row + at)
    else:
        return tl.load(row + (next_context * ROW + at).to(tl.uint32), mask=there, other=0.0)


@triton.jit
def tape_of_tile(tape, layer, first_point, points, UNITS: tl.constexpr):
    """Where the tile's points start in part 0 of a layer of a tape [L, 4, points, UNITS]."""
    return tape + (layer * 4 * points + first_point) * UNITS


@triton.jit
def tape_at(tape, part: tl.constexpr, point, points, UNITS: tl.constexpr):
    """Where each of the tile's points starts in a part of the layer, [BLOCK, UNITS]; point: how many after the first."""
    return tape + part * points * UNITS + ((point * UNITS)[:, None] + tl.arange(0, UNITS)[None, :])


@triton.jit
def softplus(p):
    """log(1 + e^p) and its first two derivatives, each to a few roundings for every p, from one exponential and one division.

    With e = e^-|p| and s = e / (2 + e) <= 1/3: log(1 + e) = 2 atanh(s), a polynomial of degree 4 in s^2 (Chebyshev fit,
    8e-9 relative).
    """
    e = tl.exp(-tl.abs(p))
    both = 1.0 / ((1.0 + e) * (2.0 + e))
    inverse = (2.0 + e) * both
    s = e * (1.0 + e) * both
    t = s * s
    series = 0.40024852752685547 + t * (0.2796141803264618 + t * 0.2817465662956238)
    log = s * (2.0 + t * (0.6666631698608398 + t * series))
    small = e * inverse
    return tl.maximum(p, 0.0) + log, tl.where(p > 0, inverse, small), small * inverse


@triton.jit
def respond(p, leak, ACTIVATION: tl.constexpr, SQUARE: tl.constexpr):
    """s(p), s'(p) and s''(p); of s^2 where squared."""
    if ACTIVATION == "softplus":
        z, first, second = softplus(p)
    else:
        first = tl.where(p > 0, 1.0, leak)
        z = p * first
        second = tl.zeros_like(p)
    if SQUARE:
        second = 2.0 * (first * first + z * second)
        first = 2.0 * z * first
        z = z * z
    return z, first, second


@triton.jit
def respond_gate(raw, GATE: tl.constexpr):
    """The gate of a raw coefficient and its derivative."""
    if GATE == "softplus":
        gate, first, _ = softplus(raw)
    else:
        gate = tl.maximum(raw, 0.0)
        first = tl.where(raw > 0, 1.0, 0.0)
    return gate, first


@triton.jit
def nearest_bfloat16(x, EMULATED: tl.constexpr):
    """x rounded to bfloat16, ties to even; in float32 for the interpreter, which truncates casts and errs on products."""
    if EMULATED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def split(x, PASSES: tl.constexpr, EMULATED: tl.constexpr):
    """x in bfloat16 parts, each the rounding of what those before it leave: two for three passes, three for six."""
    first = nearest_bfloat16(x, EMULATED)
    if PASSES == 1:
        return (first,)
    else:
        left = x - first.to(tl.float32)
        second = nearest_bfloat16(left, EMULATED)
        if PASSES == 3:
            return first, second
        else:
            return first, second, nearest_bfloat16(left - second.to(tl.float32), EMULATED)


@triton.jit
def matrix(
    packed,
    which,
    part: tl.constexpr,
    first: tl.constexpr,
    UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BACK: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """OUTPUTS columns from ``first`` on of a part of a packed matrix; of its transpose on the way back."""
    unit = tl.arange(0, UNITS)[:, None]
    column = (first + tl.arange(0, OUTPUTS))[None, :]
    packed += (which * 3 + part) * UNITS * UNITS
    tile = tl.load(packed + (column * UNITS + unit if BACK else unit * UNITS + column))
    if EMULATED:
        return tile.to(tl.float32)
    else:
        return tile


@triton.jit
def product(
    a,
    packed,
    which,
    FIRST: tl.constexpr,
    UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PASSES: tl.constexpr,
    BACK: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """The parts of a [n, UNITS] times columns of a packed matrix, in bfloat16 products summed in float32.

    One pass is plain bfloat16. Three leave out what is below 2^-17 of each term, six what is below 2^-25. A part of the
    matrix has done its work when the next is loaded, and 32 columns are taken at once: that bounds the registers.
    """
    if OUTPUTS > 32:
        HALF: tl.constexpr = OUTPUTS // 2
        left = product(a, packed, which, FIRST, UNITS, HALF, PASSES, BACK, EMULATED)
        right = product(a, packed, which, FIRST + HALF, UNITS, HALF, PASSES, BACK, EMULATED)
        return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], OUTPUTS))
    else:
        w = matrix(packed, which, 0, FIRST, UNITS, OUTPUTS, BACK, EMULATED)
        total = tl.dot(a[0], w)
        if PASSES > 1:
            total = tl.dot(a[1], w, total)
            if PASSES > 3:
                total = tl.dot(a[2], w, total)
            w = matrix(packed, which, 1, FIRST, UNITS, OUTPUTS, BACK, EMULATED)
            total = tl.dot(a[0], w, total)
            if PASSES > 3:
                total = tl.dot(a[1], w, total)
                w = matrix(packed, which, 2, FIRST, UNITS, OUTPUTS, BACK, EMULATED)
                total = tl.dot(a[0], w, total)
        return total


@triton.jit
def products(
    a,
    b,
    packed,
    which,
    UNITS: tl.constexpr,
    PASSES: tl.constexpr,
    STACKED: tl.constexpr,
    BACK: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """a and b [n, UNITS] times one matrix (or its transpose): as two products, or stacked into one of 2 n rows."""
    if STACKED:
        pair = tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), (2 * a.shape[0], UNITS))
        pair = product(split(pair, PASSES, EMULATED), packed, which, 0, UNITS, UNITS, PASSES, BACK, EMULATED)
        return tl.split(tl.permute(tl.reshape(pair, (2, a.shape[0], UNITS)), (1, 2, 0)))
    else:
        first = product(split(a, PASSES, EMULATED), packed, which, 0, UNITS, UNITS, PASSES, BACK, EMULATED)
        second = product(split(b, PASSES, EMULATED), packed, which, 0, UNITS, UNITS, PASSES, BACK, EMULATED)
        return first, second


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

    SLOPES[i] is where v_i starts in a row, c_i stands behind it; GATES[i] where gate_{i+1} starts; kappa is last. WIDTHS:
    k_0 .. k_{L-1}.
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

    packed [L - 1, 3, UNITS inputs, UNITS outputs]: the bfloat16 parts of each, zeros behind. last [UNITS]: the output layer.
    convex[program]: 1 where every weight that the program saw is >= 0.
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
    """ordered[b, i]: the largest gradient [b, j] over the levels j up to level i, where every flag of ``convex`` is set.

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
