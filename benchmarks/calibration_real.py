"""Every calibrator on real traces, out of fold by question, with bootstrap intervals and paired differences.

python -m benchmarks.calibration_real ../shared/data/math500_iid_samples.parquet --output results.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from prmfast._files import write_text
from prmfast._progress import progress
from prmfast.bench.machine import describe
from prmfast.calibration import (
    BetaBinomialCalibrator,
    CalibrationData,
    Calibrator,
    IsotonicCalibrator,
    LogisticCalibrator,
    PlattCalibrator,
    QuantileRegressionCalibrator,
    RawScore,
    TemperatureCalibrator,
    metrics,
)

METRICS = ("brier", "pos_brier", "ece", "wql", "wql k/n", "area", "crossing_rate")
REFERENCES = ("isotonic", "logistic")


def _condot(objective: str, link: str) -> Callable[[int], Calibrator]:
    def make(seed: int) -> Calibrator:
        from prmfast.calibration import CondOTCalibrator

        return CondOTCalibrator(objective, link=link, seed=seed)  # type: ignore[arg-type]

    return make


# name -> calibrator for a seed; one name may give several rows (QR is judged by its median and by its mean)
METHODS: dict[str, Callable[[int], Calibrator]] = {
    "raw last score": lambda seed: RawScore(),
    "isotonic": lambda seed: IsotonicCalibrator(),
    "isotonic + bins": lambda seed: IsotonicCalibrator(spread="bins"),
    "Platt": lambda seed: PlattCalibrator(),
    "temperature": lambda seed: TemperatureCalibrator(),
    "logistic": lambda seed: LogisticCalibrator(),
    "logistic + bins": lambda seed: LogisticCalibrator(spread="bins"),
    "QR linear": lambda seed: QuantileRegressionCalibrator("linear", seed=seed),
    "QR mlp": lambda seed: QuantileRegressionCalibrator("mlp", seed=seed),
    "QR mlp, sorted (rearranged)": lambda seed: QuantileRegressionCalibrator("mlp", sort=True, seed=seed),
    "beta-binomial": lambda seed: BetaBinomialCalibrator(seed=seed),
    "CondOT dual clip": _condot("dual", "clip"),
    "CondOT dual sigmoid": _condot("dual", "sigmoid"),
    "CondOT crps clip": _condot("crps", "clip"),
    "CondOT crps sigmoid": _condot("crps", "sigmoid"),
    "CondOT binomial clip": _condot("binomial", "clip"),
    "CondOT binomial sigmoid": _condot("binomial", "sigmoid"),
}

# methods whose quantiles are those of p; the pinball loss against k/n punishes them for being right (column "wql"), so
# "wql k/n" takes the quantiles of k/n that their law of p implies; the others fit k/n and have the same value twice
FIT_P = ("raw last score", "isotonic", "Platt", "temperature", "logistic", "beta-binomial", "CondOT binomial")
MIDPOINTS = tuple((m + 0.5) / 100 for m in range(100))


@dataclass
class OutOfFold:
    """Predictions of one method for every row, each made by a model that never saw the row's question."""

    points: dict[str, np.ndarray]
    quantiles: np.ndarray
    of_frequency: np.ndarray
    seconds: float


def out_of_fold(name: str, data: CalibrationData, *, folds: int, seeds: int, advance: Callable[[], None]) -> OutOfFold:
    """Fits per fold and seed; predictions and quantiles are averaged over seeds."""
    points: dict[str, np.ndarray] = {}
    fits_p = name.startswith(FIT_P) and not name.endswith("+ bins")
    quantiles = np.zeros((len(data), len(metrics.LEVELS)))
    of_frequency = quantiles.copy()
    started = time.perf_counter()
    for train, test in data.fold_indices(folds, seed=42):
        for seed in range(seeds):
            model = METHODS[name](seed).fit(data.select(train), progress=False)
            held_out = data.select(test)
            raw = model.quantile(held_out, metrics.LEVELS, clip=False).double().numpy()
            quantiles[test] += raw / seeds
            if fits_p:
                law = model.quantile(held_out, MIDPOINTS)
                of_frequency[test] += metrics.frequency_quantiles(law, held_out.trials.numpy()) / seeds
            else:
                of_frequency[test] += raw.clip(0.0, 1.0) / seeds
            for kind, values in _points(model, held_out).items():
                points.setdefault(kind, np.zeros(len(data)))[test] += values / seeds
            advance()
    return OutOfFold(points, quantiles, of_frequency, time.perf_counter() - started)


def _points(model: Calibrator, data: CalibrationData) -> dict[str, np.ndarray]:
    if isinstance(model, QuantileRegressionCalibrator):
        kinds = ("median", "mean")
        return {f" ({kind})": model.expected(data, kind=kind).double().numpy() for kind in kinds}  # type: ignore[arg-type]
    return {"": model.expected(data).double().numpy()}


def evaluate(results: dict[str, OutOfFold], data: CalibrationData, resamples: int) -> dict[str, dict[str, Any]]:
    """Metrics with intervals, and the paired difference of the Brier score to each reference."""
    y, codes = data.target.double().numpy(), data.question_codes().numpy()
    references = {name: results[name].points[""] for name in REFERENCES if name in results}
    rows: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        clipped = result.quantiles.clip(0.0, 1.0)
        for suffix, p in result.points.items():
            terms = metrics.terms_of(p, clipped, y, raw_quantiles=result.quantiles)
            terms["wql k/n"] = metrics.wql_terms(result.of_frequency, y)
            row: dict[str, Any] = {key: metrics.bootstrap(terms[key], codes, n=resamples) for key in METRICS}
            for reference, other in references.items():
                if reference != name:
                    difference = (p - y) ** 2 - (other - y) ** 2
                    row[f"brier - {reference}"] = metrics.bootstrap(difference, codes, n=resamples)
            rows[name + suffix] = {**row, "seconds": result.seconds}
    return rows


def table_of(rows: dict[str, dict[str, Any]], title: str) -> Table:
    """What the terminal shows: values, 95 % intervals in brackets."""
    differences = tuple(f"brier - {name}" for name in REFERENCES)
    table = Table("method", *METRICS, *differences, "s", title=title)
    for name, row in rows.items():
        shown = [_cell(row.get(key), signed=key in differences) for key in (*METRICS, *differences)]
        table.add_row(name, *shown, f"{row['seconds']:.0f}")
    return table


def _cell(interval: metrics.Interval | None, *, signed: bool) -> str:
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    return f"{interval.value:{sign}.4f}\n[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--unit", choices=("prefix", "question"), default="prefix")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1, help="fits per fold; their predictions are averaged")
    parser.add_argument("--methods", nargs="*", help="substrings of method names; default all")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="JSON with everything the table shows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()  # before the first fit: the commit that runs, not the one at the end
    data = CalibrationData.from_traces(arguments.traces, arguments.unit)
    wanted = arguments.methods or [""]
    methods = [name for name in METHODS if name in REFERENCES or any(part in name for part in wanted)]
    console, results = Console(width=200), {}
    with progress(len(methods) * arguments.folds * arguments.seeds, "out of fold") as bar:
        for name in methods:
            bar.update(method=name)
            try:
                results[name] = out_of_fold(
                    name, data, folds=arguments.folds, seeds=arguments.seeds, advance=bar.advance
                )
            except ImportError as error:
                console.print(f"{name}: left out, {error}")
    rows = evaluate(results, data, arguments.resamples)
    questions = len(set(data.question))
    size = f"{len(data)} rows, {questions} questions, {arguments.folds} folds, {arguments.seeds} seed(s)"
    console.print(table_of(rows, f"{arguments.traces.name}: {size}"))
    if arguments.output is not None:
        report = {
            "traces": arguments.traces.name,
            "data": data.summary(),
            "folds": arguments.folds,
            "seeds": arguments.seeds,
            "machine": machine,
            "methods": {
                name: {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}
                for name, row in rows.items()
            },
        }
        write_text(arguments.output, json.dumps(report, indent=2) + "\n")
        console.print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
