"""Streaming log-sum-exp in Triton: a sum of exponentials as the pair (peak, total).

peak is the largest x in float32, total = sum 2^((x - base) scale) with base = peak where that is finite, else 0, and
scale = log2(e) / temperature. So total is at least 1 for numbers that have a softmax, NaN where one of them is NaN,
+inf where one is +inf and none NaN, 0 where all are -inf: the total alone says what is wrong with a row.
"""

import triton
import triton.language as tl


@triton.jit
def total_at(top, peak, total, peaks, totals, scale):
    """The total, float64, of the pair (peak, total) and the pairs (peaks, totals) of any shape, for the peak ``top``.

    ``top`` is the largest of all peaks and may be taken with tl.max, which drops NaN: the sum keeps it. A number x is
    the pair (x, 1.0), nothing is (-inf, 0.0). An infinite top gives base 0, so that inf - inf is never formed.
    """
    base = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    parts = tl.sum(totals * tl.exp2((peaks - base) * scale)).to(tl.float64)
    return total * tl.exp2((peak - base) * scale).to(tl.float64) + parts
