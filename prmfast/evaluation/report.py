"""What step scores are worth: first errors at thresholds chosen elsewhere, best-of-N and votes, as tables and plots."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prmfast.evaluation.answers import StoredAnswer
from prmfast.evaluation.best_of_n import AGGREGATIONS, AnswerPool, selection_table, trajectory_scores
from prmfast.evaluation.first_error import optimal_threshold
from prmfast.evaluation.processbench import Chain, first_error_table

if TYPE_CHECKING:
    from rich.table import Table

BASELINE = "step number"  # later steps score lower: what knowing nothing but the place gives
Scores = Mapping[str, Sequence[Sequence[float] | None]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Rows of `first_error_table` with the name of the scores, rows of `selection_table`, and what they are of.

    thresholds: by name of scores, where they were chosen on another file. unscored: answers without scores, which no
    table counts. note: why a table is missing.
    """

    answers: int
    unscored: int
    first_error: list[dict[str, Any]] = field(default_factory=list)
    selection: list[dict[str, Any]] = field(default_factory=list)
    thresholds: dict[str, float] | None = None
    note: str = ""
    curves: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the plots."""
        names = ("answers", "unscored", "note", "thresholds", "first_error", "selection")
        return {name: getattr(self, name) for name in names}


def evaluate_answers(
    answers: Sequence[StoredAnswer],
    scores: Scores,
    *,
    thresholds: dict[str, float] | None = None,
    largest_n: int = 64,
    trials: int = 20,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Judges step scores on all that is known of the answers.

    First errors need step labels, best-of-N, pass@n and votes need outcomes and at least two answers to a question and
    of a policy. scores: per name one sequence of step scores per answer, None where it has none.

    Args:
        thresholds: of `optimal_thresholds` on other questions; None cross-fits them on halves of the questions.
        largest_n: of the powers of two at which answers are chosen. trials: random draws of a vote.
        resamples, seed: of the 95 % intervals by question, of the halves and the draws.

    ValueError where nothing can be judged.
    """
    rows, kept = _scored(answers, scores)
    chains, values = _chains(rows, kept)
    first: list[dict[str, Any]] = []
    note = ""
    try:
        for name, steps in values.items():
            chosen = None if thresholds is None else thresholds[name]
            found = first_error_table(steps, chains, threshold=chosen, resamples=resamples, seed=seed)
            first += [{"scores": name, **row} for row in found]
    except ValueError as error:  # too few questions of one kind to choose a threshold on; outcomes may still be judged
        note = f"first errors are not judged: {error}"
    pools = _pools(rows, kept)
    most = max((len(pool.correct) for pool in pools), default=0)
    ns = [2**i for i in range(16) if 2**i <= min(most, largest_n)]
    selection = selection_table(pools, ns, trials=trials, resamples=resamples, seed=seed) if most > 1 else []
    if not first and not selection:
        raise ValueError(
            f"{len(rows)} scored answers give nothing to judge: {note or 'none has a first error'}; outcomes (correct) "
            "are judged where a question has several answers"
        )
    curves = {"scores": values, "labels": [chain.first_error for chain in chains]} if first else {}
    return Evaluation(len(answers), len(answers) - len(rows), first, selection, thresholds, note, curves)


def optimal_thresholds(answers: Sequence[StoredAnswer], scores: Scores) -> dict[str, float]:
    """The exact `optimal_threshold` of every name of scores on these answers; ValueError where none has a label."""
    chains, values = _chains(*_scored(answers, scores))
    if not chains:
        raise ValueError("a file that chooses thresholds must have answers with a first error, got none")
    labels = [chain.first_error for chain in chains]
    return {name: optimal_threshold(steps, labels) for name, steps in values.items()}


def _scored(
    answers: Sequence[StoredAnswer], scores: Scores
) -> tuple[list[StoredAnswer], dict[str, list[Sequence[float]]]]:
    """Answers that have all scores, and these."""
    rows = [i for i in range(len(answers)) if all(column[i] is not None for column in scores.values())]
    kept = {name: [found for i in rows if (found := column[i]) is not None] for name, column in scores.items()}
    return [answers[i] for i in rows], kept


def _chains(
    answers: Sequence[StoredAnswer], scores: Mapping[str, Sequence[Sequence[float]]]
) -> tuple[list[Chain], dict[str, list[Sequence[float]]]]:
    """Chains with a known first error, their scores, and beside them what the place of a step gives."""
    rows = [i for i, answer in enumerate(answers) if answer.first_error is not None]
    chains = [answers[i].chain() for i in rows]
    if not chains:
        return [], {}
    values = {name: [column[i] for i in rows] for name, column in scores.items()}
    return chains, {**values, BASELINE: [[-float(i) for i in range(len(chain.steps))] for chain in chains]}


def _pools(answers: Sequence[StoredAnswer], scores: Mapping[str, Sequence[Sequence[float]]]) -> list[AnswerPool]:
    """One pool per question and policy, of the answers whose outcome is known.

    Votes need final answers: without that of a right answer there are none.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for i, answer in enumerate(answers):
        if answer.correct is not None:
            groups.setdefault((answer.question_id, answer.policy_id), []).append(i)
    known = all(answer.answer is not None for answer in answers if answer.correct)
    return [
        AnswerPool(
            question,
            tuple(bool(answers[i].correct) for i in rows),
            {
                how if len(scores) == 1 else f"{name} {how}": trajectory_scores([column[i] for i in rows], how)
                for name, column in scores.items()
                for how in AGGREGATIONS
            },
            tuple(answers[i].answer for i in rows) if known else None,
        )
        for (question, _), rows in groups.items()
    ]


def result_tables(found: Evaluation) -> list[Table]:
    """The tables of the console: a row per scores and subset, a row per way of choosing and a column per n."""
    from rich.table import Table

    tables = []
    if found.first_error:
        where = "another file" if found.thresholds is not None else "the other half of the questions"
        table = Table(title=f"first wrong step, threshold from {where}; F1 [95 % interval by question]")
        for name in ("scores", "subset", "chains", "with error", "F1", "acc. error", "acc. correct", "F1, own optimum"):
            table.add_column(name, justify="left" if name in ("scores", "subset") else "right")
        for row in found.first_error:
            shown = [f"{row['chains']}", f"{row['with_error']}", _interval(row["f1"])]
            numbers = (row["accuracy_error"], row["accuracy_correct"], row["same_chains"])
            table.add_row(row["scores"], row["subset"], *shown, *("-" if x is None else f"{x:.3f}" for x in numbers))
        tables.append(table)
    if found.selection:
        ns = list(dict.fromkeys(row["n"] for row in found.selection))
        table = Table(title="questions answered rightly by one of n answers [95 % interval by question]")
        table.add_column("chosen by", no_wrap=True)
        counts = {row["n"]: row["questions"] for row in found.selection}
        for n in ns:
            table.add_column(f"n = {n}\n{counts[n]} questions", justify="right")
        cells = {(row["method"], row["n"]): row for row in found.selection}
        for method in dict.fromkeys(row["method"] for row in found.selection):
            mine = [cells.get((method, n)) for n in ns]
            table.add_row(
                method, *("-" if row is None else _interval((row["value"], row["low"], row["high"])) for row in mine)
            )
        tables.append(table)
    return tables


def save_plots(found: Evaluation, folder: str | os.PathLike[str], *, title: str) -> list[Path]:
    """``first_error.png`` and ``best_of_n.png``, as far as there is something to show; the paths. Needs matplotlib."""
    from prmfast.calibration.plots import save
    from prmfast.evaluation.plots import selection_curves, threshold_curves

    made = []
    if found.first_error:
        made.append(Path(folder) / "first_error.png")
        curves = threshold_curves(found.curves["scores"], found.curves["labels"], title=f"First wrong step, {title}")
        save(curves, made[-1])
    if found.selection:
        made.append(Path(folder) / "best_of_n.png")
        kept = [row for row in found.selection if not row["method"].startswith("vote")]
        save(selection_curves(kept, title=f"Choosing among N answers, {title}"), made[-1])
    return made


def _interval(value: Sequence[float]) -> str:
    return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
