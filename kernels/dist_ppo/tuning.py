"""Sizes of the blocks of the vocabulary that the linear variant takes."""

BLOCK_BYTES = 32 << 20
"""Logits held at a time."""

LEAST_COLUMNS = 256
"""Of a block, however many rows there are: a narrower product runs far below the machine's rate."""
