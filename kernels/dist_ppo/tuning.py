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
type. More would not fit into 64 registers, with which two programs of WARPS share a multiprocessor."""

ODD_LOGITS = 8
"""Triton: the same where the columns are no multiple of 16. Triton then loads and masks logit by logit."""

WARPS, FEW_WARPS, FEW_COLUMNS = 16, 4, 4096
"""Triton: of a program that reads a row; few warps for FEW_COLUMNS at most, such as a block of the linear variant. Many
warps keep few rows in work: what is read of a row for its sum should still be in the second-level cache when it is read
for its gradient. Two programs of 16 warps and 64 registers fill a multiprocessor, and one computes its few numbers in
float64 while the other reads. The form knows V alone, so that a row's result knows nothing of its batch."""

SLICE = 65536
"""Triton: columns that a program of the backward pass writes: three programs a row at V = 151,936."""

ENTRIES = 16
"""Triton: entries of a row taken at a time; there are 1 / p_min + 1 at most, 1.3 in the mean at p_min = 0.1."""

ENTRY_WARPS = 1
"""Triton: of a program that reads a row's entries alone."""
