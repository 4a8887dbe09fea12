"""Kernels of the room dist_ppo. Every program belongs to one row, so a row's result knows nothing of the others.

``logits`` are a block of the vocabulary that begins at token ``first``, 0 where it is all of it. The candidates of a
row are its entries begin .. end, by increasing token. inverse is 1 / temperature, scale = log2(e) * inverse.

A sum of 2^((x - reference) * scale) over the tokens that are no candidates is the pair (reference, total): a logit that
none exceeds, and a total that is NaN where a logit is NaN or +inf. The candidates, which hold most of the probability,
join the sum in float64: what is left of 1 - p beside a certain one then keeps its digits.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(
    -3.4028234663852886e38
)  # the reference of no logits, so that -inf - -inf is never formed
HIGHEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
SMALLEST: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
MINUS_INFINITY: tl.constexpr = tl.constexpr(float("-inf"))
NO_COLUMN: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def power_scale(inverse):
    """log2(e) * inverse in float32, neither 0 nor infinite, so that it never makes NaN of 0 or -inf."""
    scale = tl.full((), inverse, tl.float64) * LOG2E
    return tl.minimum(tl.maximum(scale, SMALLEST), HIGHEST).to(tl.float32)


@triton.jit
def narrowed(value, like, ROUND: tl.constexpr):
    """float32 as what ``like`` points to, rounded to nearest; ROUND where bfloat16 casts cut off: the interpreter."""
    if ROUND and like.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return value.to(like.dtype.element_ty)


@triton.jit
def entry_from(token_ids, begin, end, token, ENTRIES: tl.constexpr):
    """The first entry of begin .. end whose token is not below ``token``."""
    entry = begin
    for at in range(begin, end, ENTRIES):
        index = at + tl.arange(0, ENTRIES)
        found = tl.load(token_ids + index, mask=index < end, other=token)
        entry += tl.sum((found < token).to(tl.int64), 0)
    return entry


@triton.jit
def column_of(token_ids, entry, end, first):
    """The column of an entry in a block, int32; beyond all columns where there is no such entry."""
    token = tl.load(token_ids + entry, mask=entry < end, other=0)
    return tl.where(entry < end, token - first, NO_COLUMN).to(tl.int32)


@triton.jit
def sum_columns(
    row,  # pointer to column 0
    token_ids,
    entry_logits,  # float32 [nnz], written where an entry is met
    entry,
    end,
    first,
    columns,
    scale,
    STEPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The pair of a row of a block, float32. ``entry`` is the first one that is not before it.

    A tile is STEPS loads of VECTOR logits by every thread. Each thread keeps a pair of its own, so that nothing is
    exchanged before the end, and moving its reference takes one exponential a tile.
    """
    step, thread, lane = tl.arange(0, STEPS), tl.arange(0, THREADS), tl.arange(0, VECTOR)
    tile = (step[:, None, None] * THREADS + thread[None, :, None]) * VECTOR + lane[None, None, :]
    reference = tl.full([THREADS], LOWEST, tl.float32)
    total = tl.full([THREADS], 0.0, tl.float32)
    met = column_of(token_ids, entry, end, first)
    for at in range(0, columns, STEPS * THREADS * VECTOR):
        column = at + tile
        x = tl.load(row + column, mask=column < columns, other=MINUS_INFINITY).to(tl.float32)
        while met < tl.minimum(at + STEPS * THREADS * VECTOR, columns):
            tl.store(entry_logits + entry, tl.load(row + met).to(tl.float32))
            x = tl.where(column == met, MINUS_INFINITY, x)
            entry += 1
            met = column_of(token_ids, entry, end, first)
        top = tl.maximum(reference, tl.max(tl.max(x, 2), 0))
        part = tl.sum(tl.sum(tl.exp2((x - top[None, :, None]) * scale), 2), 0)
        total = total * tl.exp2((reference - top) * scale) + part
        reference = top
    top = tl.max(reference, 0)
    return top, tl.sum(total * tl.exp2((reference - top) * scale), 0)


@triton.jit
def settle_entries(
    reference,
    total,
    begin,
    end,
    entry_logits,
    policy_logp,
    advantage,
    weight,
    coefficients,  # float64 [nnz], written
    clip_low,
    clip_high,
    dual_clip,
    inverse,
    ENTRIES: tl.constexpr,
):
    """Log-sum-exp and loss of a row, and d loss / d log pi_theta of its entries: `reference.settle`, all in float64."""
    top = reference
    for at in range(begin, end, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        x = tl.load(entry_logits + entry, mask=entry < end, other=MINUS_INFINITY).to(tl.float64)
        top = tl.maximum(top, tl.max(x, 0))
    total = total * tl.exp((reference - top) * inverse)
    for at in range(begin, end, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        x = tl.load(entry_logits + entry, mask=entry < end, other=MINUS_INFINITY).to(tl.float64)
        total += tl.sum(tl.exp((x - top) * inverse), 0)
    lse = top * inverse + tl.log(total)

    loss = tl.full((), 0.0, tl.float64)
    bounded = tl.where(
        tl.full((), dual_clip, tl.float64) < float("inf"), 0.0, MINUS_INFINITY
    )  # below it an advantage is
    for at in range(begin, end, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        held = entry < end
        x = tl.load(entry_logits + entry, mask=held, other=0.0).to(tl.float64)
        old_logp = tl.load(policy_logp + entry, mask=held, other=MINUS_INFINITY)
        gain = tl.load(advantage + entry, mask=held, other=0.0)
        new, old = tl.exp(x * inverse - lse), tl.exp(old_logp)
        low, high = old * (1 - clip_low), old * (1 + clip_high)
        free = new * gain
        shut = tl.minimum(tl.maximum(new, low), high) * gain
        term = tl.minimum(free, shut)
        tie = tl.where(
            (low <= new) & (new <= high), 1.0, 0.5
        )  # an exact tie takes half of each branch, as autograd does
        share = tl.where(free == shut, tie, tl.where(free < shut, 1.0, 0.0))
        floor = tl.where(gain < bounded, dual_clip * old * gain, MINUS_INFINITY)
        share = share * tl.where(term > floor, 1.0, tl.where(term == floor, 0.5, 0.0))
        counted = held & (old_logp > MINUS_INFINITY)
        loss -= tl.sum(tl.where(counted, weight * tl.maximum(term, floor), 0.0), 0)
        tl.store(coefficients + entry, tl.where(counted, -weight * share * free, 0.0), mask=held)
    return lse, loss


@triton.jit
def share_entries(
    row,  # pointer to column 0
    columns,
    begin,
    end,
    token_ids,
    first,
    lse,
    coefficients,
    entry_slopes,  # float32 [nnz], written for the entries of this block
    inverse,
    ENTRIES: tl.constexpr,
):
    """d loss / d logit of the row's entries in this block, and what the other columns v need: (factor, certain).

    Theirs is factor * 2^((x_v - certain) * scale), where certain is the logit of a probability of 1.
    """
    total = tl.full((), 0.0, tl.float64)
    for at in range(begin, end, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        total += tl.sum(tl.load(coefficients + entry, mask=entry < end, other=0.0), 0)
    for at in range(begin, end, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        held = entry < end
        column = tl.load(token_ids + entry, mask=held, other=-1) - first
        held = held & (column >= 0) & (column < columns)
        x = tl.load(row + column, mask=held, other=0.0).to(tl.float32).to(tl.float64)
        own = tl.load(coefficients + entry, mask=held, other=0.0)
        slope = (own - total * tl.exp(x * inverse - lse)) * inverse
        tl.store(entry_slopes + entry, slope.to(tl.float32), mask=held)
    certain = tl.minimum(tl.maximum(lse / inverse, LOWEST), HIGHEST).to(tl.float32)
    factor = -total * inverse * tl.exp(certain.to(tl.float64) * inverse - lse)
    return tl.where(total == 0, 0.0, factor).to(tl.float32), certain


@triton.jit
def write_columns(
    row,
    out,  # pointer to column 0 of the row that is written, which may be ``row``
    token_ids,
    entry_slopes,
    entry,
    end,
    first,
    start,
    stop,
    factor,
    certain,
    scale,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
):
    """d loss / d logit of columns start .. stop. ``entry`` is the first one that is not before them.

    In place is safe: nobody else reads a logit that a thread overwrites. Where the factor is 0 nothing is read.
    """
    met = column_of(token_ids, entry, end, first)
    readable = tl.where(factor != 0, stop, 0)
    for at in range(start, stop, BLOCK):
        column = at + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < readable, other=MINUS_INFINITY).to(tl.float32)
        slope = factor * tl.exp2((x - certain) * scale)
        while met < tl.minimum(at + BLOCK, stop):
            slope = tl.where(column == met, tl.load(entry_slopes + entry), slope)
            entry += 1
            met = column_of(token_ids, entry, end, first)
        tl.store(out + column, narrowed(slope, out, ROUND), mask=column < stop)


@triton.jit
def measure_row(
    row,  # pointer to column 0
    columns,
    begin,  # pointer to the row's, as is end
    end,
    token_ids,
    entry_logits,
    policy_logp,
    advantage,
    weight,
    coefficients,
    clip_low,
    clip_high,
    dual_clip,
    inverse,
    STEPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Log-sum-exp and loss of a row with candidates; its coefficients are written, and in sight of all threads."""
    reference, total = sum_columns(
        row,
        token_ids,
        entry_logits,
        tl.load(begin),
        tl.load(end),
        0,
        columns,
        power_scale(inverse),
        STEPS,
        THREADS,
        VECTOR,
    )
    tl.debug_barrier()
    lse, loss = settle_entries(
        reference.to(tl.float64),
        total.to(tl.float64),
        tl.load(begin),  # again, so that it takes no register during the sum
        tl.load(end),
        entry_logits,
        policy_logp,
        advantage,
        weight,
        coefficients,
        clip_low,
        clip_high,
        dual_clip,
        inverse,
        ENTRIES,
    )
    tl.debug_barrier()
    return lse, loss


@triton.jit
def loss_rows(
    logits,  # [T, columns]
    stride: tl.int64,
    columns,
    begin,  # int64 [T], as is end: the entries of every row
    end,
    token_ids,  # int64 [nnz]
    entry_logits,  # float32 [nnz], written
    policy_logp,  # float64 [nnz]
    advantage,  # float64 [nnz]
    row_weight,  # float64 [T]
    weight_stride,
    lse,  # float64 [T], written: 0 in rows without candidates, as is losses
    losses,
    coefficients,  # float64 [nnz], written: d loss / d log pi
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    inverse: tl.float64,
    STEPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Everything of a row but its gradient. Reads the row once, or not where it has no candidates."""
    row = tl.program_id(0).to(tl.int64)
    entry, last = tl.load(begin + row), tl.load(end + row)
    found, loss = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    if entry < last:
        found, loss = measure_row(
            logits + row * stride,
            columns,
            begin + row,
            end + row,
            token_ids,
            entry_logits,
            policy_logp,
            advantage,
            tl.load(row_weight + row * weight_stride),
            coefficients,
            clip_low,
            clip_high,
            dual_clip,
            inverse,
            STEPS,
            THREADS,
            VECTOR,
            ENTRIES,
        )
    tl.store(lse + row, found)
    tl.store(losses + row, loss)


@triton.jit
def loss_and_gradient_rows(
    logits,  # [T, columns]
    stride: tl.int64,
    columns,
    begin,  # int64 [T], as is end: the entries of every row
    end,
    token_ids,  # int64 [nnz]
    entry_logits,  # float32 [nnz], written
    policy_logp,  # float64 [nnz]
    advantage,  # float64 [nnz]
    row_weight,  # float64 [T]
    weight_stride,
    lse,  # float64 [T], written: 0 in rows without candidates, as is losses
    losses,
    coefficients,  # float64 [nnz], written: d loss / d log pi
    entry_slopes,  # float32 [nnz], written: d loss / d logit
    out,  # [T, columns], written; may be the logits
    out_stride: tl.int64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    inverse: tl.float64,
    STEPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROUND: tl.constexpr,
):
    """`loss_rows`, then the gradient, for which the row is read again while the second-level cache has it.

    A barrier stands between what threads leave for each other in memory and its use, and between the last logits of
    entries, which every thread reads, and the first that is overwritten.
    """
    row = tl.program_id(0).to(tl.int64)
    entry, last = tl.load(begin + row), tl.load(end + row)
    source = logits + row * stride
    factor, certain = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if entry < last:
        found, loss = measure_row(
            source,
            columns,
            begin + row,
            end + row,
            token_ids,
            entry_logits,
            policy_logp,
            advantage,
            tl.load(row_weight + row * weight_stride),
            coefficients,
            clip_low,
            clip_high,
            dual_clip,
            inverse,
            STEPS,
            THREADS,
            VECTOR,
            ENTRIES,
        )
        tl.store(lse + row, found)
        tl.store(losses + row, loss)
        factor, certain = share_entries(
            source, columns, entry, last, token_ids, 0, found, coefficients, entry_slopes, inverse, ENTRIES
        )
        tl.debug_barrier()
    else:
        tl.store(lse + row, 0.0)
        tl.store(losses + row, 0.0)
    write_columns(
        source,
        out + row * out_stride,
        token_ids,
        entry_slopes,
        entry,
        last,
        0,
        0,
        columns,
        factor,
        certain,
        power_scale(inverse),
        BLOCK,
        ROUND,
    )


@triton.jit
def share_rows(
    logits,  # [T, columns]
    stride: tl.int64,
    columns,
    begin,  # int64 [T]
    end,
    token_ids,  # int64 [nnz]
    first,
    lse,  # float64 [T]
    coefficients,  # float64 [nnz]
    entry_slopes,  # float32 [nnz], written for the entries of this block
    factors,  # float32 [T], written, as is certains
    certains,
    inverse: tl.float64,
    ENTRIES: tl.constexpr,
):
    """What `write_rows` needs to know of a row, taken before anything is written over its logits."""
    row = tl.program_id(0).to(tl.int64)
    factor, certain = share_entries(
        logits + row * stride,
        columns,
        tl.load(begin + row),
        tl.load(end + row),
        token_ids,
        first,
        tl.load(lse + row),
        coefficients,
        entry_slopes,
        inverse,
        ENTRIES,
    )
    tl.store(factors + row, factor)
    tl.store(certains + row, certain)


@triton.jit
def write_rows(
    logits,  # [T, columns]
    stride: tl.int64,
    columns,
    begin,  # int64 [T]
    end,
    token_ids,  # int64 [nnz]
    first,
    entry_slopes,  # float32 [nnz]
    factors,  # float32 [T]
    certains,
    out,  # [T, columns], written; may be the logits
    out_stride: tl.int64,
    inverse: tl.float64,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROUND: tl.constexpr,
):
    """d loss / d logits of one slice of a row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * SLICE
    last = tl.load(end + row)
    write_columns(
        logits + row * stride,
        out + row * out_stride,
        token_ids,
        entry_slopes,
        entry_from(token_ids, tl.load(begin + row), last, first + start, ENTRIES),
        last,
        first,
        start,
        tl.minimum(start + SLICE, columns),
        tl.load(factors + row),
        tl.load(certains + row),
        power_scale(inverse),
        BLOCK,
        ROUND,
    )


@triton.jit
def fold_rows(
    logits,  # [rows, columns]
    stride: tl.int64,
    columns,
    begin,  # int64 [rows]
    end,
    token_ids,  # int64 [nnz]
    entry_logits,  # float32 [nnz], written for the entries of this block
    first,
    references,  # float64 [rows], read and written, as is totals
    totals,
    inverse: tl.float64,
    STEPS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Adds a block of logits to the pair of every row."""
    row = tl.program_id(0).to(tl.int64)
    last = tl.load(end + row)
    entry = entry_from(token_ids, tl.load(begin + row), last, first, ENTRIES)
    reference, total = sum_columns(
        logits + row * stride,
        token_ids,
        entry_logits,
        entry,
        last,
        first,
        columns,
        power_scale(inverse),
        STEPS,
        THREADS,
        VECTOR,
    )
    old_reference, old_total = tl.load(references + row), tl.load(totals + row)
    reference, total = reference.to(tl.float64), total.to(tl.float64)
    top = tl.maximum(reference, old_reference)
    tl.store(references + row, top)
    old_total *= tl.exp((old_reference - top) * inverse)
    tl.store(totals + row, old_total + total * tl.exp((reference - top) * inverse))


@triton.jit
def settle_rows(
    references,  # float64 [rows]
    totals,
    begin,  # int64 [rows]
    end,
    entry_logits,  # float32 [nnz]
    policy_logp,  # float64 [nnz]
    advantage,  # float64 [nnz]
    row_weight,  # float64 [rows]
    weight_stride,
    lse,  # float64 [rows], written, as is losses
    losses,
    coefficients,  # float64 [nnz], written: d loss / d log pi
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    inverse: tl.float64,
    ENTRIES: tl.constexpr,
):
    """What `loss_rows` finds, after the last block."""
    row = tl.program_id(0).to(tl.int64)
    found, loss = settle_entries(
        tl.load(references + row),
        tl.load(totals + row),
        tl.load(begin + row),
        tl.load(end + row),
        entry_logits,
        policy_logp,
        advantage,
        tl.load(row_weight + row * weight_stride),
        coefficients,
        clip_low,
        clip_high,
        dual_clip,
        inverse,
        ENTRIES,
    )
    tl.store(lse + row, found)
    tl.store(losses + row, loss)
