"""Calibrators on a law whose quantile function is known: W1 to the law of p and of k/n, and budgets judged on p itself.

    python -m benchmarks.calibration_synthetic --output benchmarks/results/calibration_synthetic.json

Every cell (rows, rollouts per row, method, seed) is written as soon as it is done; a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.seeds import mean_interval
from benchmarks.synthetic_law import Rows, draw_rows
from prmfast._files import write_text
from prmfast._progress import progress
from prmfast.bench.machine import describe
from prmfast.calibration import BetaBinomialCalibrator, CondOTCalibrator
from prmfast.calibration.base import Calibrator
from prmfast.ops import ias_budget

Array = npt.NDArray[np.float64]

WIDTH = 64
TEST_ROWS = 4000
LEVELS = 100
TARGET = 0.9
MISS_BELOW = 0.88
N_MAX = 64
ROLLOUTS = (1, 2, 4, 8)
METHODS: dict[str, Callable[[int], Calibrator]] = {
    "binomial": lambda seed: CondOTCalibrator("binomial", context="mlp", seed=seed),
    "crps": lambda seed: CondOTCalibrator("crps", context="mlp", seed=seed),
    "dual": lambda seed: CondOTCalibrator("dual", context="mlp", seed=seed),
    "beta-binomial": lambda seed: BetaBinomialCalibrator(context="mlp", seed=seed),
    "binomial, summary": lambda seed: CondOTCalibrator("binomial", context="summary", seed=seed),
    "beta-binomial, summary": lambda seed: BetaBinomialCalibrator(context="summary", seed=seed),
}


@dataclass(frozen=True)
class Cell:
    rows: int
    rollouts: int
    method: str
    seed: int
    w1_p: float
    w1_share: float  # to the quantile function of k/8, or k/rollouts where that is what the method fits
    mean_n: float
    success: float
    miss: float
    seconds: float
    commit: str  # of the code that fitted it: a run that was cut off may go on with later code


def judge(quantiles: Array, test: Rows, rollouts: int) -> dict[str, float]:
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    budget = ias_budget(torch.from_numpy(quantiles), TARGET, N_MAX).double().numpy()
    success = test.success(budget)
    reachable = test.success(np.full(len(budget), float(N_MAX))) >= TARGET
    return {
        "w1_p": float(np.abs(quantiles - test.quantile(levels)).mean()),
        "w1_share": float(np.abs(quantiles - test.share_quantile(levels, rollouts)).mean()),
        "mean_n": float(budget.mean()),
        "success": float(success.mean()),
        "miss": float((success[reachable] < MISS_BELOW).mean()),
    }


def run_cell(rows: int, rollouts: int, method: str, seed: int, commit: str) -> Cell:
    rng = np.random.default_rng((rows, rollouts, seed))
    train = draw_rows(rows, WIDTH, rng).data(rollouts, rng)
    validation = draw_rows(rows // 4, WIDTH, rng).data(rollouts, rng)
    test = draw_rows(TEST_ROWS, WIDTH, np.random.default_rng(10_000 + seed))
    started = time.process_time()
    calibrator = METHODS[method](seed).fit(train, validation, progress=False)
    seconds = time.process_time() - started
    levels = (torch.arange(LEVELS) + 0.5) / LEVELS
    hidden, score = torch.tensor(test.hidden, dtype=torch.float32), torch.tensor(test.score, dtype=torch.float32)
    quantiles = calibrator.quantile(hidden, levels, score=score).double().numpy()
    return Cell(rows, rollouts, method, seed, **judge(quantiles, test, rollouts), seconds=seconds, commit=commit)


def reference_rows(rollouts: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """What no calibrator can beat: the true law of p, and the perfect quantile function of k/n."""
    test = draw_rows(TEST_ROWS, WIDTH, np.random.default_rng(10_000 + seed))
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    return {
        "true law of p": judge(test.quantile(levels), test, rollouts),
        "true law of k/n": judge(test.share_quantile(levels, rollouts), test, rollouts),
    }


def show(cells: list[Cell], console: Console) -> None:
    for rows in sorted({c.rows for c in cells}):
        for rollouts in sorted({c.rollouts for c in cells if c.rows == rows}):
            some = [c for c in cells if (c.rows, c.rollouts) == (rows, rollouts)]
            table = Table(title=f"{rows} rows, {rollouts} rollouts a row; target {TARGET}; mean ± 95 % over seeds")
            columns = ("w1_p", "w1_share", "mean_n", "success", "miss", "seconds")
            for name in ("method", "seeds", *columns):
                table.add_column(name, justify="left" if name == "method" else "right")
            for name, known in reference_rows(rollouts).items():
                table.add_row(name, "", *(f"{known[c]:.4g}" if c in known else "" for c in columns), style="dim")
            for method in METHODS:
                mine = [c for c in some if c.method == method]
                if mine:
                    shown = [mean_interval([getattr(c, name) for c in mine]) for name in columns]
                    table.add_row(method, str(len(mine)), *(f"{m:.4g} ± {h:.2g}" for m, h in shown))
            console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4000, 40_000])
    parser.add_argument("--rollouts", type=int, nargs="+", default=list(ROLLOUTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/calibration_synthetic.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done: list[Cell] = []
    if arguments.output.exists():
        done = [Cell(**cell) for cell in json.loads(arguments.output.read_text())["cells"]]
    machine = describe()  # before the first fit: the commit that runs, not the one at the end
    commit = str(machine.pop("commit"))
    have = {(c.rows, c.rollouts, c.method, c.seed) for c in done}
    wanted = [
        (rows, rollouts, method, seed)
        for seed in range(arguments.seeds)
        for rows in arguments.rows
        for rollouts in arguments.rollouts
        for method in arguments.methods
    ]
    with progress(len(wanted), "cells") as bar:
        for key in wanted:
            if key not in have:
                done.append(run_cell(*key, commit))
                result = {"machine": machine, "width": WIDTH, "cells": [asdict(c) for c in done]}
                write_text(arguments.output, json.dumps(result, indent=1) + "\n")
            bar.advance()
    show([c for c in done if c.method in arguments.methods], Console())


if __name__ == "__main__":
    main()
