"""What a call costs before it computes anything: every op on one tiny row, beside ``torch.add`` of two numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from prmfast.bench.case import FLOOR, Call, Case, Job, Rival, Work

KEPT = ("torch eager", "numba")


def _job(make: Callable[[], Job]) -> Job:
    job = make()
    one = torch.ones(1)
    floor = Rival(lambda: Call(lambda: torch.add(one, one)), FLOOR)
    job.rivals = {"torch.add": floor} | {name: rival for name, rival in job.rivals.items() if name in KEPT}
    job.work = Work("none")
    return job


def overhead_case(case: Case, size: str) -> Case:
    """``case``, made at one tiny row, as a measurement of the call itself; compiled rivals are left out."""
    make = functools.partial(_job, case.make)
    rivals = ("torch.add", *(name for name in case.rivals if name in KEPT))
    return replace(case, make=make, rivals=rivals, size=f"call, {size}")
