"""The demo's stages: traces with Monte-Carlo labels, calibrators, live best-of-N, replay, report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prmfast._files import write_json
from prmfast._progress import progress as progress_bar
from prmfast._threads import one_thread
from prmfast.calibration import (
    BetaBinomialCalibrator,
    CondOTCalibrator,
    IsotonicCalibrator,
    LogisticCalibrator,
    QuantileRegressionCalibrator,
    RawScore,
)
from prmfast.calibration.base import Calibrator
from prmfast.calibration.study import Factory, Study, calibrate
from prmfast.demo.report import write_report
from prmfast.demo.result import DemoResult, LiveRow
from prmfast.ias import (
    BestOfN,
    BestOfNResult,
    BudgetPolicy,
    BudgetState,
    FixedBudget,
    Frontier,
    GlobalBudget,
    QuestionEstimates,
    TargetBudget,
    replay,
)
from prmfast.ops import ias_budget
from prmfast.tiny import TinyWorld, train_world
from prmfast.traces import write_traces

TEST_QUESTIONS = 200
POOL = 64  # stored samples of a test question, for the replay
ROLLOUTS = 8
N_MAX = 64
LIVE_TARGETS = (0.7, 0.8, 0.9, 0.95)
LIVE_FIXED = (1, 2, 4, 8, 16)
REPLAY_TARGETS = tuple(0.5 + 0.499 * i / 9 for i in range(10))
HEADLINE = "condot"
SPENDERS = ("raw", "isotonic", "qr", "beta-binomial", "condot")  # what is spent by, live and replayed
_STEPS = 500  # of each network: a demo's time, not the defaults of the calibrators

METHODS: dict[str, Factory] = {
    "raw": lambda seed: RawScore(),
    "isotonic": lambda seed: IsotonicCalibrator(),
    "logistic": lambda seed: LogisticCalibrator(),
    "qr": lambda seed: QuantileRegressionCalibrator(head="mlp", steps=_STEPS, context="mlp", seed=seed),
    "beta-binomial": lambda seed: BetaBinomialCalibrator(steps=_STEPS, context="mlp", seed=seed),
    "condot-dual": lambda seed: CondOTCalibrator("dual", steps=_STEPS, context="mlp", seed=seed),
    "condot-crps": lambda seed: CondOTCalibrator("crps", steps=_STEPS, context="mlp", seed=seed),
    "condot": lambda seed: CondOTCalibrator("binomial", steps=_STEPS, context="mlp", seed=seed),
}


@final
@dataclass(frozen=True)
class _Given(BudgetPolicy):
    """Budgets known beforehand: the oracle's."""

    budgets: Tensor

    def budget(self, state: BudgetState) -> Tensor:
        return self.budgets


@contextmanager
def _stage(name: str, seconds: dict[str, float], console: Console) -> Iterator[None]:
    console.print(f"[bold]{name}[/bold]")
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def run_demo(
    directory: Path, *, train: bool, questions: int, seed: int, progress: bool, console: Console
) -> DemoResult:
    """Runs every stage; writes traces, artifacts, plots and ``index.html`` to ``directory``; prints a summary."""
    with one_thread():
        seconds: dict[str, float] = {}
        world = _world(directory, train, seconds, console)
        with _stage("answers and Monte-Carlo labels", seconds, console):
            table = world.make_traces(questions, 2, ROLLOUTS, seed, progress)
            write_traces(table, directory / "traces.parquet")
        with _stage("calibrators", seconds, console):
            study = calibrate(table, directory / "study", methods=METHODS, seed=seed, progress=progress)
            metrics = study.evaluate(table, progress=progress)
        tests = world.questions(TEST_QUESTIONS, seed, split="test")
        with _stage("truth of the test questions", seconds, console):
            truth = world.true_success(tests, rollouts=POOL, seed=seed, progress=progress).double() / POOL
        with _stage("live best-of-N", seconds, console):
            live = _live(world, study, tests, truth, seed, progress)
        with _stage("replay", seconds, console):
            frontier = _replay(world, study, truth, seed, progress)
        result = DemoResult(world, study, metrics, live, frontier, seconds, directory)
        with _stage("report", seconds, console):
            write_report(result, table, progress=progress)
        write_json(directory / "frontier.json", frontier.to_table().to_pylist())
    print_summary(result, console)
    return result


def _world(directory: Path, train: bool, seconds: dict[str, float], console: Console) -> TinyWorld:
    if not train:
        return TinyWorld.load()
    with _stage("training the tiny policy and its PRM", seconds, console):
        train_world(directory / "world")
    return TinyWorld.load(directory / "world")


def _live(
    world: TinyWorld, study: Study, tests: list[str], truth: Tensor, seed: int, progress: bool
) -> tuple[LiveRow, ...]:
    calibrators = study.calibrators["question"]
    runs: list[tuple[str, float | None, Calibrator | None, BudgetPolicy]] = []
    for n in LIVE_FIXED:
        runs.append((f"fixed N = {n}", None, None, FixedBudget(n)))
    for n in LIVE_FIXED[1:]:
        shared = GlobalBudget(mean_per_question=n, n_max=N_MAX)
        runs.append((f"{HEADLINE}, mean N = {n}", None, calibrators[HEADLINE], shared))
    for target in LIVE_TARGETS:
        for name in SPENDERS:
            runs.append((name, target, calibrators[name], TargetBudget(target, N_MAX)))
        runs.append(("oracle", target, None, _Given(ias_budget(truth.unsqueeze(1), target, N_MAX))))
    rows = []
    with progress_bar(len(runs), "live runs", progress) as bar:
        for name, goal, calibrator, policy in runs:
            spender = BestOfN(
                world.engine,
                world.prm,
                calibrator,
                policy,
                verifier=world.verify,
                batch_size=512,
                seed=seed,
                n_max=N_MAX,
            )
            started = time.perf_counter()
            found = spender.run(tests, progress=False)
            rows.append(_live_row(name, goal, found, truth, time.perf_counter() - started))
            bar.advance()
    return tuple(rows)


def _live_row(name: str, goal: float | None, found: BestOfNResult, truth: Tensor, seconds: float) -> LiveRow:
    success, accuracy = found.success, found.accuracy
    assert success is not None
    assert accuracy is not None
    drawn = torch.tensor([answer.drawn for answer in found.answers])
    reached, fixed = (None, None) if goal is None else _at_target(truth, drawn, goal)
    return LiveRow(name, goal, found.mean_drawn, found.n_tokens, success, accuracy, seconds, reached, fixed)


def _at_target(truth: Tensor, drawn: Tensor, target: float) -> tuple[float, int]:
    """(share of questions whose own success reaches the target, smallest fixed N that does it for as many)."""
    needed = ias_budget(truth.unsqueeze(1), target, N_MAX)
    reached = float((drawn >= needed).double().mean())
    shares = [(n, float((needed <= n).double().mean())) for n in range(1, N_MAX + 1)]
    return reached, next(n for n, share in shares if share >= reached - 1e-12)


def _replay(world: TinyWorld, study: Study, truth: Tensor, seed: int, progress: bool) -> Frontier:
    table = world.make_traces(TEST_QUESTIONS, POOL, 0, seed, progress=progress, split="test")
    estimates = QuestionEstimates.from_traces(table)
    chosen = {name: study.calibrators["question"][name] for name in SPENDERS}
    return replay(
        estimates.pool,
        estimates.budgets(chosen),
        targets=REPLAY_TARGETS,
        n_max=N_MAX,
        seed=seed,
        fixed=range(1, N_MAX + 1),
        truth=truth,
    )


def print_summary(result: DemoResult, console: Console) -> None:
    """The short table: what was asked for, what it cost, what came of it."""
    table = Table(title=f"live best-of-N on {TEST_QUESTIONS} unseen questions")
    shown = ("samples / question", "success", "picked right", "at target", "fixed N for as many", "saved")
    for name in ("method", "target", *shown):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in result.live:
        table.add_row(
            row.method,
            "" if row.target is None else f"{row.target:.2f}",
            f"{row.mean_drawn:.2f}",
            f"{row.success:.3f}",
            f"{row.accuracy:.3f}",
            "" if row.at_target is None else f"{row.at_target:.0%}",
            "" if row.fixed_for_as_many is None else str(row.fixed_for_as_many),
            "" if row.saved is None else f"{row.saved:+.0%}",
            style="bold" if row.method.startswith(HEADLINE) else None,
        )
    console.print(table)
    console.print(
        "success: a right answer among those drawn. at target: questions whose own success probability reaches the "
        "target (p from 64 rollouts); saved: against the fixed N that brings as many questions there.",
        highlight=False,
    )
    brier = {name: values["brier"].value for name, values in result.metrics["prefix"].items()}
    listed = ", ".join(f"{name} {value:.3f}" for name, value in brier.items())
    console.print(f"Brier of prefixes: {listed}", highlight=False)
    console.print(f"raw scores are wrong here because: {result.world.info.miscalibration}", highlight=False)
    took = ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
    console.print(f"time: {took}", highlight=False)
    console.print(f"report: {result.directory / 'index.html'}", highlight=False)
