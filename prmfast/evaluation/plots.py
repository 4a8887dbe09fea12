"""Plots of the evaluation, in the style of `calibration.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prmfast.calibration.plots import line_style, new_figure
from prmfast.evaluation.first_error import first_error_metrics, first_errors, optimal_threshold

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def selection_curves(rows: Sequence[Mapping[str, Any]], *, title: str = "Choosing among N answers") -> Figure:
    """Share of questions answered rightly against N, a curve per method of `selection_table`, bars for 95 %."""
    figure, (axis,) = new_figure(width=6.4)
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = [row for row in rows if row["method"] == method]
        value = np.array([row["value"] for row in mine])
        reach = np.abs(np.array([[row["low"], row["high"]] for row in mine]).T - value)
        axis.errorbar(
            [row["n"] for row in mine], value, reach, linewidth=1.3, elinewidth=0.7, label=method, **line_style(i)
        )
    axis.set_xscale("log", base=2)
    from matplotlib.ticker import FuncFormatter

    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set(xlabel="answers N (log scale)", ylabel="questions answered rightly (share)", title=title)
    axis.legend(fontsize=8, frameon=False)
    return figure


def threshold_curves(
    step_scores: Mapping[str, Sequence[Sequence[float]]], labels: Sequence[int], *, title: str = "First wrong step"
) -> Figure:
    """F1 of the first error against the threshold, as the share of steps under it; a mark at the exact optimum."""
    figure, (axis,) = new_figure(width=6.4)
    for i, (name, scores) in enumerate(step_scores.items()):
        steps = np.sort(np.concatenate([np.asarray(chain, dtype=np.float64) for chain in scores]))
        shares = np.linspace(0.0, 1.0, 101)
        thresholds = np.quantile(steps, shares)
        f1 = [first_error_metrics(first_errors(scores, t), labels).f1 for t in thresholds]
        style = line_style(i)
        axis.plot(shares, f1, color=style["color"], linewidth=1.3, label=name)
        best = optimal_threshold(scores, labels)
        share = np.searchsorted(steps, best) / len(steps)
        axis.plot([share], [first_error_metrics(first_errors(scores, best), labels).f1], linestyle="", **style)
    axis.set(xlabel="share of steps under the threshold", ylabel="F1 of the first error", title=title, ylim=(0, None))
    axis.legend(fontsize=8, frameon=False)
    return figure
