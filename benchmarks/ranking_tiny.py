"""PQM in its three variants beside BCE and MSE on the embedded tiny world: choosing among answers, and ranking steps.

    python -m benchmarks.ranking_tiny --output benchmarks/results/ranking_tiny.json --plots plots

One head (`prmfast.tiny.prm.TinyPRMNet`: the policy's hidden state, step log-probabilities and entropies, the operations
to come) is trained with each loss on the same hard labels (any of 8 rollouts succeeds) of the same answers, and judged
on answers to questions of another split. Five seeds, mean and 95 % t-interval over seeds, and the interval of the
difference to BCE seed by seed; five CPU minutes on a busy core.

Settings were chosen on a sixth seed (``--tune`` prints its grid): twelve of each loss, at most 30 epochs. Pointwise
losses had a wider grid of rates and epochs, PQM had margins instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.seeds import interval, mean_bars, mean_interval, run_seeds
from prmfast._files import write_json
from prmfast._progress import progress
from prmfast._threads import one_thread
from prmfast.bench.machine import describe
from prmfast.calibration import metrics
from prmfast.calibration.plots import line_style, new_figure, save
from prmfast.cli import wide_console
from prmfast.evaluation import AGGREGATIONS, AnswerPool, best_of_n, pass_at_n, trajectory_scores, vote_accuracies
from prmfast.prm.losses import bce_loss, mse_loss, pqm_loss
from prmfast.tiny import TinyWorld, TrainSettings, task
from prmfast.tiny.decoder import MAX_LENGTH
from prmfast.tiny.engine import start_ids
from prmfast.tiny.prm import StepStates, TinyPRMNet, step_ends, step_states
from prmfast.tiny.train import train_step_prm

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Method:
    """One of `LOSSES`, and how it is trained; zeta is PQM's margin."""

    loss: str
    rate: float
    epochs: int
    zeta: float | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits [B, H] with labels [B, H]."""
        return LOSSES[self.loss](logits, labels, **({} if self.zeta is None else {"zeta": self.zeta}))


@dataclass(frozen=True)
class Sizes:
    train: int = 600  # questions, two answers each
    train_rollouts: int = 8  # of a prefix
    test: int = 200  # questions
    pool: int = 16  # answers to each
    ranked: int = 2  # of them with Monte-Carlo truth
    truth: int = 24  # rollouts of a prefix


LOSSES: dict[str, Callable[..., Tensor]] = {
    "BCE": bce_loss,
    "MSE": mse_loss,
    "PQM, eq. 10": partial(pqm_loss, variant="pqm"),
    "PQM, eq. 9": partial(pqm_loss, variant="theorem"),
    "PQM, eq. 12": partial(pqm_loss, variant="first_wrong"),
}
METHODS = (  # the best of `grid` on TUNING_SEED
    Method("BCE", 1e-2, 30),
    Method("MSE", 1e-2, 30),
    Method("PQM, eq. 10", 1e-2, 15, 4.0),
    Method("PQM, eq. 9", 3e-3, 15, 8.0),
    Method("PQM, eq. 12", 3e-3, 15, 8.0),
)
OPERATIONS = (5, 8)  # of a question: enough steps to rank
BASELINE = "BCE"
NS = (4, 8, 16)
TUNING_SEED = 100


@dataclass(frozen=True)
class Answers:
    """Sampled answers, those to one question side by side; [N, H] for H steps at most, 0 in padding."""

    states: StepStates
    columns: Tensor  # [N, H] where the steps end
    step: Tensor  # [N, H] whether there is a step
    successes: Tensor  # [N, H] of the rollouts after each step
    right: Array  # [N]
    final: list[int | None]
    question: list[str]

    @classmethod
    def draw(cls, world: TinyWorld, split: str, questions: int, samples: int, rollouts: int, seed: int) -> Answers:
        traces = world.make_traces(
            questions, samples, rollouts, seed, progress=False, split=split, k_range=OPERATIONS
        ).to_pylist()
        ids = torch.full((len(traces), MAX_LENGTH), task.PAD_ID)
        shape = (len(traces), max(len(row["steps"]) for row in traces))
        columns, step, successes = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        for i, row in enumerate(traces):
            begun, ends = start_ids(row["question"], row["completion"]), step_ends(row["completion"])
            ids[i, : len(begun)] = torch.tensor(begun)
            columns[i, : len(ends)] = torch.tensor(ends)
            step[i, : len(ends)] = 1
            if rollouts:
                successes[i, : len(ends)] = torch.tensor(row["step_successes"])
        return cls(
            step_states(world.policy, ids),
            columns,
            step.bool(),
            successes,
            np.array([float(row["correct"]) for row in traces]),
            [task.final_answer(row["completion"]) for row in traces],
            [row["question"] for row in traces],
        )

    @torch.no_grad()
    def logits(self, net: TinyPRMNet) -> Tensor:
        """[N, H] float64, 0 in padding."""
        rows = torch.arange(len(self.columns))[:, None].expand_as(self.columns)[self.step]
        logit, _ = net(self.states, rows, self.columns[self.step])
        return torch.zeros(self.step.shape, dtype=torch.float64).masked_scatter(self.step, logit.double())


def trained(answers: Answers, method: Method, seed: int) -> TinyPRMNet:
    """The head after training on hard labels: 1 where any rollout succeeded."""
    labels = torch.where(answers.step, (answers.successes > 0).float(), -100.0)
    settings = TrainSettings(seed=seed, prm_rate=method.rate, prm_epochs=method.epochs)
    return train_step_prm(answers.states, answers.columns, labels, method, settings=settings)


def chosen(net: TinyPRMNet, pool: Answers, samples: int) -> dict[str, dict[str, float]]:
    """BON@n of the probabilities' aggregations: {aggregation: {n: share of questions}}."""
    steps = [row[kept].tolist() for row, kept in zip(pool.logits(net).sigmoid(), pool.step, strict=True)]
    right = pool.right.reshape(-1, samples)
    report: dict[str, dict[str, float]] = {}
    for how in AGGREGATIONS:
        scores = trajectory_scores(steps, how).reshape(-1, samples)
        report[how] = {
            str(n): float(np.mean([best_of_n(*row, n) for row in zip(scores, right, strict=True)])) for n in ns(samples)
        }
    return report


def without_prm(pool: Answers, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """pass@n, majority and an answer at random, by n."""
    pools = [
        AnswerPool(
            pool.question[at], tuple(pool.right[at : at + samples] > 0), {}, tuple(pool.final[at : at + samples])
        )
        for at in range(0, len(pool.right), samples)
    ]
    report: dict[str, dict[str, float]] = {"pass@n": {}, "majority": {}, "random pick": {}}
    for n in ns(samples):
        report["pass@n"][str(n)] = float(np.mean([pass_at_n(one.correct, n) for one in pools]))
        votes = [vote_accuracies(one, n, trials=20, seed=seed + i)["majority"] for i, one in enumerate(pools)]
        report["majority"][str(n)] = float(np.mean(votes))
        report["random pick"][str(n)] = float(pool.right.mean())
    return report


def ns(samples: int) -> list[int]:
    return [n for n in NS if n <= samples]


def ranked(score: Array, answers: Answers, rollouts: int) -> dict[str, float]:
    """How scores [N, H] put the steps in order, those of the final answer left out: nothing is rolled out after them.

    "spearman" with k/n over all steps; "in answer": its mean over the answers whose k/n differ. "pairs": share of pairs
    of a step with k > 0 and one with k = 0, of any two answers, in which the first scores higher (ties half); "pairs in
    answer": of the same answer.
    """
    truth = answers.successes.double().numpy() / rollouts
    kept = answers.step & (answers.step.flip(1).cumsum(1).flip(1) > 1)
    rows = [(score[i][mine], truth[i][mine]) for i, mine in enumerate(kept.numpy())]
    inside = [metrics.spearman(*row) for row in rows if len(row[0]) > 1 and np.ptp(row[1]) > 0]
    everything = tuple(np.concatenate(part) for part in zip(*rows, strict=True))
    pairs = [in_order(*row) for row in rows]
    return {
        "spearman": metrics.spearman(*everything),
        "in answer": known_mean(inside),
        "pairs": in_order(*everything),
        "pairs in answer": known_mean(pairs),
    }


def known_mean(values: Sequence[float]) -> float:
    """Mean of those that are not NaN; NaN without one."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def in_order(score: Array, truth: Array) -> float:
    """Share of pairs (truth > 0, truth = 0) with the scores in that order; NaN without a pair."""
    from sklearn.metrics import roc_auc_score

    good = truth > 0
    return float(roc_auc_score(good, score)) if good.any() and not good.all() else float("nan")


@dataclass(frozen=True)
class SeedData:
    """What one seed trains and judges on."""

    train: Answers
    pool: Answers
    ranked: Answers

    @classmethod
    def draw(cls, world: TinyWorld, sizes: Sizes, seed: int) -> SeedData:
        return cls(
            Answers.draw(world, "train", sizes.train, 2, sizes.train_rollouts, seed),
            Answers.draw(world, "test", sizes.test, sizes.pool, 0, seed),
            Answers.draw(world, "test", sizes.test, sizes.ranked, sizes.truth, seed),
        )


def judged(data: SeedData, method: Method, sizes: Sizes, seed: int) -> dict[str, Any]:
    net = trained(data.train, method, seed)
    return {
        "bon": chosen(net, data.pool, sizes.pool),
        "steps": ranked(data.ranked.logits(net).numpy(), data.ranked, sizes.truth),
    }


def run_seed(sizes: Sizes, seed: int) -> dict[str, Any]:
    """Every loss, and what needs none: {"losses": {loss: {"bon", "steps"}}, "without": {row: {n: share}}, ...}."""
    data = SeedData.draw(TinyWorld.load(), sizes, seed)
    place = -np.arange(data.ranked.step.shape[1]) + np.zeros((len(data.ranked.step), 1))
    return {
        "losses": {method.loss: judged(data, method, sizes, seed) for method in METHODS},
        "without": without_prm(data.pool, sizes.pool, seed),
        "step number": ranked(place, data.ranked, sizes.truth),
    }


def grid() -> list[Method]:
    """Twelve settings of each loss."""
    pointwise = [(rate, epochs, None) for rate in (1e-3, 3e-3, 1e-2, 3e-2) for epochs in (8, 15, 30)]
    margins = [(rate, epochs, zeta) for rate in (3e-3, 1e-2) for epochs in (15, 30) for zeta in (1.0, 4.0, 8.0)]
    return [Method(loss, *setting) for loss in LOSSES for setting in (margins if loss.startswith("PQM") else pointwise)]


def tune(sizes: Sizes, console: Console) -> None:
    """Prints the grid on the tuning seed, best settings first: mean BON@8 of the aggregations plus rank correlation."""
    data = SeedData.draw(TinyWorld.load(), sizes, TUNING_SEED)
    table = Table("loss", "rate", "epochs", "zeta", "BON@8", "spearman", "sum", title=f"seed {TUNING_SEED}")
    found = []
    with progress(len(grid()), "settings") as bar:
        for method in grid():
            result = judged(data, method, sizes, TUNING_SEED)
            bon = float(np.mean([row["8"] for row in result["bon"].values()]))
            found.append((method, bon, result["steps"]["spearman"]))
            bar.advance()
    for loss in LOSSES:
        mine = sorted((row for row in found if row[0].loss == loss), key=lambda row: -row[1] - row[2])
        for method, bon, rank in mine:
            table.add_row(
                loss,
                f"{method.rate:g}",
                str(method.epochs),
                str(method.zeta),
                f"{bon:.3f}",
                f"{rank:.3f}",
                f"{bon + rank:.3f}",
            )
    console.print(table)


def show(runs: Sequence[dict[str, Any]], console: Console) -> None:
    counts = list(runs[0]["without"]["pass@n"])
    table = Table(title=f"share of questions answered rightly; mean ± 95 % over {len(runs)} seeds")
    for name in ("loss", "chosen by", *(f"n = {n}" for n in counts), f"minus {BASELINE}, n = {counts[-1]}"):
        table.add_column(name, justify="left" if name in ("loss", "chosen by") else "right")
    for name in runs[0]["without"]:
        values = [interval([run["without"][name][n] for run in runs]) for n in counts]
        table.add_row("", name, *values, end_section=name == "random pick")
    for loss in LOSSES:
        for how in AGGREGATIONS:
            values = [interval(series(runs, loss, "bon", how, n)) for n in counts]
            over = over_baseline(runs, loss, "bon", how, counts[-1])
            table.add_row(loss if how == AGGREGATIONS[0] else "", how, *values, over, end_section=how == "mean")
    console.print(table)
    table = Table(title=f"steps against k/n of fresh rollouts; mean ± 95 % over {len(runs)} seeds")
    names = list(runs[0]["step number"])
    table.add_column("score")
    for name in names:
        table.add_column(name, justify="right")
        table.add_column(f"minus {BASELINE}", justify="right")
    for loss in LOSSES:
        cells = [
            (interval(series(runs, loss, "steps", name)), over_baseline(runs, loss, "steps", name)) for name in names
        ]
        table.add_row(loss, *(cell for pair in cells for cell in pair))
    cells = [(interval([run["step number"][name] for run in runs]), "") for name in names]
    table.add_row("minus the step number", *(cell for pair in cells for cell in pair))
    console.print(table)


def series(runs: Sequence[dict[str, Any]], loss: str, *keys: str) -> list[float]:
    """One number of every seed."""
    found = []
    for run in runs:
        value = run["losses"][loss]
        for key in keys:
            value = value[key]
        found.append(float(value))
    return found


def over_baseline(runs: Sequence[dict[str, Any]], loss: str, *keys: str) -> str:
    """Mean and interval of the difference to the baseline on the same answers; nothing for the baseline itself."""
    if loss == BASELINE:
        return ""
    pairs = zip(series(runs, loss, *keys), series(runs, BASELINE, *keys), strict=True)
    return interval([mine - theirs for mine, theirs in pairs], signed=True)


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Best-of-n by two aggregations, and the rank correlation of steps; bars are 95 % intervals over seeds."""
    figure, axes = new_figure(1, 3)
    counts = list(runs[0]["without"]["pass@n"])
    for axis, how in zip(axes, ("min", "last"), strict=False):
        for i, loss in enumerate(LOSSES):
            means, halves = mean_bars([series(runs, loss, "bon", how, n) for n in counts])
            at = np.array([int(n) for n in counts]) * 2.0 ** (0.05 * (i - len(LOSSES) / 2))  # bars side by side
            axis.errorbar(at, means, halves, linewidth=1.3, elinewidth=0.6, label=loss, **line_style(i))
        for name, line in (("pass@n", "--"), ("majority", ":")):
            means = np.array([mean_interval([run["without"][name][n] for run in runs])[0] for n in counts])
            axis.plot([int(n) for n in counts], means, color="black", linestyle=line, linewidth=1.0, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks([int(n) for n in counts], counts)
        axis.set(
            xlabel="answers n", ylabel="questions answered rightly (share)", title=f"best of n, {how} of the steps"
        )
    axes[0].legend(fontsize=8, frameon=False)
    names = ("spearman", "in answer")
    for i, loss in enumerate(LOSSES):
        means, halves = mean_bars([series(runs, loss, "steps", name) for name in names])
        place = np.arange(len(names)) + 0.15 * (i - (len(LOSSES) - 1) / 2)
        axes[2].errorbar(place, means, halves, linestyle="", elinewidth=0.6, label=loss, **line_style(i))
    axes[2].axhline(0.0, color="black", linewidth=0.6)
    axes[2].set_xticks(range(len(names)), ["all steps", "within an answer"])
    axes[2].set(ylabel="Spearman's rank correlation", title="step scores and Monte-Carlo success")
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, help="processes that share the seeds; default: one per core")
    parser.add_argument("--tune", action="store_true", help=f"only print the grid of settings on seed {TUNING_SEED}")
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--plots", type=Path, help="folder of the PNG file")
    parser.add_argument("--output", type=Path, help="JSON with every seed's numbers")
    arguments = parser.parse_args(argv)
    sizes = Sizes(**{name: getattr(arguments, name) for name in asdict(Sizes())})
    console = wide_console()
    if arguments.tune:
        with one_thread():
            tune(sizes, console)
        return
    machine = describe()  # before the first run: the commit that it ran from
    runs = run_seeds(partial(run_seed, sizes), range(arguments.seeds), jobs=arguments.jobs)
    show(runs.results, console)
    console.print(f"{runs.cpu_seconds:.0f} CPU seconds", highlight=False)
    if arguments.plots is not None:
        plot(runs.results, arguments.plots / "ranking_tiny.png")
    if arguments.output is not None:
        about = {"machine": machine, "cpu_seconds": runs.cpu_seconds, "sizes": asdict(sizes), "operations": OPERATIONS}
        write_json(arguments.output, {**about, "methods": [asdict(one) for one in METHODS], "runs": runs.results})
        console.print(f"written: {arguments.output}", highlight=False)


if __name__ == "__main__":
    main()
