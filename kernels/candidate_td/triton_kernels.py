"""Kernels of the room candidate_td. Every program belongs to one row, so a row's result knows nothing of the others.

Pairs (peak, total) are those of `prmfast.kernels.common.triton_math`. inverse is 1 / temperature, scale is that times
log2(e); forced is the id that joins a row's candidates, -1 for none. A row has ``slices`` slices of SLICE columns and
``chunks`` chunks of CHUNK columns, the last ones shorter; such counts are not specialised, as 1 would be compiled anew.
"""

import triton
import triton.language as tl

from prmfast.kernels.common.triton_math import total_at

MINUS_INFINITY: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["slices", "chunks"])
def slice_statistics_kernel(
    logits,  # [T, columns]
    stride: tl.int64,
    columns,
    slices,
    chunks,
    scale,
    peaks,  # float32 [T, slices], written, as is totals
    totals,
    chunk_peaks,  # float32 [T, chunks], written WITH_CHUNKS
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
    WITH_CHUNKS: tl.constexpr,
):
    """The pair of one slice of a row and the largest logit of each of its chunks; no loop: all loads are in flight."""
    row = (tl.program_id(0) // slices).to(tl.int64)
    part = tl.program_id(0) % slices
    chunk = part * (SLICE // CHUNK) + tl.arange(0, SLICE // CHUNK)
    column = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x = tl.load(logits + row * stride + column, mask=column < columns, other=MINUS_INFINITY).to(tl.float32)
    tops = tl.max(x, 1)
    peak = tl.max(tops, 0)
    nothing, none = tl.full((), MINUS_INFINITY, tl.float32), tl.full((), 0.0, tl.float64)
    total = total_at(peak, nothing, none, x, 1.0, scale)
    tl.store(peaks + row * slices + part, peak)
    tl.store(totals + row * slices + part, total.to(tl.float32))
    if WITH_CHUNKS:
        tl.store(chunk_peaks + row * chunks + chunk, tops, mask=chunk < chunks)


@triton.jit
def row_statistics(peaks, totals, row, slices, scale, SLICES: tl.constexpr):
    """Peak and log of the total of a row in float64 from the pairs of its slices; not finite where the row is bad."""
    peak = tl.full((), MINUS_INFINITY, tl.float32)
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, slices, SLICES):
        index = first + tl.arange(0, SLICES)
        some = tl.load(peaks + row * slices + index, mask=index < slices, other=MINUS_INFINITY)
        theirs = tl.load(totals + row * slices + index, mask=index < slices, other=0.0).to(tl.float64)
        top = tl.maximum(peak, tl.max(some, 0))
        total = total_at(top, peak, total, some, theirs, scale)
        peak = top
    return peak.to(tl.float64), tl.log(total)


@triton.jit
def ranked_chunks(chunk_peaks, row, first, chunks, peak, need, forced, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Of CHUNKS chunks from ``first``: index, whether it may hold a candidate, and its rank among those that may."""
    index = first + tl.arange(0, CHUNKS)
    tops = tl.load(chunk_peaks + row * chunks + index, mask=index < chunks, other=MINUS_INFINITY)
    passing = (tops.to(tl.float64) - peak >= need) | ((forced >= 0) & (index == forced // CHUNK))
    return index, passing, tl.cumsum(passing.to(tl.int32), 0)


@triton.jit(do_not_specialize=["slices", "chunks"])
def count_candidates_kernel(
    policy,  # [T, columns]
    stride: tl.int64,
    columns,
    slices,
    chunks,
    policy_peaks,  # float32 [T, slices]
    policy_totals,
    reward_peaks,
    reward_totals,
    chunk_peaks,  # float32 [T, chunks]
    sampled,  # int64 [T]
    policy_scale,
    reward_scale,
    policy_inverse: tl.float64,
    log_p_min: tl.float64,
    norms,  # float64 [T, 5], written: peak and log of the total of both sides, and what x - peak has to reach
    tally,  # int64 [2, T + 1], written from column 1 on: candidates of a row, and 1 where a side has no softmax
    SLICES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """How many candidates a row has. Reads the few chunks that may hold one.

    ``x - peak >= need`` in float64 is one rounded subtraction and a comparison, so it decides alike wherever it is
    compiled: what is counted here is what is written, and a chunk whose largest logit fails has none.
    """
    row = tl.program_id(0).to(tl.int64)
    peak, log_sum = row_statistics(policy_peaks, policy_totals, row, slices, policy_scale, SLICES)
    reward_peak, reward_log_sum = row_statistics(reward_peaks, reward_totals, row, slices, reward_scale, SLICES)
    need = (log_p_min + log_sum) / policy_inverse
    tl.store(norms + row * 5, peak)
    tl.store(norms + row * 5 + 1, log_sum)
    tl.store(norms + row * 5 + 2, reward_peak)
    tl.store(norms + row * 5 + 3, reward_log_sum)
    tl.store(norms + row * 5 + 4, need)
    sound = (tl.abs(log_sum) < float("inf")) & (tl.abs(reward_log_sum) < float("inf"))
    place = tally + row + 1
    tl.store(place + tl.num_programs(0) + 1, tl.where(sound, 0, 1).to(tl.int64))

    forced = tl.load(sampled + row)
    count = tl.full((), 0, tl.int32)
    for first in range(0, chunks, CHUNKS):
        index, passing, rank = ranked_chunks(chunk_peaks, row, first, chunks, peak, need, forced, CHUNK, CHUNKS)
        for k in range(1, tl.max(rank, 0) + 1):
            chunk = tl.sum(tl.where(passing & (rank == k), index, 0), 0)
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(policy + row * stride + column, mask=column < columns, other=MINUS_INFINITY).to(tl.float32)
            chosen = (x.to(tl.float64) - peak >= need) | (column == forced)
            count += tl.sum(chosen.to(tl.int32), 0)
    tl.store(place, count.to(tl.int64))


@triton.jit(do_not_specialize=["chunks"])
def write_candidates_kernel(
    policy,  # [T, columns]
    policy_stride: tl.int64,
    reward,  # [T, columns]
    reward_stride: tl.int64,
    columns,
    chunks,
    chunk_peaks,  # float32 [T, chunks]
    sampled,  # int64 [T]
    norms,  # float64 [T, 5]
    offsets,  # int64 [T + 1]
    policy_inverse: tl.float64,
    reward_inverse: tl.float64,
    beta: tl.float64,
    token_ids,  # int64 [nnz], written, as are the others
    policy_logp,  # float32 [nnz]
    advantage,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A row's candidates by increasing id, their log-probabilities finished in float64 from the logits themselves."""
    row = tl.program_id(0).to(tl.int64)
    peak, log_sum = tl.load(norms + row * 5), tl.load(norms + row * 5 + 1)
    reward_peak, reward_log_sum = tl.load(norms + row * 5 + 2), tl.load(norms + row * 5 + 3)
    need = tl.load(norms + row * 5 + 4)
    forced = tl.load(sampled + row)
    entry = tl.load(offsets + row)
    for first in range(0, chunks, CHUNKS):
        index, passing, rank = ranked_chunks(chunk_peaks, row, first, chunks, peak, need, forced, CHUNK, CHUNKS)
        for k in range(1, tl.max(rank, 0) + 1):
            chunk = tl.sum(tl.where(passing & (rank == k), index, 0), 0)
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(policy + row * policy_stride + column, mask=column < columns, other=MINUS_INFINITY)
            x = x.to(tl.float32).to(tl.float64)
            chosen = (x - peak >= need) | (column == forced)
            y = tl.load(reward + row * reward_stride + column, mask=chosen, other=0.0).to(tl.float32).to(tl.float64)
            logp = (x - peak) * policy_inverse - log_sum
            logq = (y - reward_peak) * reward_inverse - reward_log_sum
            place = tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(token_ids + entry + place, column.to(tl.int64), mask=chosen)
            tl.store(policy_logp + entry + place, logp.to(tl.float32), mask=chosen)
            difference = tl.where(logp == logq, 0.0, logq - logp)  # probability 0 on both sides: 0, not NaN
            tl.store(advantage + entry + place, (beta * difference).to(tl.float32), mask=chosen)
            entry += tl.sum(chosen.to(tl.int32), 0)


@triton.jit(do_not_specialize=["slices"])
def gather_logprob_kernel(
    logits,  # [T, columns]
    stride: tl.int64,
    slices,
    peaks,  # float32 [T, slices]
    totals,
    ids,  # int64 [T]
    scale,
    inverse: tl.float64,
    logp,  # float32 [T], written
    norm,  # float64 [T, 2], written: peak and log of the total
    SLICES: tl.constexpr,
):
    """The log-probability of one token of a row."""
    row = tl.program_id(0).to(tl.int64)
    peak, log_sum = row_statistics(peaks, totals, row, slices, scale, SLICES)
    x = tl.load(logits + row * stride + tl.load(ids + row)).to(tl.float32).to(tl.float64)
    tl.store(logp + row, ((x - peak) * inverse - log_sum).to(tl.float32))
    tl.store(norm + row * 2, peak)
    tl.store(norm + row * 2 + 1, log_sum)


@triton.jit(do_not_specialize=["blocks"])
def logprob_gradient_kernel(
    grad,  # float32 [T]
    logits,  # [T, columns]
    stride: tl.int64,
    columns,
    blocks,
    ids,  # int64 [T]
    norm,  # float64 [T, 2]
    scale,
    inverse,
    out,  # [T, columns] contiguous, in the dtype of logits, written
    BLOCK: tl.constexpr,
):
    """grad (1[column = id] - p) / temperature for a block of a row; of a row with grad 0 nothing is read."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(grad + row)
    place = out + row * columns + column
    if weight == 0:
        tl.store(place, tl.full((BLOCK,), 0.0, out.dtype.element_ty), mask=column < columns)
    else:
        x = tl.load(logits + row * stride + column, mask=column < columns, other=MINUS_INFINITY).to(tl.float32)
        peak = tl.load(norm + row * 2).to(tl.float32)
        share = tl.exp(-tl.load(norm + row * 2 + 1)).to(tl.float32)  # of the peak
        p = tl.exp2((x - peak) * scale) * share
        hot = tl.where(column == tl.load(ids + row), 1.0, 0.0)
        slope = (hot - p) * weight * inverse
        tl.store(place, slope.to(out.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["first_row", "first_column"])
def fold_block_kernel(
    policy,  # float32 [rows, stride >= columns]: rows first_row .. of columns first_column ..
    reward,
    stride: tl.int64,
    first_row,
    first_column,
    columns,
    sampled,  # int64 [T]
    policy_scale,
    reward_scale,
    policy_inverse: tl.float64,
    log_p_min: tl.float64,
    totals,  # float64 [T, 4]: peak and total of both sides over the columns before these
    counts,  # int32 [T]: slots in use
    slot_ids,  # int64 [T, SLOTS], by increasing id
    slot_policy,  # float32 [T, SLOTS]
    slot_reward,
    new_totals,  # the same after these columns, written
    new_counts,
    new_ids,
    new_policy,
    new_reward,
    forced_logits,  # float32 [T, 2], written where the sampled token is among these columns
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Takes a block of logits into the state of its rows: running totals and the survivors of the running threshold.

    What passes is compared in float32, which rounds the true difference and the true threshold alike: nothing that
    reaches the threshold is lost.
    """
    block_row = tl.program_id(0).to(tl.int64)
    row = first_row + block_row
    column = tl.arange(0, COLUMNS)
    x = tl.load(policy + block_row * stride + column, mask=column < columns, other=MINUS_INFINITY)
    y = tl.load(reward + block_row * stride + column, mask=column < columns, other=MINUS_INFINITY)

    before = tl.load(totals + row * 4 + 2).to(tl.float32)
    top = tl.maximum(before, tl.max(y, 0))
    total = total_at(top, before, tl.load(totals + row * 4 + 3), y, 1.0, reward_scale)
    tl.store(new_totals + row * 4 + 2, top.to(tl.float64))
    tl.store(new_totals + row * 4 + 3, total)
    before = tl.load(totals + row * 4).to(tl.float32)
    peak = tl.maximum(before, tl.max(x, 0))
    total = total_at(peak, before, tl.load(totals + row * 4 + 1), x, 1.0, policy_scale)
    tl.store(new_totals + row * 4, peak.to(tl.float64))
    tl.store(new_totals + row * 4 + 1, total)
    need = ((log_p_min + tl.log(total)) / policy_inverse).to(tl.float32)

    slot = tl.arange(0, SLOTS)
    held = slot < tl.load(counts + row)
    ids = tl.load(slot_ids + row * SLOTS + slot, mask=held, other=0)
    old = tl.load(slot_policy + row * SLOTS + slot, mask=held, other=MINUS_INFINITY)
    old_reward = tl.load(slot_reward + row * SLOTS + slot, mask=held, other=MINUS_INFINITY)
    kept = held & (old - peak >= need)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(new_ids + row * SLOTS + place, ids, mask=kept)
    tl.store(new_policy + row * SLOTS + place, old, mask=kept)
    tl.store(new_reward + row * SLOTS + place, old_reward, mask=kept)
    count = tl.sum(kept.to(tl.int32), 0)
    survivor = tl.where(x - peak >= need, column, COLUMNS)
    first = tl.min(survivor, 0)
    while first < columns:  # a few in all blocks together
        tl.store(new_ids + row * SLOTS + count, (first_column + first).to(tl.int64))
        tl.store(new_policy + row * SLOTS + count, tl.load(policy + block_row * stride + first))
        tl.store(new_reward + row * SLOTS + count, tl.load(reward + block_row * stride + first))
        count += 1
        first = tl.min(tl.where(survivor > first, survivor, COLUMNS), 0)
    tl.store(new_counts + row, count)

    forced = tl.load(sampled + row) - first_column
    here = (forced >= 0) & (forced < columns)
    tl.store(forced_logits + row * 2, tl.load(policy + block_row * stride + forced, mask=here, other=0.0), mask=here)
    tl.store(
        forced_logits + row * 2 + 1, tl.load(reward + block_row * stride + forced, mask=here, other=0.0), mask=here
    )
