"""Step scores of stored answers by a PRM, kept in parts on disk where a folder is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prmfast._progress import progress as progress_bar
from prmfast.evaluation.answers import SCORES, StoredAnswer
from prmfast.prm.answers import fingerprint
from prmfast.prm.implicit import ImplicitPRM
from prmfast.prm.transformers_prm import TransformersPRM

if TYPE_CHECKING:
    import pyarrow as pa

PRM = TransformersPRM | ImplicitPRM
_CHUNK = 64  # answers a part


def score_columns(prm: PRM, answers: Sequence[StoredAnswer]) -> dict[str, list[list[float]]]:
    """prm_step_scores of every answer and, of an implicit model, the prefix scores under that name and
    prm_process_scores. An answer whose steps are not known is split as the PRM splits it."""
    questions = [answer.question for answer in answers]
    steps = [prm.split_steps(answer.completion) if answer.steps is None else list(answer.steps) for answer in answers]
    if isinstance(prm, TransformersPRM):
        return {"prm_step_scores": prm.score_steps(questions, steps)}
    ratios = prm.log_ratios(questions, steps)
    return {
        "prm_step_scores": [prm.step_scores(one, "prefix") for one in ratios],
        "prm_process_scores": [prm.step_scores(one, "process") for one in ratios],
    }


def score_table(
    prm: PRM,
    table: pa.Table,
    answers: Sequence[StoredAnswer],
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> pa.Table:
    """``table``, a row per answer, with the columns of `score_columns` in place of any that it had.

    folder: keeps every 64 answers as a part, so that the same call continues after an interruption, and the result as
    ``traces.parquet``; ManifestError for the folder of other rows, another PRM or other weights.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = table.select([name for name in table.column_names if name not in SCORES])
    starts = range(0, table.num_rows, _CHUNK)

    def part(start: int) -> pa.Table:
        rows = table.slice(start, _CHUNK)
        for name, values in score_columns(prm, answers[start : start + _CHUNK]).items():
            rows = rows.append_column(name, pa.array(values, pa.list_(pa.float64())))
        return rows

    if folder is None:
        return pa.concat_tables(_each(starts, part, len(answers), progress))
    from prmfast.pipeline.store import PartStore

    read = {"rows": table.num_rows, "sha256": _digest(answers)}
    pins = {"answers": read, "prm": {"id": prm.prm_id, "weights": mark(prm)}}
    with PartStore(Path(folder), pins, len(starts)).open() as store:
        if not store.complete():
            done = store.done()

            def keep(start: int) -> None:
                if start // _CHUNK not in done:
                    store.write(start // _CHUNK, part(start))

            _each(starts, keep, len(answers), progress)
            store.merge()
        return pq.read_table(store.traces)


def _each(starts: range, work: Callable[[int], Any], total: int, progress: bool) -> list[Any]:
    found = []
    with progress_bar(total, "scoring answers", progress) as bar:
        for start in starts:
            found.append(work(start))
            bar.advance(min(_CHUNK, total - start))
    return found


def mark(prm: PRM) -> str:
    """Hash that tells the weights of one PRM from those of another."""
    parts = (prm.policy, prm.reference) if isinstance(prm, ImplicitPRM) else (prm.model, prm.head)
    return "-".join(fingerprint(part)[:16] for part in parts)


def _digest(answers: Sequence[StoredAnswer]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for answer in answers:
        digest.update(repr((answer.question, answer.completion, answer.steps)).encode())
    return digest.hexdigest()
