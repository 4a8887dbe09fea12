"""Peak memory of one call, from the kernel's own high-water mark; tracemalloc does not see torch."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def available_bytes() -> int | None:
    """What the machine can still hand out without swapping; None where it does not say."""
    known = _fields(Path("/proc/meminfo"))
    return known.get("MemAvailable")


def resident_bytes() -> int | None:
    """What of this process is in memory now; None where the kernel does not say."""
    return _fields(_STATUS).get("VmRSS")


def extra_peak(run: Callable[[], Any], buffers: Iterable[Tensor] = ()) -> tuple[Any, int | None]:
    """The result of ``run()``, and the bytes it needed at its peak beyond what was resident before and its outputs.

    None where the kernel does not let a process reset its high-water mark (only Linux does).
    """
    gc.collect()
    _trim()
    if not _reset():
        return run(), None
    before = _fields(_STATUS)["VmRSS"]
    out = run()
    peak = _fields(_STATUS)["VmHWM"]
    return out, max(0, peak - before - fresh_bytes(out, buffers))


def _leaves(value: Any) -> list[Any]:
    """Everything in nested tuples, lists and dicts."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def fresh_bytes(out: Any, buffers: Iterable[Tensor]) -> int:
    """The memory of the outputs, tensors or other arrays, that did not exist before the call."""
    known = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    leaves = _leaves(out)
    storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in known}
    others = (int(getattr(leaf, "nbytes", 0)) for leaf in leaves if not isinstance(leaf, Tensor))
    return sum(sizes.values()) + sum(others)


def _fields(path: Path) -> dict[str, int]:
    if not path.exists():
        return {}
    lines = (line.split() for line in path.read_text().splitlines())
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if len(parts) == 3 and parts[2] == "kB"}


def _trim() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def _reset() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return "VmHWM" in _fields(_STATUS)
