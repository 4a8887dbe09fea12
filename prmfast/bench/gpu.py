"""Timing and memory on a GPU: CUDA events around calls that find the caches cold, and replays of a captured graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from prmfast.bench import memory
from prmfast.bench.case import Call

FLUSH_BYTES = 256 * 2**20
"""Written before every timed call: several times any last-level cache, and long enough for the host to get ahead."""

WARM_CALLS = 3
"""Before a capture, on a stream of their own, as torch's notes on CUDA graphs ask."""


@functools.cache
def _flushed() -> Tensor:
    return torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def sample(call: Call, repeats: int) -> tuple[float, float]:
    """`prmfast.bench.timing.sample` by events: seconds between reaching a call and its last kernel's end, twice.

    Waiting for the device inside a call counts; time that the host needs before the device is idle does not.
    """
    pairs = []
    for _ in range(repeats):
        if call.setup is not None:
            call.setup()
        _flushed().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call.run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    seconds = sum(start.elapsed_time(end) for start, end in pairs) / 1e3 / repeats
    return seconds, seconds


def captured(call: Call) -> Call:
    """``call`` as replays of its CUDA graph; RuntimeError where it waits for the device or allocates outside it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_CALLS):
            call.run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    return Call(graph.replay, call.setup)


def extra_peak(run: Callable[[], Any], buffers: Iterable[Tensor] = ()) -> tuple[Any, int]:
    """`prmfast.bench.memory.extra_peak` by torch's own count of what it handed out."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run()
    torch.cuda.synchronize()
    return out, max(0, torch.cuda.max_memory_allocated() - before - memory.fresh_bytes(out, buffers))


def free_bytes() -> int:
    """What the device can still hand out, the part that torch keeps for itself included."""
    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
