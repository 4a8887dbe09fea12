"""``prmfast evaluate [PRM] FILE``: a file's answers scored, or their stored scores read, and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prmfast._files import write_json
from prmfast.evaluation.answers import StoredAnswer, read_answer_table, read_answers, read_scores
from prmfast.evaluation.report import Evaluation, evaluate_answers, optimal_thresholds, result_tables, save_plots
from prmfast.prm.auto import SAVED_BY_TRAINERS

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

    from prmfast.evaluation.scoring import PRM


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """Options of ``prmfast evaluate`` where it judges step scores.

    threshold_file: chooses the thresholds of first errors, on its questions that FILE has not; None: cross-fitted.
    scores: folder that keeps the PRM's scores. limit: rows of each file.
    question_column, policy_id: see `read_answers`. largest_n, trials, seed: see `evaluate_answers`.
    """

    threshold_file: Path | None = None
    scores: Path | None = None
    question_column: str | None = None
    policy_id: str | None = None
    limit: int | None = None
    largest_n: int = 64
    trials: int = 20
    seed: int = 0


def is_prm(directory: str) -> bool:
    """Whether a name is a PRM's, by what stands in the folder, or by its form, ``owner/name``, where there is none."""
    folder = Path(directory)
    if folder.is_dir():
        return any((folder / name).is_file() for name in ("config.json", *SAVED_BY_TRAINERS))
    return not folder.exists() and directory.count("/") == 1 and not directory.startswith((".", "/"))


def open_prm(name: str, adapter: str | None = None, *, quiet: bool = False) -> PRM:
    """The PRM by folder or hub id, on a GPU if there is one. ImportError without transformers."""
    import importlib.util

    import torch

    if importlib.util.find_spec("transformers") is None:
        raise ImportError('scoring with a PRM needs transformers: pip install "prmfast[hf]"')
    from transformers.utils import logging

    from prmfast.prm import load_prm

    if quiet:
        logging.disable_progress_bar()
    options: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
    return load_prm(name, device="cuda" if torch.cuda.is_available() else "cpu", **options)


def evaluate_file(file: Path, prm: PRM | None, settings: EvaluationSettings, *, progress: bool = True) -> Evaluation:
    """Judges ``prm`` on the answers of a file, or with None the scores that the file carries.

    ValueError for a file that is not as `read_answers` says, without scores where ``prm`` is None, or with nothing to
    judge; see `score_table` for what ``settings.scores`` may raise.
    """
    if prm is None and settings.scores is not None:
        raise ValueError("--scores must come with a PRM: FILE's own scores are not kept a second time")
    answers, scores = _read(file, prm, settings, settings.scores, (), progress)
    thresholds = None
    if settings.threshold_file is not None:
        seen = {answer.question_id for answer in answers}
        thresholds = optimal_thresholds(*_read(settings.threshold_file, prm, settings, None, seen, progress))
    return evaluate_answers(
        answers,
        scores,
        thresholds=thresholds,
        largest_n=settings.largest_n,
        trials=settings.trials,
        seed=settings.seed,
    )


def publish(
    found: Evaluation,
    console: Console,
    file: Path,
    prm_id: str | None,
    *,
    output: Path | None = None,
    plots: Path | None = None,
) -> None:
    """Prints the tables, and writes them as JSON and the plots as PNG where that is asked for."""
    unscored = f", {found.unscored} of them without scores" if found.unscored else ""
    console.print(f"{prm_id or 'stored scores'} on {file}: {found.answers} answers{unscored}", highlight=False)
    for table in result_tables(found):
        console.print(table)
    if found.note:
        console.print(found.note, highlight=False, markup=False)
    if output is not None:
        write_json(output, {"file": str(file), "prm_id": prm_id, **found.to_json()})
    if plots is not None:
        save_plots(found, plots, title=file.stem)


def _read(
    file: Path,
    prm: PRM | None,
    settings: EvaluationSettings,
    folder: Path | None,
    without: Sequence[str] | set[str],
    progress: bool,
) -> tuple[list[StoredAnswer], dict[str, list[Any]]]:
    """Answers and scores of a file, but for the questions ``without``."""
    table: pa.Table = read_answer_table(file, limit=settings.limit)
    answers, rows = read_answers(
        table,
        source=str(file),
        question_column=settings.question_column,
        policy_id=settings.policy_id,
        scored=prm is None,
    )
    kept = [i for i, answer in enumerate(answers) if answer.question_id not in without]
    if not kept:
        raise ValueError(f"{file} must have other questions than those that are judged, got none")
    answers, rows = [answers[i] for i in kept], [rows[i] for i in kept]
    if prm is not None:
        from prmfast.evaluation.scoring import score_table

        table = score_table(prm, table.take(rows), answers, folder=folder, progress=progress)
        rows = list(range(len(answers)))
    return answers, read_scores(table, answers, rows)
