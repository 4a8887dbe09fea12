"""The layout that every kernel on rows of logits reads."""

from __future__ import annotations

from torch import Tensor


def contiguous_columns(logits: Tensor) -> Tensor:
    """[T, V] with column stride 1; rows may stay strided, or be one row expanded."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
