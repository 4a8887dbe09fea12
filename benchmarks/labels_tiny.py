"""Labels on the embedded tiny world: hard against soft ones, and bisection against labelling every step.

    python -m benchmarks.labels_tiny --output benchmarks/results/labels_tiny.json --plot labels_tiny.png

Hard against soft: one PRM head per kind of label, trained on the same rollouts of the same answers (train split), its
bias at the steps of unseen answers (test split) before and after calibration (calibration split). Bisection: the same
answers labelled both ways. Five seeds, mean and 95 % t-interval over seeds; four CPU minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.seeds import interval, mean_bars, run_seeds
from prmfast._files import write_json
from prmfast.bench.machine import describe
from prmfast.calibration import CalibrationData, Calibrator, CondOTCalibrator, IsotonicCalibrator, metrics
from prmfast.calibration.plots import line_style, new_figure, save
from prmfast.cli import wide_console
from prmfast.pipeline import LabelSettings
from prmfast.tiny import TinyWorld, TrainSettings, task
from prmfast.tiny.decoder import MAX_LENGTH
from prmfast.tiny.engine import start_ids
from prmfast.tiny.prm import TinyPRMNet, step_ends, step_states
from prmfast.tiny.train import train_prm

Row = dict[str, Any]

ROLLOUTS = 8  # of a prefix in training and calibration
TEST_ROLLOUTS = 24
QUESTIONS = {"train": 400, "calibration": 250, "test": 150}
EPOCHS = 25
KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hard: any of 8": lambda k, n: (k > 0).float(),
    "hard: all of 8": lambda k, n: (k == n).float(),
    "soft: k of 8": lambda k, n: (k / n).float(),
}
CALIBRATORS: dict[str, Callable[[int], Calibrator]] = {
    "isotonic": lambda seed: IsotonicCalibrator(),
    "CondOT": lambda seed: CondOTCalibrator(steps=200, seed=seed),
}
SEARCHED = 60  # questions, two answers each
TRIALS = (4, 8, 16)
TRUTH = 64


@dataclass(frozen=True)
class Places:
    """Labelled steps of answers: sequences [N, 37], and for each of R steps its sequence, column, k of n, question."""

    ids: Tensor
    rows: Tensor
    columns: Tensor
    successes: Tensor
    trials: Tensor
    question: tuple[str, ...]


def labelled(world: TinyWorld, split: str, questions: int, settings: LabelSettings) -> list[Row]:
    asked = world.questions(questions, settings.seed, split=split)
    return list(world.labeller(settings)(asked).to_pylist())


def places(found: list[Row]) -> Places:
    ids = torch.full((len(found), MAX_LENGTH), task.PAD_ID)
    for row, answer in zip(ids, found, strict=True):
        begun = start_ids(answer["question"], answer["completion"])
        row[: len(begun)] = torch.tensor(begun)
    ends = [step_ends(answer["completion"]) for answer in found]
    rows = torch.arange(len(found)).repeat_interleave(torch.tensor([len(row) for row in ends]))
    flat = {
        name: torch.tensor([k for answer in found for k in answer[name]]) for name in ("step_successes", "step_trials")
    }
    return Places(
        ids,
        rows,
        torch.tensor([end for row in ends for end in row]),
        flat["step_successes"],
        flat["step_trials"],
        tuple(found[i]["question_id"] for i in rows.tolist()),
    )


@torch.no_grad()
def judged(world: TinyWorld, net: TinyPRMNet, at: Places) -> CalibrationData:
    logit, state = net(step_states(world.policy, at.ids), at.rows, at.columns)
    return CalibrationData.from_arrays(
        score=logit.sigmoid(), successes=at.successes, trials=at.trials, hidden=state, question=at.question
    )


def distance(p: npt.ArrayLike, data: CalibrationData) -> dict[str, float]:
    guess, truth = np.asarray(p, dtype=np.float64), data.target.double().numpy()
    return {
        "bias": float((guess - truth).mean()),
        "mse": float(((guess - truth) ** 2).mean()),
        "spearman": metrics.spearman(guess, truth),
    }


def hard_and_soft(world: TinyWorld, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """bias, mse and rank correlation against k/24, by kind of label and by what stands behind the score."""
    parts = {}
    for split, questions in QUESTIONS.items():
        rollouts = TEST_ROLLOUTS if split == "test" else ROLLOUTS
        settings = LabelSettings(samples=1, rollouts=rollouts, seed=seed, hidden_states=False)
        parts[split] = places(labelled(world, split, questions, settings))
    train = parts["train"]
    states = step_states(world.policy, train.ids)
    report = {}
    for kind, label in KINDS.items():
        labels = label(train.successes, train.trials)
        settings = TrainSettings(seed=seed, prm_epochs=EPOCHS)
        net = train_prm(states, train.rows, train.columns, labels, settings=settings)
        calibration, test = (judged(world, net, parts[split]) for split in ("calibration", "test"))
        report[kind] = {"score": distance(test.score.numpy(), test)}
        for name, make in CALIBRATORS.items():
            calibrator = make(seed).fit(calibration, progress=False)
            report[kind][name] = distance(calibrator.expected(test).numpy(), test)
    return report


def searches(world: TinyWorld, seed: int) -> dict[str, dict[str, float]]:
    """Agreement of the two searches with each other and with fresh rollouts, and what they cost, by n."""
    report = {}
    truth: list[int] = []
    for n in TRIALS:
        every, found = (
            labelled(
                world,
                "test",
                SEARCHED,
                LabelSettings(samples=2, rollouts=n, search=search, seed=seed),  # type: ignore[arg-type]
            )
            for search in ("exhaustive", "bisection")
        )
        truth = truth or first_errors(world, every, seed)
        wrong = [i for i, row in enumerate(every) if not row["correct"]]
        first = {name: np.array([row["first_error"] for row in rows]) for name, rows in (("e", every), ("b", found))}
        drawn = {name: np.array([row["rollouts"] for row in rows]) for name, rows in (("e", every), ("b", found))}
        same, known = first["e"] == first["b"], np.array(truth)
        report[str(n)] = {
            "agree": float(same.mean()),
            "agree, wrong answers": float(same[wrong].mean()),
            "exhaustive = truth": float((first["e"] == known)[wrong].mean()),
            "bisection = truth": float((first["b"] == known)[wrong].mean()),
            "rollouts, exhaustive": float(drawn["e"].mean()),
            "rollouts, bisection": float(drawn["b"].mean()),
            "saved": float(1 - drawn["b"].sum() / drawn["e"].sum()),
            "saved, wrong answers": float(1 - drawn["b"][wrong].sum() / drawn["e"][wrong].sum()),
        }
    return report


def first_errors(world: TinyWorld, found: list[Row], seed: int) -> list[int]:
    """The first step from which none of 64 fresh rollouts succeeds, in wrong answers; -1 in right ones."""
    wrong = [row for row in found if not row["correct"]]
    starts = [(row["question"], " ".join(row["steps"][: t + 1])) for row in wrong for t in range(len(row["steps"]))]
    counts = world.true_success(*map(list, zip(*starts, strict=True)), rollouts=TRUTH, seed=seed)  # type: ignore[arg-type]
    parts = iter(counts.split([len(row["steps"]) for row in wrong]))
    return [-1 if row["correct"] else int((next(parts) == 0).nonzero()[0, 0]) for row in found]


def run_seed(seed: int) -> dict[str, dict[str, Any]]:
    world = TinyWorld.load()
    return {"hard_and_soft": hard_and_soft(world, seed), "searches": searches(world, seed)}


def show(hard: list[Any], search: list[Any], console: Console) -> None:
    table = Table(title=f"steps of unseen answers against k/{TEST_ROLLOUTS}; mean ± 95 % over {len(hard)} seeds")
    for name in ("labels", "judged by", "bias", "mse", "spearman"):
        table.add_column(name, justify="left" if name in ("labels", "judged by") else "right")
    for kind in KINDS:
        for judge in ("score", *CALIBRATORS):
            values = [interval([run[kind][judge][name] for run in hard]) for name in ("bias", "mse", "spearman")]
            table.add_row(kind if judge == "score" else "", judge, *values, end_section=judge == "CondOT")
    console.print(table)
    table = Table(title=f"first error, {SEARCHED} questions, 2 answers each; mean ± 95 % over {len(search)} seeds")
    table.add_column("")
    for n in TRIALS:
        table.add_column(f"n = {n}", justify="right")
    for name in search[0][str(TRIALS[0])]:
        table.add_row(name, *(interval([run[str(n)][name] for run in search]) for n in TRIALS))
    console.print(table)


def plot(hard: Sequence[Any], search: Sequence[Any], path: Path) -> None:
    """Bias and error by kind of label, before and after calibration; the two searches by n. Bars: 95 % over seeds."""
    figure, axes = new_figure(1, 3)
    titles = {"bias": "bias of the score (mean minus k/n)", "mse": "mean squared distance to k/n"}
    for axis, name in zip(axes, titles, strict=False):
        for i, judge in enumerate(("score", *CALIBRATORS)):
            means, halves = mean_bars([[run[kind][judge][name] for run in hard] for kind in KINDS])
            place = np.arange(len(KINDS)) + 0.15 * (i - len(CALIBRATORS) / 2)
            axis.errorbar(place, means, halves, linestyle="", elinewidth=0.6, label=judge, **line_style(i))
        axis.axhline(0.0, color="black", linewidth=0.6)
        axis.set_xticks(range(len(KINDS)), KINDS)
        axis.set(ylabel=titles[name], title="steps of unseen answers")
    axes[0].legend(fontsize=8, frameon=False)
    for i, name in enumerate(
        ("agree, wrong answers", "exhaustive = truth", "bisection = truth", "saved, wrong answers")
    ):
        means, halves = mean_bars([[run[str(n)][name] for run in search] for n in TRIALS])
        place = np.array(TRIALS) * 2.0 ** (0.04 * (i - 1.5))  # bars side by side
        label = "rollouts saved" if name.startswith("saved") else name.removesuffix(", wrong answers")
        axes[2].errorbar(place, means, halves, linewidth=1.3, elinewidth=0.6, label=label, **line_style(i))
    axes[2].set_xscale("log", base=2)
    axes[2].set_xticks(TRIALS, [str(n) for n in TRIALS])
    axes[2].set(xlabel="rollouts of a prefix", ylabel="share", ylim=(0, 1), title="first error of wrong answers")
    axes[2].legend(fontsize=8, frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, help="processes that share the seeds; default: one per core")
    parser.add_argument("--output", type=Path, help="JSON with every seed's numbers")
    parser.add_argument("--plot", type=Path, help="PNG of the tables")
    arguments = parser.parse_args()
    machine = describe()  # before the first run: the commit that it ran from
    runs = run_seeds(run_seed, range(arguments.seeds), jobs=arguments.jobs)
    hard, search = ([result[part] for result in runs.results] for part in ("hard_and_soft", "searches"))
    console = wide_console()
    show(hard, search, console)
    console.print(f"{runs.cpu_seconds:.0f} CPU seconds", highlight=False)
    if arguments.output is not None:
        report = {"machine": machine, "cpu_seconds": runs.cpu_seconds, "hard_and_soft": hard, "searches": search}
        write_json(arguments.output, report)
        console.print(f"written: {arguments.output}", highlight=False)
    if arguments.plot is not None:
        plot(hard, search, arguments.plot)
        console.print(f"written: {arguments.plot}", highlight=False)


if __name__ == "__main__":
    main()
