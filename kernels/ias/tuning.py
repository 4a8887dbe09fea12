"""Tile sizes of the Triton kernels. All are fixed, so that a row's answer never depends on the rows beside it."""

BUDGET_ELEMENTS, BUDGET_WARPS = 1024, 4
"""Quantiles of a program of the budget search: 8 a thread, whose seven powers and two copies stay in registers."""

BUDGET_BITS = (6, 7)
"""The search over the bits of N is unrolled for n_max up to 64 and 128. Every bit keeps one more power of every element
in registers; a larger n_max takes the kernel that computes powers anew for each bit."""

SINGLE_MARGIN = 5e-7
"""Times n_max: how far the float32 sum may be off. 1 - p and each squaring round by 6e-8, and powers multiply that."""

LONG_COLUMNS, LONG_WARPS = 1024, 4
"""Columns that a program holds at a time where a row or n_max is too long for registers."""

TABLE_ROWS, TABLE_LOW, TABLE_HIGH, TABLE_WARPS = 32, 16, 4, 4
"""Rows and N of a tile of the curve: 32 x 64 float64 sums are 32 registers a thread. N = low + 16 * high."""

SLOPE_ELEMENTS, SLOPE_WARPS = 512, 4
"""Columns of a program of the curve's backward pass, four float64 values a thread."""
