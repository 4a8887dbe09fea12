"""Pools of stored answers from a trace table."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from prmfast.evaluation.best_of_n import AGGREGATIONS, Aggregation, AnswerPool, trajectory_scores
from prmfast.traces import read_traces, validate


def pools_from_traces(
    traces: Any,
    *,
    aggregations: Sequence[Aggregation] = AGGREGATIONS,
    answer: Callable[[str], Hashable | None] | None = None,
    policy_id: str | None = None,
) -> list[AnswerPool]:
    """One `AnswerPool` per question and policy, scored by each of ``aggregations`` over the PRM's step scores.

    traces: a path, or a table as in `prmfast.traces`. Rows of unknown correctness or without step scores are left out.
    answer: the final answer of a completion, None for none; with it, votes can be taken. policy_id: only this policy.
    ValueError where no row is left, or ``answer`` is given and there are no completions.
    """
    if isinstance(traces, (str, os.PathLike)):
        table = read_traces(traces, policy_id=policy_id)
    else:
        table = validate(traces, policy_id=policy_id)
    needed = ["question_id", "policy_id", "correct", "prm_step_scores", *(["completion"] if answer else [])]
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise ValueError(f"traces must have the column {missing[0]}, got {', '.join(table.column_names)}")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table.select(needed).to_pylist():
        wanted = policy_id is None or row["policy_id"] == policy_id
        if wanted and row["correct"] is not None and row["prm_step_scores"] is not None:
            groups.setdefault((row["question_id"], row["policy_id"]), []).append(row)
    if not groups:
        raise ValueError(
            f"traces must have a row with correct and prm_step_scores, got {table.num_rows} rows without"
            f"{'' if policy_id is None else f' of policy {policy_id!r}'}"
        )
    return [
        AnswerPool(
            question,
            tuple(row["correct"] for row in rows),
            {how: trajectory_scores([row["prm_step_scores"] for row in rows], how) for how in aggregations},
            None if answer is None else tuple(answer(row["completion"] or "") for row in rows),
        )
        for (question, _), rows in groups.items()
    ]
