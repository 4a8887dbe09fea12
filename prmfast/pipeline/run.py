"""From questions to one trace table on disk, chunk by chunk, in any number of runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prmfast._progress import progress as progress_bar
from prmfast.pipeline.labeller import Labeller, question_table
from prmfast.pipeline.labels import Chain, exhaustive_rollouts
from prmfast.pipeline.store import PartStore

if TYPE_CHECKING:
    from prmfast.calibration.data import CalibrationData, Unit


@dataclass(frozen=True, slots=True)
class LabelRun:
    """A complete run: where its traces lie, and what it cost.

    ``rollouts`` of prefixes were drawn where labelling every step takes ``exhaustive``, and ``question_rollouts`` of
    empty answers beside them; ``resumed`` chunks had been done before this call.
    """

    traces: Path
    questions: int
    answers: int
    rollouts: int
    exhaustive: int
    question_rollouts: int
    chunks: int
    resumed: int

    @property
    def saved(self) -> float:
        """Share of the exhaustive rollouts that the search did without."""
        return 1 - self.rollouts / self.exhaustive if self.exhaustive else 0.0

    def table(self) -> pa.Table:
        """The trace table; see ``prmfast.traces`` and `Labeller`."""
        return pq.read_table(self.traces)

    def data(self, unit: Unit = "prefix") -> CalibrationData:
        """Rows to fit calibrators on: ``CalibrationData.from_traces``."""
        from prmfast.calibration.data import CalibrationData

        return CalibrationData.from_traces(self.table(), unit=unit)


def label_questions(
    questions: Sequence[str] | pa.Table,
    directory: str | os.PathLike[str],
    labeller: Labeller,
    *,
    chunk_size: int = 16,
    progress: bool = True,
) -> LabelRun:
    """Labels ``questions`` into ``directory/traces.parquet``; the same call continues what was interrupted.

    The folder's manifest pins the questions, policy, PRM, verifier, splitter, settings and chunk size; a call that
    differs in one of them raises ManifestError. A finished chunk is one file of ``directory/parts`` and is never done
    again, unless it was damaged; once ``traces.parquet`` is there, ``parts`` may be removed.

    Args:
        questions: texts, or a table with question and perhaps question_id and prompt; see `question_table`.
        directory: made if absent; empty or of the same run.
        labeller: what is done with each chunk.
        chunk_size: questions a part; all samples and rollouts of a chunk are drawn together.
        progress: shows a bar in questions.
    """
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size must be an int, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    table = question_table(questions)
    starts = range(0, table.num_rows, chunk_size)
    inputs = {"questions": table.num_rows, "sha256": _digest(table)}
    pins = {"inputs": inputs, **labeller.identity, "chunk_size": chunk_size}
    with PartStore(directory, pins, len(starts)).open() as store:
        if store.complete():
            return _result(store, table.num_rows, store.chunks)
        done = store.done()
        with progress_bar(table.num_rows, "labels", progress) as bar:
            for chunk, start in enumerate(starts):
                rows = table.slice(start, chunk_size)
                if chunk not in done:
                    store.write(chunk, labeller(rows))
                bar.advance(rows.num_rows)
        store.merge()
        return _result(store, table.num_rows, len(done))


def _digest(table: pa.Table) -> str:
    rows: list[Any] = [table.column(name).to_pylist() for name in table.column_names]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _result(store: PartStore, questions: int, resumed: int) -> LabelRun:
    names = pq.read_schema(store.traces).names
    labelled = "rollouts" in names
    wanted = ["sample_id", *(("rollouts", "step_trials", "question_trials") if labelled else ())]
    table = pq.read_table(store.traces, columns=wanted)
    drawn = exhaustive = at_questions = 0
    if labelled:
        settings = store.manifest["settings"]
        drawn = pc.sum(table.column("rollouts")).as_py()
        at_questions = settings["rollouts"] * questions
        steps = pc.list_value_length(table.column("step_trials")).to_pylist()
        exhaustive = sum(exhaustive_rollouts(Chain(n, False), settings["rollouts"]) for n in steps)
    return LabelRun(
        traces=store.traces,
        questions=questions,
        answers=table.num_rows,
        rollouts=drawn,
        exhaustive=exhaustive,
        question_rollouts=at_questions,
        chunks=store.chunks,
        resumed=resumed,
    )
