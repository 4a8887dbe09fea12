"""Benchmarks over seeds: one function mapped over them in worker processes, and mean and 95 % interval over seeds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from prmfast._progress import Bar, progress
from prmfast._threads import one_thread

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SeedRuns(Generic[T]):
    """``results`` in the order of the seeds; CPU seconds of all of them together, starting the workers included."""

    results: list[T]
    cpu_seconds: float


def run_seeds(
    function: Callable[[int], T],
    seeds: Sequence[int],
    *,
    jobs: int | None = None,
    description: str = "seeds",
    show_progress: bool = True,
) -> SeedRuns[T]:
    """``[function(seed) for seed in seeds]``, spread over ``jobs`` processes of one torch thread each.

    function: importable by name, or a functools.partial of such a function, and what it returns, can be pickled; it
    must depend on its seed alone, so that the number of jobs never changes a result.
    jobs: default is one per core, at most one per seed; with 1 everything runs in this process, on one thread.

    An error of the function ends the run as a RuntimeError that names the seed; seeds not yet begun are left out.
    ValueError for no seed, a seed given twice, or jobs < 1.
    """
    if len(seeds) == 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be distinct and at least one, got {list(seeds)}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    wanted = min(_cores() if jobs is None else jobs, len(seeds))
    started = _cpu_seconds()
    with progress(len(seeds), description, show_progress) as bar:
        results = _here(function, seeds, bar) if wanted == 1 else _spread(function, seeds, wanted, bar)
    return SeedRuns(results, _cpu_seconds() - started)


def _here(function: Callable[[int], T], seeds: Sequence[int], bar: Bar) -> list[T]:
    results = []
    with one_thread():
        for seed in seeds:
            with _named(seed):
                results.append(function(seed))
            bar.advance()
    return results


def _spread(function: Callable[[int], T], seeds: Sequence[int], jobs: int, bar: Bar) -> list[T]:
    spawn = multiprocessing.get_context("spawn")  # a forked child of a process with threads may hang
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        seed_of: dict[Future[T], int] = {pool.submit(function, seed): seed for seed in seeds}
        try:
            for future in as_completed(seed_of):
                with _named(seed_of[future]):
                    future.result()
                bar.advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in seed_of]


@contextlib.contextmanager
def _named(seed: int) -> Iterator[None]:
    """Says which seed an error belongs to."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"seed {seed}: {error}") from error


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t-interval over seeds; NaN width for a single one."""
    from scipy.stats import t

    if len(values) < 2:
        return float(values[0]), float("nan")
    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), half


def interval(values: Sequence[float], digits: int = 3, *, signed: bool = False) -> str:
    """``mean ± half-width`` as text; the mean alone for a single value."""
    mean, half = mean_interval(values)
    shown = f"{mean:{'+' if signed else ''}.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ± {half:.{digits}f}"


def mean_bars(values: Sequence[Sequence[float]]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """`mean_interval` of n quantities for a plot: means [n] and half-widths [n], 0 for a single seed."""
    means, halves = np.array([mean_interval(one) for one in values]).T
    return means, np.nan_to_num(halves)
