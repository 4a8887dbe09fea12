"""Room candidate_td: ``pytest benchmarks/test_candidate_td.py --benchmark``; cases in prmfast/bench/cases.py."""

from __future__ import annotations

from collections.abc import Callable

ROOM = "candidate_td"


def test_kernel(time_contestant: Callable[[], None]) -> None:
    time_contestant()
