"""What a backend says that finds bad input itself, in the words of the ops' own checks."""

from __future__ import annotations


def nan_error(op: str, name: str, row: int) -> ValueError:
    """NaN where none is allowed."""
    return ValueError(f"{op}: {name} must not be NaN, got NaN in row {row}")
