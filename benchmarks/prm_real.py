"""Small PRMs trained with each loss on real step labels, judged out of fold by question; tables and plots.

python -m benchmarks.prm_real ../shared/data --output results/prm_real.json --plots plots

processbench, bigbench_mistake: F1 of the first error. game24_gpt4_cot (exact step labels): best-of-N and votes among
100 stored answers. ipvrm_qwen3_0p6b_val: which of two answers to a question is right. The PRMs read text features
(benchmarks/text_prm.py) and are weak; "step number" (later steps score lower) shows what knowing nothing gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.model_selection import GroupKFold

from benchmarks.text_prm import LOSSES, StepFeatures, TextPRM
from prmfast._files import write_json
from prmfast._progress import progress
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


def out_of_fold(
    chains: Sequence[Chain],
    names: Sequence[str],
    *,
    folds: int,
    seeds: int,
    characters: bool,
    advance: Callable[[], None],
) -> Scores:
    """Step scores of every chain by models that never saw its question; averaged over seeds."""
    scores: Scores = {name: [[0.0] * len(chain.steps) for chain in chains] for name in names}
    groups = [chain.question_id for chain in chains]
    for train, test in GroupKFold(folds).split(groups, groups=groups):
        features = StepFeatures(characters=characters).fit([chains[i] for i in train])
        seen, unseen = (features.transform([chains[i] for i in rows]) for rows in (train, test))
        labels = [chains[i].step_labels() for i in train]
        for name in names:
            for seed in range(seeds):
                for i, found in zip(test, TextPRM(name, seed=seed).fit(seen, labels).scores(unseen), strict=True):
                    scores[name][i] = [a + b / seeds for a, b in zip(scores[name][i], found, strict=True)]
            advance()
    scores[BASELINE] = [[-float(i) for i in range(len(chain.steps))] for chain in chains]
    return scores


def read_game24(path: Path) -> tuple[list[Chain], list[dict[str, Any]]]:
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


def pair_table(chains: Sequence[Chain], scores: Scores) -> list[dict[str, Any]]:
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


def render(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Any list of equal rows."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


class Run:
    """One file after another; `tables` holds what is done."""

    def __init__(self, arguments: argparse.Namespace, console: Console, advance: Callable[[], None]) -> None:
        self.arguments, self.console, self.advance = arguments, console, advance
        self.names: list[str] = arguments.losses or list(LOSSES)
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def file(self, name: str) -> None:
        """Trains and judges on one file."""
        if name == "game24_gpt4_cot":
            self._game24(name)
        elif name == "ipvrm_qwen3_0p6b_val":
            chains = read_outcomes(self._path(name))[: self.arguments.limit]
            self.tables[name] = pair_table(chains, self._scores(chains))
            self.console.print(render(self.tables[name], f"{name}: pairs in order"))
        else:
            self._first_errors(name)

    def _path(self, name: str) -> Path:
        return Path(self.arguments.data) / f"{name}.parquet"

    def _scores(self, chains: Sequence[Chain], *, characters: bool = False) -> Scores:
        options = {"folds": self.arguments.folds, "seeds": self.arguments.seeds}
        return out_of_fold(chains, self.names, characters=characters, advance=self.advance, **options)

    def _first_errors(self, name: str) -> None:
        chains = read_chains(self._path(name))[: self.arguments.limit]
        scores = self._scores(chains)
        paired = over_bce(chains, scores, self.arguments.resamples)
        self.tables[name] = [
            {"loss": loss, **row, "f1_over_bce": paired.get(loss) if row["subset"] == "all" else None}
            for loss, steps in scores.items()
            for row in first_error_table(steps, chains, resamples=self.arguments.resamples)
        ]
        self.console.print(render([row for row in self.tables[name] if row["subset"] == "all"], name))
        if self.arguments.plots:
            labels = [chain.first_error for chain in chains]
            save(threshold_curves(scores, labels, title=name), self.arguments.plots / f"{name}.png")

    def _game24(self, name: str) -> None:
        chains, rows = (found[: self.arguments.limit] for found in read_game24(self._path(name)))
        pools = game24_pools(chains, rows, self._scores(chains, characters=True))
        ns = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= self.arguments.largest_n]
        found = selection_table(pools, ns, trials=20, resamples=self.arguments.resamples)
        self.tables[name] = found
        self.console.print(render([row for row in found if row["n"] in (1, ns[-1])], f"{name}: best of n"))
        if self.arguments.plots:
            kept = [row for row in found if not row["method"].startswith("vote")]
            save(selection_curves(kept, title="Game of 24, GPT-4 answers"), self.arguments.plots / f"{name}.png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), help="default: all")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1, help="fits per fold and loss; their scores are averaged")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--largest-n", type=int, default=64)
    parser.add_argument("--limit", type=int, help="only the first chains of each file")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--plots", type=Path, help="folder of PNG files")
    parser.add_argument("--output", type=Path, help="JSON with everything the tables show; written after each file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = {"folds": arguments.folds, "seeds": arguments.seeds, "limit": arguments.limit, "machine": describe()}
    steps = len(arguments.files) * arguments.folds * len(arguments.losses or LOSSES)
    with progress(steps, "out of fold", enabled=not arguments.quiet) as bar:
        run = Run(arguments, Console(width=180), bar.advance)
        for name in arguments.files:
            run.file(name)
            if arguments.output is not None:
                write_json(arguments.output, {**settings, "tables": run.tables})


if __name__ == "__main__":
    main()
