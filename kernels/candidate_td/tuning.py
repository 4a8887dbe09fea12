"""Sizes of the blocks that the linear variant makes and consumes."""

BLOCK_ROWS, BLOCK_COLUMNS = 1024, 2048
"""Largest block of logits: 8 MiB a side in float32, consumed while the last cache holds it."""

WIDENED_ELEMENTS = 2**22
"""Most elements of a block of hidden states or weights, so that the float32 copies of half types stay small too."""
