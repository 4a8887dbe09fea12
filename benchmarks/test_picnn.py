"""Room picnn: ``pytest benchmarks/test_picnn.py --benchmark``; cases in prmfast/bench/cases.py."""

from __future__ import annotations

from collections.abc import Callable

ROOM = "picnn"


def test_kernel(time_contestant: Callable[[], None]) -> None:
    time_contestant()
