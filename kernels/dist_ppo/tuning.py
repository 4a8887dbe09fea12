"""Sizes of tiles and blocks, with the reason beside each."""

BLOCK_BYTES = 32 << 20
"""Logits that the linear variant holds at a time: what the second-level cache of an H100 (50 MB) or A100 (40 MB) keeps
until they are consumed."""

LEAST_COLUMNS = 256
"""Of a block, however many rows there are: a narrower product runs far below the machine's rate."""

LOAD_BYTES = 16
"""Triton: widest load of a thread."""

LOGITS = 16
"""Triton: logits a thread asks for before it uses the first, in loads of LOAD_BYTES: 64 bytes of float32, 32 of a half
type. With their float32 values and running sums that is what 64 registers hold."""

WARPS, FEW_WARPS, FEW_COLUMNS = 16, 4, 4096
"""Triton: of a program that reads a row or a slice of it; the few where there are no more than FEW_COLUMNS. Sixteen warps
of 64 registers are half a multiprocessor: two rows at a time, so that of 264 rows that an H100 turns into their gradients
a good part is still in its 50 MB when it is read the second time."""

SLICE = 65536
"""Triton: columns of a row that one program reads where a row is more than one: a fixed number, so that the order of the
sums knows the vocabulary alone; at V = 151,936 three programs a row, and few rows fill the machine too."""

ENTRIES = 16
"""Triton: entries of a row taken at a time, in float64. There are at most 1 / p_min + 1, 1.3 in the mean at p_min = 0.1."""

ENTRY_WARPS = 1
"""Triton: of a program that reads a row's entries alone."""
