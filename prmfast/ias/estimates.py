"""Question-level estimates beside the stored samples that they are to be spent on: what `replay` needs from traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prmfast.calibration.base import Calibrator
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.study import Study, midpoint_levels
from prmfast.ias._pool import ReplayPool

if TYPE_CHECKING:
    import pyarrow as pa

LEVELS = 100
_NOTHING = "no question has both a PRM score and another sample with a known outcome to spend it on"


@dataclass(frozen=True)
class QuestionEstimates:
    """Row i of ``pool`` is to be judged by row i of ``data``.

    ``pilot``: the empty answer was not scored, so the first scored sample of each question speaks for it; that sample
    is not part of the pool, and every method pays for it alike.
    """

    data: CalibrationData
    pool: ReplayPool
    pilot: bool

    def budgets(self, calibrators: Mapping[str, Calibrator], levels: int = LEVELS) -> dict[str, Tensor]:
        """What `replay` takes, by method: quantiles [Q, levels] at the midpoint levels that eq. 5 averages over."""
        at = midpoint_levels(levels)
        return {name: calibrator.quantile(self.data, at) for name, calibrator in calibrators.items()}

    def select(self, rows: Sequence[int]) -> QuestionEstimates:
        """The given rows."""
        return QuestionEstimates(self.data.select(rows), _pool_rows(self.pool, rows), self.pilot)

    def unseen(self, study: Study) -> QuestionEstimates:
        """The rows of questions that ``study`` was not fitted on; ValueError where none is left."""
        kept = set(study.unseen(self.data).question)
        return self.select([row for row, question in enumerate(self.data.question) if question in kept])

    @classmethod
    def from_traces(cls, table: pa.Table, *, policy_id: str | None = None) -> QuestionEstimates:
        """Pairs estimates and pools by question and policy; what has no estimate or no other sample is left out.

        ``policy_id``: this policy's answers only. ValueError where nothing is left.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        from prmfast.traces import validate

        table = validate(table, policy_id=policy_id)
        if policy_id is not None:
            known = sorted(set(table["policy_id"].to_pylist()))
            if policy_id not in known:
                raise ValueError(f"policy_id must be one of {', '.join(known)}, got {policy_id!r}")
            table = table.filter(pc.equal(table["policy_id"], policy_id))
        pilot = "question_score" not in table.column_names or table["question_score"].null_count == table.num_rows
        groups = list(zip(table["question_id"].to_pylist(), table["policy_id"].to_pylist(), strict=True))
        pilots = _first_scored(table, groups) if pilot else {}
        kept = [pilots.get(group) != row for row, group in enumerate(groups)]
        if not any(kept):
            raise ValueError(_NOTHING)
        pool = ReplayPool.from_table(table.filter(pa.array(kept)))
        rows = {group: i for i, group in enumerate(zip(pool.question, pool.policy, strict=True))}
        parts: list[CalibrationData] = []
        order: list[int] = []
        for policy in sorted(set(pool.policy)):
            mine = table.filter(pc.equal(table["policy_id"], policy))
            if not pilot and mine["question_score"].null_count == mine.num_rows:
                continue  # its finished samples are all in the pool: none may speak for it
            data = _one_row_a_question(mine)
            if data is None:
                continue
            with_pool = [i for i, question in enumerate(data.question) if (question, policy) in rows]
            parts.append(data.select(torch.tensor(with_pool, dtype=torch.int64)))
            order += [rows[(data.question[i], policy)] for i in with_pool]
        if not order:
            raise ValueError(_NOTHING)
        return cls(CalibrationData.concat(parts), _pool_rows(pool, order), pilot)


def _first_scored(table: pa.Table, groups: list[tuple[str, str]]) -> dict[tuple[str, str], int]:
    if "prm_step_scores" not in table.column_names:
        return {}
    scored = [bool(scores) for scores in table["prm_step_scores"].to_pylist()]
    first: dict[tuple[str, str], int] = {}
    for row, group in enumerate(groups):
        if scored[row]:
            first.setdefault(group, row)
    return first


def _one_row_a_question(table: pa.Table) -> CalibrationData | None:
    try:
        data = CalibrationData.from_traces(table, unit="question")
    except ValueError as error:
        if "needs rows with a PRM score" in str(error):
            return None
        raise
    first = {question: row for row, question in reversed(list(enumerate(data.question)))}
    return data.select(torch.tensor(sorted(first.values()), dtype=torch.int64))


def _pool_rows(pool: ReplayPool, rows: Sequence[int]) -> ReplayPool:
    index = torch.tensor(list(rows), dtype=torch.int64)
    return ReplayPool(
        tuple(pool.question[i] for i in rows),
        tuple(pool.policy[i] for i in rows),
        pool.size[index],
        pool.correct[index],
        None if pool.score is None else pool.score[index],
    )
