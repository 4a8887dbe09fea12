"""What this machine can do at all, measured in the same rounds as the ops: read and copy bandwidth, GEMM rates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from prmfast.bench.case import Call

BYTES = 256 * 2**20  # several times any last-level cache
GEMM = 2048
THIN_ROWS, THIN = 65536, 64

UNITS = {"read": "GB/s", "copy": "GB/s", "gemm": "GFLOP/s", "gemm64": "GFLOP/s"}
"""read: one pass over memory. copy: bytes read plus bytes written. gemm: float32 2048^3; gemm64: 64 wide."""


@functools.cache
def _block() -> torch.Tensor:
    return torch.ones(BYTES // 4)


def _numba_read() -> Callable[[], Any] | None:
    """Four streams at once, which reads fastest on several machines; None without numba."""
    try:
        import numba
        import numpy as np
    except ImportError:
        return None

    @numba.njit(fastmath=True)
    def read(x: Any) -> Any:
        quarter = x.shape[0] // 4
        a = b = c = d = np.float32(0)
        for i in range(quarter):
            a += x[i]
            b += x[i + quarter]
            c += x[i + 2 * quarter]
            d += x[i + 3 * quarter]
        return a + b + c + d

    block = _block().numpy()
    read(block[:64])
    return functools.partial(read, block)


def calls(kind: str) -> dict[str, Call]:
    """The ways to reach the ceiling ``kind``; the fastest of a round counts. Names start with ``ceiling``."""
    if kind == "read":
        found = {"ceiling torch.sum": Call(_block().view(torch.int64).sum)}
        streams = _numba_read()
        if streams is not None:
            found["ceiling numba"] = Call(streams)
        return found
    if kind == "copy":
        target = torch.zeros_like(_block())
        return {"ceiling torch.copy_": Call(functools.partial(target.copy_, _block()))}
    if kind == "gemm":
        a, out = torch.randn(GEMM, GEMM), torch.empty(GEMM, GEMM)
        return {"ceiling torch.mm": Call(functools.partial(torch.mm, a, a, out=out))}
    if kind == "gemm64":
        a, b, out = torch.randn(THIN_ROWS, THIN), torch.randn(THIN, THIN), torch.empty(THIN_ROWS, THIN)
        return {"ceiling torch.mm 64": Call(functools.partial(torch.mm, a, b, out=out))}
    return {}


def work_per_call(kind: str) -> float:
    """Bytes or floating-point operations of one ceiling call."""
    return {"read": BYTES, "copy": 2 * BYTES, "gemm": 2.0 * GEMM**3, "gemm64": 2.0 * THIN_ROWS * THIN * THIN}[kind]
