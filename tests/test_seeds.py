"""The runner of benchmarks over seeds: the number of processes changes nothing but the wall clock."""

from __future__ import annotations

import os
import random
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the source archive has no benchmarks")


def drawn(count: int, seed: int) -> tuple[list[float], int, int]:
    if seed < 0:
        raise ValueError("seed must be at least 0")
    generator = random.Random(seed)
    return [generator.random() for _ in range(count)], torch.get_num_threads(), os.getpid()


def test_processes_give_what_one_gives_in_the_order_of_the_seeds() -> None:
    from benchmarks.seeds import run_seeds

    seeds = [7, 3, 5]
    here = run_seeds(partial(drawn, 4), seeds, jobs=1, show_progress=False)
    there = run_seeds(partial(drawn, 4), seeds, jobs=2, show_progress=False)
    assert [numbers for numbers, _, _ in here.results] == [drawn(4, seed)[0] for seed in seeds]
    assert [numbers for numbers, _, _ in there.results] == [numbers for numbers, _, _ in here.results]
    assert {threads for _, threads, _ in here.results + there.results} == {1}
    assert os.getpid() not in {process for _, _, process in there.results}
    assert there.cpu_seconds > 0.1  # two interpreters have imported torch


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_names_its_seed(jobs: int) -> None:
    from benchmarks.seeds import run_seeds

    with pytest.raises(RuntimeError, match="seed -2: seed must be at least 0") as error:
        run_seeds(partial(drawn, 1), [1, -2], jobs=jobs, show_progress=False)
    assert isinstance(error.value.__cause__, ValueError)


def test_bad_arguments() -> None:
    from benchmarks.seeds import run_seeds

    with pytest.raises(ValueError, match=r"seeds must be distinct and at least one, got \[1, 1\]"):
        run_seeds(partial(drawn, 1), [1, 1])
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run_seeds(partial(drawn, 1), [1], jobs=0)


def test_intervals() -> None:
    """Student's t with two degrees of freedom: 4.3027 at 97.5 %."""
    from benchmarks.seeds import interval, mean_interval

    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert interval([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"
    assert interval([0.25], signed=True) == "+0.250"
