"""The room's Triton kernels. A program owns whole rows; no atomics but the minimum of the rows that hold NaN."""

import triton
import triton.language as tl


@triton.jit
def _failure(p):
    """1 - p clipped to [0, 1], in p's type."""
    return 1.0 - tl.minimum(tl.maximum(p, 0.0), 1.0)


@triton.jit
def _report(bad, rows, nan_row_ptr):
    """The lowest of the rows whose ``bad`` is 1, over all programs."""
    if tl.max(bad, axis=0) > 0:
        tl.atomic_min(nan_row_ptr, tl.min(tl.where(bad > 0, rows, 2147483647), axis=0))


@triton.jit
def _powers(fail, BITS: tl.constexpr):
    """fail^(2^k) for k = 0 .. BITS - 1."""
    powers = (fail,)
    for _ in tl.static_range(1, BITS):
        powers = powers + (powers[-1] * powers[-1],)
    return powers


@triton.jit
def _search(fail, wanted, last, columns, margin, BITS: tl.constexpr):
    """How many N <= last miss ``wanted``, by the bits of N, and whether a sum came within ``margin`` of it."""
    powers = _powers(fail, BITS)
    current = tl.zeros_like(fail) + 1.0
    missed = tl.zeros_like(wanted).to(tl.int32)
    near = missed
    for step in tl.static_range(BITS):
        candidate = current * powers[BITS - 1 - step]
        reached = 1.0 - tl.sum(candidate, axis=1) / columns
        more = missed + (1 << (BITS - 1 - step))
        possible = more <= last
        near = near | (possible & (tl.abs(reached - wanted) < margin)).to(tl.int32)
        moves = possible & (reached < wanted)
        missed = tl.where(moves, more, missed)
        current = tl.where(moves[:, None], candidate, current)
    return missed, near


@triton.jit
def budget_kernel(
    quantiles_ptr,
    target_ptr,
    budget_ptr,
    nan_row_ptr,
    rows,
    columns,
    row_stride: tl.int64,
    target_stride: tl.int64,
    last,
    margin: tl.float32,
    touch: tl.float64,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Smallest N that reaches the target, for rows that fit in registers. last = n_max - 1.

    SINGLE: searched in float32; a program with a sum within ``margin`` of its target searches again in float64.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = row < rows
    valid = inside[:, None] & (column < columns)[None, :]
    p = tl.load(quantiles_ptr + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=valid, other=1.0)
    _report(tl.max((p != p).to(tl.int32), axis=1), row, nan_row_ptr)
    target = tl.load(target_ptr + row.to(tl.int64) * target_stride, mask=inside, other=0.0)
    wide = target - touch
    if SINGLE:
        missed, near = _search(_failure(p.to(tl.float32)), wide.to(tl.float32), last, columns, margin, BITS)
        if tl.max(near, axis=0) > 0:
            missed, near = _search(_failure(p.to(tl.float64)), wide, last, columns, 0.0, BITS)
    else:
        missed, near = _search(_failure(p.to(tl.float64)), wide, last, columns, 0.0, BITS)
    tl.store(budget_ptr + row, missed + 1, mask=inside)


@triton.jit
def budget_long_kernel(
    quantiles_ptr,
    target_ptr,
    budget_ptr,
    nan_row_ptr,
    columns,
    row_stride: tl.int64,
    target_stride: tl.int64,
    last,
    highest,
    touch: tl.float64,
    BLOCK_COLUMNS: tl.constexpr,
):
    """`budget_kernel` in float64 for a row of any length and any n_max: read once a bit of N, from highest."""
    row = tl.program_id(0)
    start = quantiles_ptr + row.to(tl.int64) * row_stride
    wanted = tl.load(target_ptr + row.to(tl.int64) * target_stride) - touch
    missed = 0
    bad = 0
    bit = highest
    while bit > 0:
        more = missed + bit
        total = tl.full((), 0.0, tl.float64)
        for first in range(0, columns, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            p = tl.load(start + column, mask=column < columns, other=1.0).to(tl.float64)
            bad = tl.maximum(bad, tl.max((p != p).to(tl.int32), axis=0))
            square = 1.0 - tl.minimum(tl.maximum(p, 0.0), 1.0)
            power = tl.zeros_like(square) + 1.0
            left = more
            while left > 0:
                power = tl.where(left & 1 != 0, power * square, power)
                square = square * square
                left = left >> 1
            total += tl.sum(power, axis=0)
        if (more <= last) & (1.0 - total / columns < wanted):
            missed = more
        bit = bit >> 1
    if bad > 0:
        tl.atomic_min(nan_row_ptr, row)
    tl.store(budget_ptr + row, missed + 1)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _sums(start, row, inside, columns, first, nan_row_ptr, GAIN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """sum_m f^(first + j), j = 0 .. LOW * HIGH - 1, each term times p where GAIN; float64 [rows, LOW * HIGH].

    f^(low + LOW high) is a product of two short tables, so that a column costs one fused multiply-add for each j.
    """
    low = tl.arange(0, LOW)[None, None, :]
    high = tl.arange(0, HIGH)[None, :, None]
    total = tl.zeros((row.shape[0], HIGH, LOW), dtype=tl.float64)
    bad = tl.zeros_like(row)
    for column in range(columns):
        p = tl.load(start + column, mask=inside, other=1.0).to(tl.float64)
        bad = tl.where(p != p, 1, bad)
        p = tl.minimum(tl.maximum(p, 0.0), 1.0)[:, None, None]
        square = 1.0 - p
        other = p if GAIN else tl.zeros_like(p) + 1.0
        left = first
        power = square
        while left > 0:
            other = tl.where(left & 1 != 0, other * power, other)
            power = power * power
            left = left >> 1
        table = tl.where(low & 1 != 0, square, 1.0)
        for k in tl.static_range(1, LOW.bit_length() - 1):
            square = square * square
            table = tl.where(low & (1 << k) != 0, table * square, table)
        for k in tl.static_range(HIGH.bit_length() - 1):
            square = square * square
            other = tl.where(high & (1 << k) != 0, other * square, other)
        term = other * table
        total += tl.where(term < 2.2250738585072014e-308, 0.0, term) if GAIN else term
    _report(bad, row, nan_row_ptr)
    return tl.reshape(total, (row.shape[0], HIGH * LOW))


@triton.jit
def curve_kernel(
    quantiles_ptr,
    curve_ptr,
    nan_row_ptr,
    rows,
    columns,
    row_stride: tl.int64,
    n_max,
    BLOCK_ROWS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """S(N) for N = 1 .. n_max, LOW * HIGH of them at a time; a running maximum takes out what a rounding may lower."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    start = quantiles_ptr + row.to(tl.int64) * row_stride
    floor = tl.zeros((BLOCK_ROWS,), dtype=tl.float64)
    for first in range(0, n_max, LOW * HIGH):
        total = _sums(start, row, inside, columns, first + 1, nan_row_ptr, False, LOW, HIGH)
        reached = tl.minimum(tl.maximum(1.0 - total / columns, floor[:, None]), 1.0)
        reached = tl.associative_scan(reached, 1, _larger)
        floor = tl.max(reached, axis=1)
        n = first + tl.arange(0, HIGH * LOW)
        where = curve_ptr + row.to(tl.int64)[:, None] * n_max + n[None, :]
        tl.store(where, reached.to(curve_ptr.dtype.element_ty), mask=inside[:, None] & (n < n_max)[None, :])


@triton.jit
def gain_kernel(
    quantiles_ptr,
    key_ptr,
    nan_row_ptr,
    rows,
    columns,
    row_stride: tl.int64,
    n_min,
    room,
    SHIFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Keys int64 [rows, room]: the first 52 - SHIFT mantissa bits of the gains sum_m p (1 - p)^n, n = n_min .. ."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    start = quantiles_ptr + row.to(tl.int64) * row_stride
    for first in range(0, room, LOW * HIGH):
        gain = _sums(start, row, inside, columns, n_min + first, nan_row_ptr, True, LOW, HIGH)
        key = (gain.to(tl.int64, bitcast=True) + (1 << (SHIFT - 1))) >> SHIFT
        n = first + tl.arange(0, HIGH * LOW)
        where = key_ptr + row.to(tl.int64)[:, None] * room + n[None, :]
        tl.store(where, key, mask=inside[:, None] & (n < room)[None, :])


@triton.jit
def slope_kernel(
    grad_ptr,
    quantiles_ptr,
    out_ptr,
    columns,
    row_stride: tl.int64,
    column_stride: tl.int64,
    grad_row_stride: tl.int64,
    grad_column_stride: tl.int64,
    n_max,
    BLOCK: tl.constexpr,
):
    """sum_N grad_N N (1 - p)^(N - 1) / M of one row's columns where 0 < p < 1, else 0, by Horner's scheme."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < columns
    p = tl.load(quantiles_ptr + row * row_stride + column.to(tl.int64) * column_stride, mask=valid, other=0.0)
    p = p.to(tl.float64)
    fail = _failure(p)
    slope = tl.zeros((BLOCK,), dtype=tl.float64)
    for step in range(n_max):
        n = n_max - step
        g = tl.load(grad_ptr + row * grad_row_stride + (n - 1).to(tl.int64) * grad_column_stride).to(tl.float64)
        slope = slope * fail + n * g
    slope = tl.where((p > 0.0) & (p < 1.0), slope / columns, 0.0)
    tl.store(out_ptr + row * columns + column, slope.to(out_ptr.dtype.element_ty), mask=valid)
