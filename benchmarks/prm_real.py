"""Small PRMs trained with each loss on real step labels, judged out of fold by question; tables and plots.

python -m benchmarks.prm_real ../shared/data --output results/prm_real.json --plots plots

processbench, bigbench_mistake: F1 of the first error. game24_gpt4_cot (exact step labels): best-of-N and votes among
100 stored answers. ipvrm_qwen3_0p6b_val: which of two answers to a question is right. The PRMs read text features
(benchmarks/text_prm.py) and are weak; "step number" (later steps score lower) shows what knowing nothing gives.
Every loss is trained anew from several seeds. Brackets hold the 95 % interval over questions (its bounds averaged over
the seeds), and behind ± stands that of the mean over training seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.model_selection import GroupKFold

from benchmarks.seeds import interval, mean_interval, run_seeds
from benchmarks.text_prm import LOSSES, StepFeatures, TextPRM
from prmfast._files import write_json
from prmfast.bench.machine import describe
from prmfast.calibration.metrics import Terms, bootstrap
from prmfast.calibration.plots import save
from prmfast.evaluation import (
    AnswerPool,
    Chain,
    cross_fitted_first_errors,
    first_error_table,
    first_error_terms,
    read_chains,
    selection_table,
    trajectory_scores,
)
from prmfast.evaluation.answers import step_lines
from prmfast.evaluation.plots import selection_curves, threshold_curves
from prmfast.prm.data import read_rows

BASELINE = "step number"
FILES = ("processbench", "bigbench_mistake", "ipvrm_qwen3_0p6b_val", "game24_gpt4_cot")
Scores = dict[str, list[list[float]]]
Rows = list[dict[str, Any]]


def out_of_fold(
    chains: Sequence[Chain], names: Sequence[str], *, folds: int, seed: int, characters: bool = False
) -> Scores:
    """Step scores of every chain by models that never saw its question."""
    scores: Scores = {name: [[]] * len(chains) for name in names}
    groups = [chain.question_id for chain in chains]
    for train, test in GroupKFold(folds).split(groups, groups=groups):
        features = StepFeatures(characters=characters).fit([chains[i] for i in train])
        seen, unseen = (features.transform([chains[i] for i in rows]) for rows in (train, test))
        labels = [chains[i].step_labels() for i in train]
        for name in names:
            for i, found in zip(test, TextPRM(name, seed=seed).fit(seen, labels).scores(unseen), strict=True):
                scores[name][i] = found
    scores[BASELINE] = [[-float(i) for i in range(len(chain.steps))] for chain in chains]
    return scores


def read_game24(path: Path) -> tuple[list[Chain], Rows]:
    """Chains whose first error is the first step after which 24 cannot be reached, and their rows."""
    chains, kept = [], []
    for row in read_rows(path):
        steps, first_error = step_lines(row)
        if steps:
            chains.append(Chain(row["puzzle"], steps, first_error, row["qkey"]))
            kept.append(row)
    return chains, kept


def game24_pools(chains: Sequence[Chain], rows: Sequence[dict[str, Any]], scores: Scores) -> list[AnswerPool]:
    """One pool per puzzle; each loss by the minimum over its steps."""
    by_question: dict[str, list[int]] = {}
    for i, chain in enumerate(chains):
        by_question.setdefault(chain.question_id, []).append(i)
    values = {name: trajectory_scores(steps, "min") for name, steps in scores.items() if name != BASELINE}
    return [
        AnswerPool(
            question,
            tuple(bool(rows[i]["correct"]) for i in mine),
            {name: of[mine] for name, of in values.items()},
            tuple(rows[i]["completion"].rsplit("Answer:", 1)[-1].strip() for i in mine),
        )
        for question, mine in by_question.items()
    ]


def read_outcomes(path: Path) -> list[Chain]:
    """Answers of which only the outcome is known: a wrong one is taken as wrong from its first step on."""
    chains = []
    for row in read_rows(path):
        steps = tuple(part for part in row["completion"].split("\n\n") if part.strip()) or ("",)
        chains.append(Chain(row["problem"], steps, -1 if row["correct"] else 0, row["qkey"]))
    return chains


def over_bce(chains: Sequence[Chain], scores: Scores, resamples: int) -> dict[str, tuple[float, float, float]]:
    """F1 of each loss minus that of BCE, with its interval from resampling the questions of both together."""
    labels, questions = [chain.first_error for chain in chains], [chain.question_id for chain in chains]
    terms = {
        name: first_error_terms(cross_fitted_first_errors(steps, labels, questions).predicted, labels)
        for name, steps in scores.items()
    }
    found = {}
    for name, mine in terms.items():
        if "BCE" in terms and name != "BCE":
            both = np.concatenate([mine.values, terms["BCE"].values], axis=1)
            pair = Terms(both, lambda means, f=mine.combine: f(means[..., :4]) - f(means[..., 4:]))
            found[name] = tuple(bootstrap(pair, questions, n=resamples))
    return found


def pair_table(chains: Sequence[Chain], scores: Scores) -> Rows:
    """Share of (right, wrong) pairs of answers to a question that the score puts in order, ties half."""
    table = []
    for name, steps in scores.items():
        for how in ("min", "mean", "last"):
            value = trajectory_scores(steps, how)
            shares, questions = [], []
            for question in dict.fromkeys(chain.question_id for chain in chains):
                rows = [i for i, chain in enumerate(chains) if chain.question_id == question]
                right = value[[i for i in rows if chains[i].first_error == -1]]
                wrong = value[[i for i in rows if chains[i].first_error != -1]]
                if len(right) and len(wrong):
                    shares.append(float((np.sign(right[:, None] - wrong) / 2 + 0.5).mean()))
                    questions.append(question)
            interval = bootstrap(np.array(shares), questions)
            table.append({"loss": name, "score": how, "questions": len(questions), "in_order": tuple(interval)})
    return table


@dataclass(frozen=True)
class Settings:
    """What a run over one file needs beside the seed; ``plots`` is a folder, of the first seed's curves."""

    data: Path
    losses: Sequence[str]
    folds: int
    resamples: int
    largest_n: int
    limit: int | None
    plots: Path | None

    def judged(self, name: str, seed: int) -> Rows:
        """Trains with one seed and judges on one file."""
        path = self.data / f"{name}.parquet"
        if name == "game24_gpt4_cot":
            return self._game24(path, seed)
        if name == "ipvrm_qwen3_0p6b_val":
            chains = read_outcomes(path)[: self.limit]
            return pair_table(chains, out_of_fold(chains, self.losses, folds=self.folds, seed=seed))
        return self._first_errors(path, seed)

    def _first_errors(self, path: Path, seed: int) -> Rows:
        chains = read_chains(path)[: self.limit]
        scores = out_of_fold(chains, self.losses, folds=self.folds, seed=seed)
        paired = over_bce(chains, scores, self.resamples)
        if self.plots and seed == 0:
            labels = [chain.first_error for chain in chains]
            save(threshold_curves(scores, labels, title=path.stem), self.plots / f"{path.stem}.png")
        return [
            {"loss": loss, **row, "f1_over_bce": paired.get(loss) if row["subset"] == "all" else None}
            for loss, steps in scores.items()
            for row in first_error_table(steps, chains, resamples=self.resamples)
        ]

    def _game24(self, path: Path, seed: int) -> Rows:
        chains, rows = read_game24(path)
        chains, rows = chains[: self.limit], rows[: self.limit]
        scores = out_of_fold(chains, self.losses, folds=self.folds, seed=seed, characters=True)
        ns = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= self.largest_n]
        found = selection_table(game24_pools(chains, rows, scores), ns, trials=20, resamples=self.resamples)
        if self.plots and seed == 0:
            kept = [row for row in found if not row["method"].startswith("vote")]
            save(selection_curves(kept, title="Game of 24, GPT-4 answers"), self.plots / f"{path.stem}.png")
        return found


def shown(name: str, rows: Rows) -> Rows:
    """The rows of a file's table that fit a console."""
    if name == "game24_gpt4_cot":
        return [row for row in rows if row["n"] in (1, rows[-1]["n"])]
    return [row for row in rows if row.get("subset", "all") == "all"]


def render(runs: Sequence[Rows], title: str) -> Table:
    """Equal rows of every seed, in one table."""
    table = Table(*runs[0][0], title=title)
    for rows in zip(*runs, strict=True):
        table.add_row(*(cell([row[key] for row in rows]) for key in rows[0]))
    return table


def cell(values: Sequence[Any]) -> str:
    """One number of every seed: its mean, its interval over questions if it has one, and that over seeds."""
    if values[0] is None or isinstance(values[0], (str, int)):
        return "-" if values[0] is None else str(values[0])
    if isinstance(values[0], float):
        return interval(values)
    value, low, high = np.mean([tuple(one) for one in values], axis=0)
    over = f" ± {mean_interval([one[0] for one in values])[1]:.3f}" if len(values) > 1 else ""
    return f"{value:.3f} [{low:.3f}, {high:.3f}]{over}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), help="default: all")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="of the training of every loss")
    parser.add_argument("--jobs", type=int, help="processes that share the seeds; default: one per core")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--largest-n", type=int, default=64)
    parser.add_argument("--limit", type=int, help="only the first chains of each file")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--plots", type=Path, help="folder of PNG files")
    parser.add_argument("--output", type=Path, help="JSON with every seed's tables; written after each file")
    arguments = parser.parse_args(argv)
    names = ("data", "folds", "resamples", "largest_n", "limit", "plots")
    settings = Settings(losses=arguments.losses or list(LOSSES), **{name: getattr(arguments, name) for name in names})
    about = {"folds": arguments.folds, "seeds": arguments.seeds, "limit": arguments.limit, "machine": describe()}
    tables: dict[str, list[Rows]] = {}
    seconds, console = 0.0, Console(width=200)
    for name in arguments.files:
        runs = run_seeds(
            partial(settings.judged, name),
            range(arguments.seeds),
            jobs=arguments.jobs,
            description=name,
            show_progress=not arguments.quiet,
        )
        tables[name], seconds = runs.results, seconds + runs.cpu_seconds
        console.print(render([shown(name, rows) for rows in runs.results], name))
        if arguments.output is not None:
            write_json(arguments.output, {**about, "cpu_seconds": seconds, "tables": tables})
    console.print(f"{seconds:.0f} CPU seconds", highlight=False)


if __name__ == "__main__":
    main()
