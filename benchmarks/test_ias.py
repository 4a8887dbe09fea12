"""Room ias: ``pytest benchmarks/test_ias.py --benchmark``; cases in prmfast/bench/cases.py."""

from __future__ import annotations

from collections.abc import Callable

ROOM = "ias"


def test_kernel(time_contestant: Callable[[], None]) -> None:
    time_contestant()
