"""Beam search on the tiny world beside best-of-N at equal tokens: fixed, IAS-of-K, IAS-of-M, DVTS; raw and calibrated.

    python -m benchmarks.beam_search_tiny --output benchmarks/results/beam_search_tiny.json

A seed is another set of questions and other samples; the calibrator is fitted once, on questions of another split.
Tokens are the policy's. Best-of-N at equal tokens is interpolated between two Ns, and ranks as the search does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.seeds import mean_interval
from prmfast._files import write_json
from prmfast._progress import progress
from prmfast.bench.machine import describe
from prmfast.calibration import CalibrationData, CondOTCalibrator
from prmfast.engines import Judge
from prmfast.ias import BeamSearch, BeamSettings, BestOfN, FixedBudget, ScorerJudge
from prmfast.ias._rating import rate
from prmfast.tiny import TinyEngine, TinyWorld

STEPS = (6, 8)  # operations of a question: enough for beams to differ
LEVELS = 100
LOWER = 10  # column of the lower bound: the level 0.105
N_MAX = 20
FIXED = BeamSettings(16, 4, max_steps=10)
SHAPES: dict[str, BeamSettings] = {
    "fixed, 16 x 4": FIXED,
    "fixed, 8 x 4": replace(FIXED, n_generations=8),
    "DVTS, 16 x 4": replace(FIXED, subtrees=4),
    "IAS-of-K": replace(FIXED, ias="K"),
    "IAS-of-M": replace(FIXED, ias="M"),
}
RankBy = Literal["median", "score"]


@dataclass(frozen=True)
class Cell:
    method: str
    bound: str  # what IAS reads: the PRM's "score", or the calibrator's quantile
    rank_by: str  # what ranks chains: the PRM's "score" or the calibrated "median"
    seed: int
    accuracy: float  # the pick is right
    success: float  # one of the last beams is right
    tokens: float  # of the policy, a question
    scored: float  # chains sent to the PRM, a question
    equal_n: float  # samples of best-of-N with as many tokens
    best_of_n: float  # its accuracy
    difference: float
    seconds: float


def fitted_judge(world: TinyWorld, questions: int) -> ScorerJudge:
    traces = world.make_traces(questions, 2, 8, k_range=STEPS)
    return ScorerJudge(
        world.prm, CondOTCalibrator(context="mlp").fit(CalibrationData.from_traces(traces)), levels=LEVELS
    )


def variants(prm: Judge, calibrated: Judge) -> list[tuple[str, str, RankBy, Judge, BeamSettings]]:
    """(method, bound, rank_by, judge, settings) of every row."""
    rows: list[tuple[str, str, RankBy, Judge, BeamSettings]] = [
        (method, "score", "score", prm, shape) for method, shape in SHAPES.items()
    ]
    rows.append(("fixed, 16 x 4", "-", "median", calibrated, FIXED))
    for method in ("IAS-of-K", "IAS-of-M"):
        low = replace(SHAPES[method], lb_idx=LOWER)
        rows.append((method, "Q(0.105)", "median", calibrated, low))
        rows.append((method, "Q(0.105)", "score", calibrated, low))
        rows.append((method, "median", "score", calibrated, SHAPES[method]))
    return rows


def best_of_n(
    world: TinyWorld, questions: list[str], judge: Judge, seed: int
) -> Callable[[float], tuple[float, float]]:
    """Tokens a question -> N of best-of-N, and its accuracy."""
    drawn = BestOfN(world.engine, world.prm, None, FixedBudget(N_MAX), world.verify, seed=seed, batch_size=4096)
    result = drawn.run(questions, progress=False)
    asked = [questions[sample.question] for sample in result.samples]
    ratings = rate(judge, asked, [sample.completion for sample in result.samples], None)
    shape = (len(questions), N_MAX)
    score = np.array([rating.median for rating in ratings]).reshape(shape)
    right = np.array(result.verdicts, dtype=float).reshape(shape)
    tokens = np.array([sample.n_tokens for sample in result.samples]).reshape(shape).cumsum(1).mean(0)
    rows = np.arange(len(questions))
    accuracy = np.array([right[rows, score[:, : n + 1].argmax(1)].mean() for n in range(N_MAX)])

    def at(spent: float) -> tuple[float, float]:
        if spent > tokens[-1]:
            raise ValueError(f"N_MAX must be larger: {spent:.0f} tokens, {N_MAX} samples have {tokens[-1]:.0f}")
        n = np.arange(1, N_MAX + 1)
        return float(np.interp(spent, tokens, n)), float(np.interp(spent, tokens, accuracy))

    return at


def run_seed(world: TinyWorld, calibrated: Judge, seed: int, questions: int) -> list[Cell]:
    asked = world.questions(questions, seed=1000 + seed, k_range=STEPS)
    engine = TinyEngine(world.engine.decoder, world.engine.policy_id, stop=(";",))
    first_seed, cells = seed * 10_000, []
    rivals = {
        "score": best_of_n(world, asked, world.prm, first_seed),
        "median": best_of_n(world, asked, calibrated, first_seed),
    }
    for method, bound, rank_by, judge, shape in variants(world.prm, calibrated):
        started = time.process_time()
        search = BeamSearch(engine, judge, shape, world.verify, batch_size=4096, seed=first_seed, rank_by=rank_by)
        result = search.run(asked, progress=False)
        seconds = time.process_time() - started
        tokens = result.n_tokens / questions
        equal_n, accuracy = rivals[rank_by](tokens)
        assert result.accuracy is not None
        assert result.success is not None
        cells.append(
            Cell(
                *(method, bound, rank_by, seed, result.accuracy, result.success, tokens),
                result.scored / questions,
                *(equal_n, accuracy, result.accuracy - accuracy, seconds),
            )
        )
    return cells


def show(cells: list[Cell], questions: int, console: Console) -> None:
    table = Table(
        title=f"{questions} questions of {STEPS[0]} to {STEPS[1]} operations a seed; mean ± 95 % over seeds",
    )
    columns = ("accuracy", "success", "tokens", "scored", "equal_n", "best_of_n", "difference")
    for name in ("method", "bound", "ranked by", *columns):
        table.add_column(name, justify="right" if name in columns else "left")
    for row in dict.fromkeys((cell.method, cell.bound, cell.rank_by) for cell in cells):
        mine = [cell for cell in cells if (cell.method, cell.bound, cell.rank_by) == row]
        shown = [mean_interval([getattr(cell, name) for cell in mine]) for name in columns]
        table.add_row(*row, *(f"{mean:.3g} ± {half:.2g}" for mean, half in shown))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100, help="a seed")
    parser.add_argument("--fit-on", type=int, default=300, help="questions that the calibrator learns from")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON with every cell")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()  # before the runs: the commit that they ran from
    world = TinyWorld.load()
    calibrated, cells = fitted_judge(world, arguments.fit_on), []
    with progress(arguments.seeds, "seeds") as bar:
        for seed in range(arguments.seeds):
            cells += run_seed(world, calibrated, seed, arguments.questions)
            bar.advance()
    show(cells, arguments.questions, Console(width=160))
    if arguments.output is not None:
        size = {"questions": arguments.questions, "fit_on": arguments.fit_on, "operations": STEPS, "lower": LOWER}
        write_json(arguments.output, {"machine": machine, **size, "cells": [asdict(cell) for cell in cells]})


if __name__ == "__main__":
    main()
