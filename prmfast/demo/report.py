"""The demo's HTML report: plots as PNG beside it, tables in it."""

from __future__ import annotations

import platform
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prmfast._files import write_text
from prmfast._progress import Bar
from prmfast._progress import progress as progress_bar
from prmfast._version import __version__
from prmfast.calibration import CalibrationData, QuantileRegressionCalibrator, metrics, plots
from prmfast.calibration.metrics import Interval
from prmfast.calibration.study import midpoint_levels

if TYPE_CHECKING:
    import pyarrow as pa

    from prmfast.demo.result import DemoResult

_METRICS = ("brier", "pos_brier", "ece", "wql", "area", "crossing_rate", "spearman")
_RELIABILITY = ("raw", "isotonic", "qr", "beta-binomial", "condot")
_PREFIXES = 6


def write_report(result: DemoResult, table: pa.Table, *, progress: bool = False) -> None:
    """Writes reliability, quantile-curve, frontier and PIT plots and ``index.html`` into the result's directory."""
    from jinja2 import Environment, StrictUndefined

    data = result.study.unseen(CalibrationData.from_traces(table, unit="prefix"))
    folder = result.directory
    with progress_bar(4, "plots", progress) as bar:
        crossing = _plot(result, data, bar)
    template = (resources.files("prmfast.demo") / "template.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["interval"] = _interval
    page = environment.from_string(template).render(
        result=result,
        info=result.world.info,
        metrics=_METRICS,
        rows=len(data),
        questions=len(set(data.question)),
        crossing=crossing,
        versions=f"prmfast {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    )
    write_text(folder / "index.html", page)


def _plot(result: DemoResult, data: CalibrationData, bar: Bar) -> dict[str, float]:
    """Draws every plot; returns the crossing rates of QR and CondOT over the rows."""
    calibrators, folder = result.study.calibrators["prefix"], result.directory
    predicted: dict[str, Any] = {name: calibrators[name].expected(data) for name in _RELIABILITY}
    plots.save(plots.reliability(predicted, data.target), folder / "reliability.png")
    bar.advance()
    qr = calibrators["qr"]
    assert isinstance(qr, QuantileRegressionCalibrator)
    own = torch.linspace(0, 1, 11)
    points = qr.quantile(data, own, clip=False)
    chosen = _telling(points, data)
    some = data.select(chosen)
    fine = torch.linspace(0, 1, 201)
    figure = plots.quantile_curves(
        (fine, calibrators["condot"].quantile(some, fine)),
        (own, points[torch.tensor(chosen)]),
        titles=[_title(some, i) for i in range(len(chosen))],
        truth=some.target.tolist(),
    )
    plots.save(figure, folder / "quantiles.png")
    bar.advance()
    plots.save(plots.target_curves(result.frontier.kept()), folder / "targets.png")
    plots.save(plots.frontier(**result.frontier.curves()), folder / "frontier.png")
    bar.advance()
    pits = {}
    for name in ("raw", "isotonic", "beta-binomial", "condot"):
        quantiles = calibrators[name].quantile(data, midpoint_levels())
        pits[name] = metrics.pit(quantiles, data.successes, data.trials, law="probability")
    plots.save(
        plots.pit_histogram(pits, title="Randomised PIT of k given n over held-out prefixes"), folder / "pit.png"
    )
    bar.advance()
    return {
        "qr": metrics.crossing_rate(points),
        "condot": metrics.crossing_rate(calibrators["condot"].quantile(data, fine, clip=False)),
    }


def _telling(points: torch.Tensor, data: CalibrationData) -> list[int]:
    """Prefixes over the whole range of scores; within each range the one where QR's levels cross the most."""
    falls = points.diff(dim=1).clamp(max=0).sum(1).numpy()
    order = np.argsort(data.score.numpy(), kind="stable")
    return [int(part[np.argmin(falls[part])]) for part in np.array_split(order, _PREFIXES) if len(part)]


def _title(data: CalibrationData, i: int) -> str:
    return f"PRM score {data.score[i]:.2f}, {int(data.successes[i])} of {int(data.trials[i])} rollouts right"


def _interval(value: Interval) -> str:
    if value.low == value.high:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
