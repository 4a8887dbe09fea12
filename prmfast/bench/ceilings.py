"""What this machine can do at all, measured in the same rounds as the ops: read and copy bandwidth, GEMM rates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from prmfast.bench.case import Call

BYTES = 256 * 2**20  # several times any last-level cache
GEMM, GPU_GEMM = 2048, 8192

UNITS = {"read": "GB/s", "copy": "GB/s", "gemm": "GFLOP/s"}
"""read: one pass over memory. copy: bytes read plus bytes written. gemm: float32 2048^3, on a GPU 8192^3."""


@functools.cache
def _block(device: str) -> torch.Tensor:
    return torch.ones(BYTES // 4, device=device)


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

    block = _block("cpu").numpy()
    read(block[:64])
    return functools.partial(read, block)


def calls(kind: str, device: str = "cpu") -> dict[str, Call]:
    """The ways to reach the ceiling ``kind``; the fastest of a round counts. Names start with ``ceiling``."""
    if kind == "read":
        found = {"ceiling torch.sum": Call(_block(device).view(torch.int64).sum)}
        streams = _numba_read() if device == "cpu" else None
        if streams is not None:
            found["ceiling numba"] = Call(streams)
        return found
    if kind == "copy":
        target = torch.zeros_like(_block(device))
        return {"ceiling torch.copy_": Call(functools.partial(target.copy_, _block(device)))}
    if kind == "gemm":
        side = _side(device)
        a, out = torch.randn(side, side, device=device), torch.empty(side, side, device=device)
        return {"ceiling torch.mm": Call(functools.partial(torch.mm, a, a, out=out))}
    return {}


def _side(device: str) -> int:
    return GEMM if device == "cpu" else GPU_GEMM


def work_per_call(kind: str, device: str = "cpu") -> float:
    """Bytes or floating-point operations of one ceiling call."""
    return {"read": BYTES, "copy": 2 * BYTES, "gemm": 2.0 * _side(device) ** 3}[kind]
