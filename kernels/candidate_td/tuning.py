"""Sizes of tiles and blocks, with the reason beside each."""

BLOCK_ROWS, BLOCK_COLUMNS = 1024, 2048
"""Backend cpu: largest block of logits of the linear variant, 8 MiB a side in float32, consumed while the last cache
holds it."""

WIDENED_ELEMENTS = 2**22
"""Backend cpu: most elements of a block of hidden states or weights, so that the float32 copies of half types stay
small too."""

SLICE, SLICE_WARPS = 8192, 8
"""Columns of a row that one program reads: 32 a thread, all loads in flight before the first is used, no loop. It does
not depend on T, so a row's sums have one order in every batch."""

CHUNK, CHUNK_WARPS = 1024, 8
"""Columns whose largest logit is kept, and which are read again where it passes: a maximum for every 1024 logits is
0.1 % of the traffic, and a row's few chunks are 0.7 % of V = 151,936 each."""

SLICES, CHUNKS = 64, 256
"""Slices and chunks of a row that are looked at together: all of a vocabulary of 262,144, more in turns."""

ROW_WARPS = 1
"""Of kernels that read a few numbers a row."""

GRADIENT_BLOCK, GRADIENT_WARPS = 4096, 8
"""Columns of the gradient that one program writes: 16 a thread, which stay few registers where rows are not aligned."""

PRODUCT_ROWS, PRODUCT_COLUMNS = 1024, 4096
"""Largest block of logits of the linear variant on a GPU: 16 MiB a side, both of which the H100's 50 MB of second-level
cache hold; as a product it is 128 tiles of 128 x 256 for 132 multiprocessors."""

FOLD_WARPS = 8
"""Of the kernel that takes such a block in, a row a program: 16 logits a thread and side."""

SLOTS = 256
"""Room for survivors that a row of the linear variant may keep between blocks, 4 KiB: an eighth of the block itself.
Where 1 / p_min is larger, the products are made twice instead."""
