"""Interleaved timing: A, B, C, A, B, C, ...; on a machine that others use, only ratios within a round survive."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from prmfast.bench.case import Call

MIN_SAMPLE = 0.01  # seconds that one sample lasts at least, by repeating short calls
ROUNDS = 9
MORE_ROUNDS = 15  # where a round takes less than SHORT_ROUND seconds
SHORT_ROUND = 0.5
FEW_ROUNDS = 5  # enough for quartiles; also where that exceeds the budget
FEWEST_ROUNDS = 3
LONG_CALL = 5.0  # seconds: a case with such a call gets the fewest rounds
BUDGET = 20.0  # seconds that the rounds of one case should take


@dataclass(slots=True)
class Samples:
    """Seconds per call, one per round; busy: CPU seconds per wall second, which shows the threads in use."""

    seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles (all of the range with fewer than four values)."""
    if len(values) < 4:
        return {"median": statistics.median(values), "low": min(values), "high": max(values)}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratios(slow: Samples, fast: Samples) -> list[float]:
    """``slow / fast`` of every round."""
    return [s / f for s, f in zip(slow.seconds, fast.seconds, strict=True)]


def sample(call: Call, repeats: int) -> tuple[float, float]:
    """Wall and CPU seconds per call. A call with a setup is timed on its own, the setup left out."""
    if call.setup is None:
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            call.run()
        wall = time.perf_counter() - start
        return wall / repeats, (time.process_time() - cpu) / repeats
    walls = cpus = 0.0
    for _ in range(repeats):
        call.setup()
        cpu, start = time.process_time(), time.perf_counter()
        call.run()
        walls += time.perf_counter() - start
        cpus += time.process_time() - cpu
    return walls / repeats, cpus / repeats


Clock = Callable[[Call, int], tuple[float, float]]
"""Of a number of repeats of a call: wall and CPU seconds of one."""


def _repeats(call: Call, min_sample: float, known: float, clock: Clock) -> tuple[int, float]:
    """Calls per sample so that it lasts ``min_sample``, from warm calls; and the seconds of one."""
    if known > LONG_CALL / 2:  # warm enough: it ran that long already
        return 1, known
    first, _ = clock(call, 1)
    if first > 0.5:
        return 1, first
    count, seconds = 1, first
    while True:
        seconds, _ = clock(call, count)
        if seconds * count >= min_sample / 4 or count >= 1 << 20:
            return max(1, math.ceil(min_sample / max(seconds, 1e-9))), seconds
        count *= 4


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int | None = None,
    min_sample: float = MIN_SAMPLE,
    budget: float = BUDGET,
    known: Mapping[str, float] | None = None,
    clock: Clock = sample,
) -> dict[str, Samples]:
    """Samples of every call, in rounds of one sample each; ``rounds`` by default as the budget allows.

    known: seconds that earlier calls took, so that long ones need no warm-up of their own.
    """
    repeats, seconds = {}, {}
    for name, call in calls.items():
        repeats[name], seconds[name] = _repeats(call, min_sample, (known or {}).get(name, 0.0), clock)
    if rounds is None:
        one_round = sum(repeats[name] * seconds[name] for name in calls)
        rounds = MORE_ROUNDS if one_round < SHORT_ROUND else ROUNDS
        rounds = max(FEW_ROUNDS, min(rounds, int(budget / one_round)))
        if max(seconds.values()) > LONG_CALL:
            rounds = FEWEST_ROUNDS
    out = {name: Samples() for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                wall, cpu = clock(call, repeats[name])
                out[name].seconds.append(wall)
                out[name].busy.append(cpu / wall)
    finally:
        if collecting:
            gc.enable()
    return out
