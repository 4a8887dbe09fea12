"""Tables and plot of benchmarks/distrl_tiny.py, for the console and the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.seeds import interval, mean_interval

METHODS = ("GRPO", "GRPO + IPVRM", "DistRL + IPVRM", "DistRL + implicit PRM")
CENTRE = "DistRL + IPVRM"
Cells = list[dict[str, Any]]


class Grid(NamedTuple):
    """A table of texts."""

    title: str
    header: list[str]
    rows: list[list[str]]


def of(report: dict[str, Any], group: str, name: str, questions: str = "all") -> Cells:
    """The runs of one cell, a seed each."""
    return [
        cell for cell in report["cells"] if (cell["group"], cell["name"], cell["questions"]) == (group, name, questions)
    ]


def at(cell: dict[str, Any], rollouts: int) -> float:
    """Accuracy after so many rollouts."""
    return float(dict(map(tuple, cell["curve"]))[rollouts])


def area(cell: dict[str, Any], first: int) -> float:
    """Mean accuracy of a run's evaluations after more than ``first`` rollouts."""
    late = [accuracy for rollouts, accuracy in cell["curve"] if rollouts > first]
    return sum(late) / len(late)


def tables(report: dict[str, Any]) -> list[Grid]:
    """Methods, options, updates of the reward model under imbalance, calibration."""
    return [methods(report), options(report), imbalance(report), calibration(report)]


def methods(report: dict[str, Any]) -> Grid:
    sizes = report["sizes"]
    step = sizes["prompts"] * sizes["samples"]
    before, last = sizes["offline"] * step, sizes["steps"] * step
    shown = [before + (last - before) * k // 3 // (sizes["every"] * step) * (sizes["every"] * step) for k in (1, 2, 3)]
    grpo, rows = of(report, "methods", "GRPO"), []
    for name in METHODS:
        runs = of(report, "methods", name)
        gain = [at(one, last) - at(plain, last) for one, plain in zip(runs, grpo, strict=True)]
        mean = [area(one, before) for one in runs]
        over = [value - area(plain, before) for value, plain in zip(mean, grpo, strict=True)]
        same = name == "GRPO"
        rows.append(
            [
                name,
                *(interval([at(one, rollouts) for one in runs]) for rollouts in shown),
                "" if same else interval(gain, signed=True),
                interval(mean),
                "" if same else interval(over, signed=True),
            ]
        )
    header = ["method", *(f"{n:,} rollouts" for n in shown), "minus GRPO", "mean of the curve", "minus GRPO"]
    return Grid(f"accuracy; the start policy's is {interval([at(one, 0) for one in grpo])}", header, rows)


def options(report: dict[str, Any]) -> Grid:
    sizes = report["sizes"]
    drawn = (sizes["offline"] + sizes["sweep"]) * sizes["prompts"] * sizes["samples"]
    centre = of(report, "methods", CENTRE)
    known = {
        "reference": [("behaviour", centre), ("fixed", None)],
        "TD weight": [(f"{report['settings']['td_weight']:g}", centre), ("1", None)],
        "P_min": [("0.02", None), ("0.1", centre), ("0.3", None)],
        "alpha": [("0", of(report, "methods", "GRPO + IPVRM")), ("0.1", centre), ("0.5", None), ("2", None)],
    }
    groups = {"TD weight": "td_weight", "P_min": "p_min"}
    rows = []
    for option, values in known.items():
        for name, found in values:
            runs = found or of(report, groups.get(option, option), name)
            accuracy = [at(one, drawn) for one in runs]
            over = [a - at(one, drawn) for a, one in zip(accuracy, centre, strict=True)]
            sizes_of = [mean(one["dist_candidates_per_token"][: sizes["sweep"]]) for one in runs]
            middle = found is centre
            rows.append(
                [
                    option,
                    name,
                    interval(accuracy),
                    "" if middle else interval(over, signed=True),
                    f"{mean(sizes_of):.2f}",
                    interval([mean(one["td_outcome_correlation"][: sizes["sweep"]]) for one in runs], 2),
                ]
            )
    header = ["option", "value", "accuracy", f"minus {CENTRE}", "candidates a token", "TD against outcome"]
    return Grid(f"options of {CENTRE}, {sizes['sweep']} steps after the offline ones", header, rows)


def mean(values: Sequence[float | None]) -> float:
    """Of the known ones; NaN for none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def imbalance(report: dict[str, Any]) -> Grid:
    rows = []
    for kind in ("mostly wrong", "mostly right"):
        naive = of(report, "imbalance", "naive", kind)
        for name in ("naive", "ADB", "DLW", "both"):
            runs = of(report, "imbalance", name, kind)
            accuracy = [one["curve"][-1][1] for one in runs]
            gain = [a - one["curve"][-1][1] for a, one in zip(accuracy, naive, strict=True)]
            rows.append(
                [
                    f"{kind}, {mean([mean(one['outcome']) for one in naive]):.2f} correct",
                    name,
                    *(interval([one["reward_model"][key] for one in runs]) for key in ("pairwise", "brier")),
                    interval(accuracy),
                    "" if name == "naive" else interval(gain, signed=True),
                ]
            )
    header = ["training answers", "online update", "pairs ordered", "Brier", "accuracy", "minus naive"]
    steps = report["sizes"]["imbalance"]
    return Grid(f"online update of the reward model, {steps} steps; judged on questions of every kind", header, rows)


def calibration(report: dict[str, Any]) -> Grid:
    found = [cell["calibration"] for cell in of(report, "methods", CENTRE)]
    rows = []
    for parts in zip(*found, strict=True):
        rows.append(
            [
                parts[0]["calibrator of"],
                parts[0]["policy"],
                *(interval([part[name] for part in parts]) for name in ("accuracy", "bias", "area")),
                interval([part["mean_n"] for part in parts], 2),
                interval([part["success"] for part in parts]),
            ]
        )
    header = ["calibrator of", "policy", "accuracy", "bias of E[p]", "area", "mean N", "success"]
    target = report["settings"]["target"]
    return Grid(f"budgets for the target {target:g}, before and after {CENTRE}", header, rows)


def show(report: dict[str, Any], console: Console) -> None:
    """All tables."""
    seeds = len({cell["seed"] for cell in report["cells"]})
    for grid in tables(report):
        table = Table(title=f"{grid.title}; mean ± 95 % over {seeds} seeds")
        texts = {"method", "option", "value", "training answers", "online update", "calibrator of", "policy"}
        for name in grid.header:
            table.add_column(name, justify="left" if name in texts else "right")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"{report['cpu_seconds']:.0f} CPU seconds, {report['seconds']:.0f} seconds", highlight=False)


def plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy against rollouts, a curve per method, bands for 95 %."""
    from prmfast.calibration.plots import line_style, new_figure, save

    figure, (axis,) = new_figure(width=6.4, height=3.6)
    for i, name in enumerate(METHODS):
        runs = of(report, "methods", name)
        rollouts = [n for n, _ in runs[0]["curve"]]
        spread = [mean_interval([at(one, n) for one in runs]) for n in rollouts]
        style = line_style(i)
        low, high = ([m + sign * h for m, h in spread] for sign in (-1, 1))
        axis.plot(rollouts, [m for m, _ in spread], linewidth=1.3, label=name, **style)
        axis.fill_between(rollouts, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axis.set(xlabel="rollouts, offline ones included", ylabel="accuracy on unseen questions")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    figure.set_dpi(100)
    save(figure, path)
