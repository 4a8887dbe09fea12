"""Plots of calibration: reliability, quantile curves, cost-accuracy frontier, PIT histogram; PNG through Agg."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from prmfast._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ArrayLike = Any
Array = npt.NDArray[np.float64]
Curve = tuple[ArrayLike, ArrayLike]

# Okabe and Ito's colours: told apart with any colour vision; markers differ too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#5F6B6D")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GREY = "#555555"


def new_figure(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 5.6,
    height: float = 4.4,
    height_ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure of ``rows * columns`` axes in the package's style, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, list(axes.flat)


def line_style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th curve."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 4.5}


def _numpy(value: ArrayLike) -> Array:
    return np.asarray(value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value, dtype=np.float64)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes ``figure`` as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def reliability(
    predictions: Mapping[str, ArrayLike], y: ArrayLike, *, bins: int = 12, title: str = "Reliability"
) -> Figure:
    """Mean outcome against mean prediction, in ``bins`` equal-count bins per method: predictions and y are [N].

    The lower panel shows where the predictions lie, as the share of rows in 20 equal-width bins.
    """
    target = _numpy(y)
    figure, (axis, below) = _stacked()
    axis.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    edges = np.linspace(0.0, 1.0, 21)
    for i, (name, values) in enumerate(predictions.items()):
        p = _numpy(values)
        if p.shape != target.shape:
            raise ValueError(f"predictions[{name!r}] must have shape {target.shape}, got {p.shape}")
        cuts = np.unique(np.quantile(p, np.arange(1, bins) / bins))
        bin_of = np.searchsorted(cuts, p, side="right")
        count = np.bincount(bin_of).astype(np.float64)
        kept = count > 0
        x = np.bincount(bin_of, p)[kept] / count[kept]
        height = np.bincount(bin_of, target)[kept] / count[kept]
        axis.plot(x, height, linewidth=1.4, label=name, **line_style(i))
        share = np.histogram(np.clip(p, 0, 1), edges)[0] / len(p)
        below.step(edges, np.r_[share, share[-1:]], where="post", color=COLOURS[i % len(COLOURS)], linewidth=1.2)
    axis.set(ylabel="observed success rate", title=title, ylim=(-0.02, 1.02))
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    below.set(xlabel="predicted success probability", ylabel="share of rows", xlim=(-0.02, 1.02))
    return figure


def _stacked() -> tuple[Figure, tuple[Axes, Axes]]:
    figure, (upper, lower) = new_figure(2, 1, height=2.9, height_ratios=(3.2, 1.0))
    lower.sharex(upper)
    upper.tick_params(labelbottom=False)
    return figure, (upper, lower)


def quantile_curves(
    smooth: Curve,
    fixed: Curve,
    *,
    names: tuple[str, str] = ("CondOT", "QR"),
    titles: Sequence[str] | None = None,
    truth: Sequence[float | None] | None = None,
    columns: int = 3,
) -> Figure:
    """Quantile functions of single prefixes, two methods side by side, with the crossings of the second one marked.

    ``smooth`` and ``fixed``: (levels [M], quantiles [B, M]); B panels. ``truth``: known success rates, drawn as lines.
    """
    levels, curves = _numpy(smooth[0]), np.atleast_2d(_numpy(smooth[1]))
    own, points = _numpy(fixed[0]), np.atleast_2d(_numpy(fixed[1]))
    panels = len(curves)
    if len(points) != panels:
        raise ValueError(f"both methods must show the same prefixes, got {panels} and {len(points)}")
    columns = min(columns, panels)
    figure, axes = new_figure(-(-panels // columns), columns, width=3.5, height=3.0)
    for i, axis in enumerate(axes):
        if i >= panels:
            axis.set_visible(False)
            continue
        axis.plot(levels, curves[i], color=COLOURS[0], linewidth=1.8, label=names[0])
        axis.plot(own, points[i], color=COLOURS[1], marker="o", markersize=3.5, linewidth=1.1, label=names[1])
        _mark_crossings(axis, own, points[i])
        if truth is not None and truth[i] is not None:
            axis.axhline(float(truth[i] or 0.0), color=_GREY, linestyle=":", linewidth=1.2, label="observed rate")
        axis.set_title(f"prefix {i + 1}" if titles is None else titles[i], fontsize=9)
        both = np.concatenate((curves[i], points[i]))
        axis.set(xlim=(-0.02, 1.02), ylim=(min(0.0, both.min()) - 0.03, max(1.0, both.max()) + 0.03))
        if i % columns == 0:
            axis.set_ylabel("success probability")
        if i + columns >= panels:
            axis.set_xlabel("quantile level β")
    handles: dict[str, Any] = {}
    for axis in axes[:panels]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _mark_crossings(axis: Axes, levels: Array, values: Array) -> None:
    falls = np.flatnonzero(np.diff(values) < 0)
    if len(falls) == 0:
        return
    x = np.stack((levels[falls], levels[falls + 1], np.full(len(falls), np.nan)), axis=1).ravel()
    y = np.stack((values[falls], values[falls + 1], np.full(len(falls), np.nan)), axis=1).ravel()
    axis.plot(x, y, color="black", linewidth=2.6, solid_capstyle="round", label="crossing: falls as β rises")


def frontier(
    curves: Mapping[str, Curve],
    *,
    fixed: Curve,
    oracle: Curve | None = None,
    title: str = "Cost and accuracy",
    success: str = "questions solved (share)",
) -> Figure:
    """Success against cost: (mean samples [T], success [T]) by method, the fixed-N line and the true-p oracle."""
    figure, (axis,) = new_figure(width=6.4)
    axis.plot(*map(_numpy, fixed), color=_GREY, linewidth=2.2, label="fixed N")
    if oracle is not None:
        axis.plot(*map(_numpy, oracle), color="black", linestyle="--", linewidth=1.4, label="oracle (true p)")
    for i, (name, (cost, value)) in enumerate(curves.items()):
        x, y = _numpy(cost), _numpy(value)
        order = np.argsort(x, kind="stable")
        axis.plot(x[order], y[order], linewidth=1.3, label=name, **line_style(i))
    axis.set_xscale("log", base=2)
    from matplotlib.ticker import FuncFormatter

    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set(xlabel="mean samples per question (N, log scale)", ylabel=success, title=title)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def target_curves(curves: Mapping[str, Curve], *, title: str = "Target and success") -> Figure:
    """Realised success against the target asked for: (targets [T], success [T]) by method; on the line is kept."""
    figure, (axis,) = new_figure(width=6.4)
    targets = np.concatenate([_numpy(x) for x, _ in curves.values()])
    ends = [float(targets.min()), float(targets.max())]
    axis.plot(ends, ends, color=_GREY, linestyle="--", linewidth=1.2, label="success = target")
    for i, (name, (asked, value)) in enumerate(curves.items()):
        axis.plot(_numpy(asked), _numpy(value), linewidth=1.3, label=name, **line_style(i))
    axis.set(xlabel="target success probability", ylabel="questions solved (share)", title=title)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def pit_histogram(
    pits: Mapping[str, ArrayLike], *, bins: int = 10, title: str = "Probability integral transform"
) -> Figure:
    """Histogram of randomised PIT values per method, a panel each; flat is calibrated, the band is 95 % of chance.

    The band takes rows as independent; prefixes of one question are not, so it is narrow for them.
    """
    figure, axes = new_figure(1, len(pits), width=3.3, height=3.2)
    top = 0.0
    for i, (axis, (name, values)) in enumerate(zip(axes, pits.items(), strict=True)):
        u = _numpy(values)
        density = np.histogram(np.clip(u, 0, 1), bins, (0.0, 1.0))[0] * bins / len(u)
        spread = 1.96 * np.sqrt((bins - 1) / len(u))
        axis.bar((np.arange(bins) + 0.5) / bins, density, 0.92 / bins, color=COLOURS[i % len(COLOURS)], alpha=0.85)
        axis.axhspan(1 - spread, 1 + spread, color=_GREY, alpha=0.25, linewidth=0)
        axis.axhline(1.0, color=_GREY, linewidth=1)
        axis.set_title(name, fontsize=10)
        axis.set(xlabel="PIT value", xlim=(0, 1))
        top = max(top, float(density.max()), 1 + spread)
    for axis in axes:
        axis.set_ylim(0, 1.08 * top)
    axes[0].set_ylabel("density (1 = calibrated)")
    figure.suptitle(title, fontsize=11)
    return figure
