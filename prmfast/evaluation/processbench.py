"""Chains with a known first error (ProcessBench, BIG-Bench Mistake): read, scored by a PRM, reported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prmfast._progress import progress as bar_of
from prmfast.calibration.metrics import bootstrap
from prmfast.engines.base import Scorer, StepScorer
from prmfast.evaluation.first_error import (
    cross_fitted_first_errors,
    first_error_metrics,
    first_error_terms,
    first_errors,
    optimal_threshold,
)
from prmfast.prm.data import read_rows


@dataclass(frozen=True, slots=True)
class Chain:
    """A question, the steps of one answer, and the index of the first wrong step (-1: none)."""

    question: str
    steps: tuple[str, ...]
    first_error: int
    question_id: str
    subset: str = ""

    def step_labels(self) -> tuple[int, ...]:
        """1 before the first error, 0 from it on: the labels of `losses.pqm_loss`."""
        if self.first_error == -1:
            return (1,) * len(self.steps)
        return tuple(int(i < self.first_error) for i in range(len(self.steps)))


def read_chains(path: str | os.PathLike[str]) -> list[Chain]:
    """The chains of a parquet or JSON file, whose first error may stand at any step.

    Columns: problem, steps (strings), first_error or label (index of the first wrong step, -1 for none); optional
    qkey (the question's id; otherwise its text) and subset or task. ValueError with the row's number.
    """
    return [chain_of_row(row, f"{os.fspath(path)}: row {number}") for number, row in enumerate(read_rows(path))]


def chain_of_row(row: Mapping[str, Any], where: str) -> Chain:
    """One row of `read_chains`; ``where`` begins the message of its ValueError."""
    label = row.get("first_error", row.get("label"))
    steps = row.get("steps")
    if not isinstance(row.get("problem"), str):
        raise ValueError(f"{where}: problem must be a string, got {type(row.get('problem')).__name__}")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise ValueError(f"{where}: steps must be a list of strings, not empty, got {steps!r:.80}")
    if isinstance(label, bool) or not isinstance(label, int) or not -1 <= label < len(steps):
        raise ValueError(f"{where}: first_error must be an integer in [-1, {len(steps)}), got {label!r}")
    subset = str(row.get("subset") or row.get("task") or "")
    return Chain(row["problem"], tuple(steps), label, str(row.get("qkey") or row["problem"]), subset)


def score_chains(
    scorer: Scorer | StepScorer,
    chains: Sequence[Chain],
    *,
    separator: str = "\n\n",
    batch_size: int = 64,
    progress: bool = False,
) -> list[list[float]]:
    """The PRM's score of every step of every chain.

    A `StepScorer` is given the steps; for another PRM they are joined with ``separator``, and ValueError names the
    chain that it then splits into another number of steps.
    """
    scores: list[list[float]] = []
    with bar_of(len(chains), "scoring chains", progress) as bar:
        for start in range(0, len(chains), batch_size):
            batch = chains[start : start + batch_size]
            questions = [chain.question for chain in batch]
            if isinstance(scorer, StepScorer):
                scores += scorer.score_steps(questions, [chain.steps for chain in batch])
                bar.advance(len(batch))
                continue
            answers = [[separator.join(chain.steps)] for chain in batch]
            for offset, (answer,) in enumerate(scorer.score(questions, answers)):
                steps = len(batch[offset].steps)
                if len(answer) != steps:
                    raise ValueError(
                        f"chain {start + offset}: {scorer.prm_id} sees {len(answer)} steps, the chain has {steps}; "
                        "separator must be what the PRM splits answers at, and no step may hold it"
                    )
                scores.append([float(score) for score in answer])
            bar.advance(len(batch))
    return scores


def first_error_table(
    step_scores: Sequence[Sequence[float]],
    chains: Sequence[Chain],
    *,
    threshold: float | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> list[dict[str, Any]]:
    """One row per subset and one for all chains: F1 with its 95 % interval by question, and the two accuracies.

    Chains are judged at ``threshold``, chosen on other questions; without one at that which is optimal for the other
    half of all questions (`cross_fitted_first_errors`). "same_chains" is the F1 at the threshold that is optimal for
    the row's own chains, what a search on the reported file gives. A subset without both kinds of chains has None
    there.
    """
    if len(step_scores) != len(chains):
        raise ValueError(f"step_scores must have one entry per chain ({len(chains)}), got {len(step_scores)}")
    labels = [chain.first_error for chain in chains]
    questions = [chain.question_id for chain in chains]
    if threshold is None:
        predicted = cross_fitted_first_errors(step_scores, labels, questions, seed=seed).predicted
    else:
        predicted = first_errors(step_scores, threshold)
    subsets = sorted({chain.subset for chain in chains})
    table = []
    for name in [*(subsets if len(subsets) > 1 else []), "all"]:
        rows = [i for i, chain in enumerate(chains) if name in ("all", chain.subset)]
        mine, truth = [predicted[i] for i in rows], [labels[i] for i in rows]
        found = first_error_metrics(mine, truth)
        interval = bootstrap(first_error_terms(mine, truth), [questions[i] for i in rows], n=resamples, seed=seed)
        own = None
        if len({label == -1 for label in truth}) == 2:
            scores = [step_scores[i] for i in rows]
            own = first_error_metrics(first_errors(scores, optimal_threshold(scores, truth)), truth).f1
        table.append(
            {
                "subset": name,
                "chains": len(rows),
                "with_error": sum(label != -1 for label in truth),
                "f1": tuple(interval),
                "accuracy_error": found.accuracy_error,
                "accuracy_correct": found.accuracy_correct,
                "same_chains": own,
            }
        )
    return table
