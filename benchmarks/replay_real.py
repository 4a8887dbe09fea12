"""Budgets of every calibrator spent on real stored samples, cross-fitted by question, in one replay of all of them.

python -m benchmarks.replay_real ../shared/data/math500_iid_samples.parquet --output benchmarks/results/replay_real.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prmfast._files import write_json
from prmfast._progress import progress
from prmfast.bench.machine import describe
from prmfast.calibration import CalibrationData
from prmfast.calibration.study import Factory, chosen_methods
from prmfast.cli import parse_targets, print_frontier, wide_console
from prmfast.ias import QuestionEstimates, replay
from prmfast.ias.estimates import LEVELS
from prmfast.traces import read_traces


def cross_fitted(
    data: CalibrationData,
    estimates: QuestionEstimates,
    methods: Mapping[str, Factory],
    *,
    folds: int,
    seed: int,
    show: bool = True,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Quantiles [Q, LEVELS] of every estimate by a model that never saw its question; and seconds, by method."""
    quantiles = {name: torch.full((len(estimates.data), LEVELS), torch.nan) for name in methods}
    seconds = dict.fromkeys(methods, 0.0)
    names = np.asarray(data.question)
    asked = np.asarray(estimates.data.question)
    with progress(folds * len(methods), "cross-fitting", show) as bar:
        for train, held_out in data.fold_indices(folds, seed):
            rows = np.flatnonzero(np.isin(asked, names[held_out]))
            part = estimates.select(rows.tolist())
            fitted_on = data.select(train)
            for name, make in methods.items():
                bar.update(method=name)
                started = time.perf_counter()
                calibrator = make(seed).fit(fitted_on, progress=False)
                quantiles[name][torch.from_numpy(rows)] = part.budgets({name: calibrator})[name]
                seconds[name] += time.perf_counter() - started
                bar.advance()
    return quantiles, seconds


def verdicts(rows: Sequence[Mapping[str, object]], methods: Sequence[str]) -> dict[str, list[float]]:
    """Targets that lie above the whole interval of the success among open questions, by method: those it misses."""
    return {
        name: [
            float(str(row["target"]))
            for row in rows
            if row["method"] == name and float(str(row["open_success_high"])) < float(str(row["target"]))
        ]
        for name in methods
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--methods", nargs="*", help="names as `prmfast calibrate --method` takes them; default all")
    parser.add_argument("--target", default="0.5:0.999:10", help="targets: one number, or LOW:HIGH:COUNT")
    parser.add_argument("--n-max", type=int, default=64)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=42, help="of the folds and of every fit")
    parser.add_argument("--resamples", type=int, default=2000, help="of the questions, for the intervals")
    parser.add_argument("--output", type=Path, help="JSON with everything the table shows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()  # before the fits: the commit that they ran from
    methods = chosen_methods(arguments.methods)
    targets = parse_targets(arguments.target)
    table = read_traces(arguments.traces)
    data = CalibrationData.from_traces(table, unit="question")
    estimates = QuestionEstimates.from_traces(table)
    quantiles, seconds = cross_fitted(data, estimates, methods, folds=arguments.folds, seed=arguments.seed)
    frontier = replay(
        estimates.pool,
        quantiles,
        targets=targets,
        n_max=arguments.n_max,
        exact=True,
        bootstrap=arguments.resamples,
    )
    size = {
        "questions": len(set(estimates.pool.question)),
        "pairs": len(estimates.pool),
        "stored": int(estimates.pool.size.sum()),
    }
    console = wide_console()
    console.print(
        f"{arguments.traces.name}: {size['questions']} questions, {size['pairs']} question-policy pairs, "
        f"{size['stored']} stored samples, {arguments.folds} folds by question, {len(data)} rows to fit on",
        highlight=False,
    )
    if estimates.pilot:
        console.print("no question_score: the first scored sample of each pair speaks for it and is not in the pool")
    print_frontier(frontier.rows, console)
    rows = frontier.to_table().to_pylist()
    missed = verdicts(rows, list(methods))
    for name, targets_missed in missed.items():
        shown = ", ".join(f"{target:.3f}" for target in targets_missed) or "none"
        console.print(
            f"{name}: targets missed by more than the interval among open questions: {shown}", highlight=False
        )
    if arguments.output is not None:
        report = {
            "traces": arguments.traces.name,
            "size": size,
            "rows_to_fit_on": len(data),
            "pilot": estimates.pilot,
            "folds": arguments.folds,
            "seed": arguments.seed,
            "n_max": arguments.n_max,
            "seconds": seconds,
            "missed_among_open": missed,
            "machine": machine,
            "frontier": rows,
        }
        write_json(arguments.output, report)
        console.print(f"written: {arguments.output}", highlight=False)


if __name__ == "__main__":
    main()
