"""What the kernels of both passes are made of.

A tile is BLOCK points: BLOCK / TOGETHER contexts with TOGETHER levels each, one point a row, one unit a column. Where a
tile has one context only (SHARED), its coefficients are one row for the whole tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def points_of_tile(count, m, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """The first context of the program's tile and its first level.

    And for each point, [BLOCK]: how many contexts and levels further on it is, and whether there is such a point.
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
    """TABLE[i] for an i known at run time only: layers share one loop body, which saves registers and compilation."""
    found = 0
    for j in tl.static_range(len(TABLE)):
        found = tl.where(i == j, TABLE[j], found)
    return found


@triton.jit
def coefficients(row, next_context, there, start, width, ROW: tl.constexpr, UNITS: tl.constexpr, SHARED: tl.constexpr):
    """Entries start .. start + width - 1 of each point's row, zeros behind; [BLOCK, UNITS], or [1, UNITS] shared.

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
    """Where the tile's points start in a part of the layer, [BLOCK, UNITS]; point: how many after the first."""
    return tape + part * points * UNITS + ((point * UNITS)[:, None] + tl.arange(0, UNITS)[None, :])


@triton.jit
def softplus(p):
    """log(1 + e^p) and its first two derivatives, to a few roundings for every p: one exponential and one division.

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
    """x rounded to bfloat16, ties to even; float32 in the interpreter, which truncates casts and errs on products."""
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
