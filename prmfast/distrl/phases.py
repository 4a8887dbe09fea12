"""Seconds and peak memory of the parts of a training step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Phases:
    """``with phases("update"): ...`` adds up seconds and keeps the largest peak; `metrics` names them.

    Peak memory is what torch held on the GPU, or without one what was resident in the process at its peak (Linux; left
    out where the kernel does not let a process reset its high-water mark).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._device = device
        self._seconds: dict[str, float] = {}
        self._peak: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block under ``name``."""
        counted = self._reset()
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._cuda:
                torch.cuda.synchronize(self._device)
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            if counted:
                self._peak[name] = max(self._peak.get(name, 0.0), self._read())

    def metrics(self) -> dict[str, float]:
        """``seconds/<phase>`` and ``peak_mb/<phase>``."""
        seconds = {f"seconds/{name}": value for name, value in self._seconds.items()}
        return seconds | {f"peak_mb/{name}": value for name, value in self._peak.items()}

    def _reset(self) -> bool:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        try:
            _CLEAR.write_text("5")
        except OSError:
            return False
        return True

    def _read(self) -> float:
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        fields = (line.split() for line in _STATUS.read_text().splitlines())
        return next(int(parts[1]) * 1024 for parts in fields if parts[0] == "VmHWM:") / 1e6
