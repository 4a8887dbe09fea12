"""Names that a profiler shows around the package's work: stable, so that traces of two versions compare."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """``prmfast.<name>`` in torch's profiler, and as an NVTX range where this process uses a GPU."""
    with torch.profiler.record_function(f"prmfast.{name}"), nvtx(f"prmfast.{name}"):
        yield


@contextlib.contextmanager
def nvtx(name: str) -> Iterator[None]:
    """An NVTX range; nothing where CUDA is not in use, where nobody could see it."""
    if not torch.cuda.is_initialized():
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
