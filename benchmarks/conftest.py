"""``pytest benchmarks --benchmark``: the cases of `prmfast.bench` under pytest-benchmark, ours beside the rivals.

Without the flag each quick case runs once with the eager rivals, so that the files stay alive. One thread, or
PRMFAST_BENCH_THREADS.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from prmfast.bench.threads import environment

THREADS = int(os.environ.get("PRMFAST_BENCH_THREADS", "1"))
os.environ.update(environment(THREADS))  # before jax, numba or torch's first parallel region

WITHOUT_FLAG = ("torch eager",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="time the kernels at full size (without: one quick run)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Overrides the --benchmark-disable of pyproject.toml before pytest-benchmark reads it."""
    if config.getoption("--benchmark"):
        config.option.benchmark_disable = False
        config.option.benchmark_enable = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per case and contestant of the file's ROOM."""
    if "contestant" not in metafunc.fixturenames:
        return
    from prmfast.bench.cases import select

    full = metafunc.config.getoption("--benchmark")
    pairs = []
    for case in select([metafunc.module.ROOM], quick=not full):
        names = [("ours", variant) for variant in case.variants]
        names += [("rival", name) for name in case.rivals if full or name in WITHOUT_FLAG]
        pairs += [
            pytest.param((case, kind, name), id=f"{case.name}-{kind if kind == 'ours' and not name else name}")
            for kind, name in names
        ]
    metafunc.parametrize("contestant", pairs)


class Made:
    """The job of one case at a time, with our checked output; memory holds no second one."""

    def __init__(self) -> None:
        self.name, self.job, self.out = "", None, None

    def of(self, case: Any) -> tuple[Any, Any]:
        if self.name != case.name:
            self.job = self.out = None
            job = case.make()
            for call in job.ours.values():
                if call.setup is not None:
                    call.setup()
                self.out = call.run()
                job.check(self.out)
            self.name, self.job = case.name, job
        return self.job, self.out


@pytest.fixture(scope="session")
def made() -> Made:
    import torch

    torch.set_num_threads(THREADS)
    return Made()


@pytest.fixture
def time_contestant(request: pytest.FixtureRequest, contestant: Any, made: Made) -> Callable[[], None]:
    """Times one contestant of one case in the case's group; a rival must first agree with ours."""
    from prmfast.bench.case import FLOOR, Unavailable
    from prmfast.bench.memory import available_bytes

    case, kind, name = contestant

    def call_of(job: Any, out: Any) -> Any:
        if kind == "ours":
            return job.ours[name]
        rival = job.rivals[name]
        free = available_bytes()
        if free is not None and rival.extra_bytes > 0.8 * free:
            pytest.skip(f"{name} needs about {rival.extra_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        try:
            call = rival.build()
        except Unavailable as missing:
            pytest.skip(f"{name}: {missing}")
        if rival.kind != FLOOR:
            job.agree(out, call.run())
        return call

    def run() -> None:
        call = call_of(*made.of(case))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = case.name
        benchmark.extra_info.update(op=case.op, size=case.size, dtype=case.dtype, threads=THREADS)
        if call.setup is None:
            benchmark(call.run)
            return

        def setup() -> None:
            call.setup()

        benchmark.pedantic(call.run, setup=setup, rounds=9, warmup_rounds=1)

    return run
