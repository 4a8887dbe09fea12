"""Room dist_ppo: ``pytest benchmarks/test_dist_ppo.py --benchmark``; cases in prmfast/bench/cases.py."""

from __future__ import annotations

from collections.abc import Callable

ROOM = "dist_ppo"


def test_kernel(time_contestant: Callable[[], None]) -> None:
    time_contestant()
