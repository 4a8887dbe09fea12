"""Pools from trace tables: the tiny world's, and real samples with the step scores of a real PRM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prmfast.evaluation import AGGREGATIONS, pools_from_traces, selection_table


def table(**columns: list[object]) -> pa.Table:
    rows = {
        "question_id": ["a", "a", "b", "a"],
        "policy_id": ["p", "p", "p", "q"],
        "correct": [True, False, None, True],
    }
    scores = {"prm_step_scores": [[0.5, 0.25], [0.75], [0.1], None], "completion": ["x=1", "x=2", "x=1", "x=1"]}
    return pa.table(rows | scores | columns)


def test_pools() -> None:
    (pool,) = pools_from_traces(table(), answer=lambda text: text.split("=")[-1])
    assert (pool.question, pool.correct, pool.answers) == ("a", (True, False), ("1", "2"))
    assert {how: values.tolist() for how, values in pool.scores.items()} == {
        "min": [0.25, 0.75],
        "prod": [0.125, 0.75],
        "last": [0.25, 0.75],
        "mean": [0.375, 0.75],
    }
    with pytest.raises(
        ValueError, match=r"traces must have a row with correct and prm_step_scores, got 4 .* policy 'q'"
    ):
        pools_from_traces(table(), policy_id="q")
    with pytest.raises(ValueError, match="traces must have the column completion"):
        pools_from_traces(table().drop(["completion"]), answer=str)


def test_a_real_prm_chooses_better_than_chance(shared_data: Path) -> None:
    """An 8B PRM on answers of Llama-3 models: paired over questions it beats a random one of 4, pass@4 beats it."""
    pools = pools_from_traces(shared_data / "math500_iid_samples.parquet")
    assert set(pools[0].scores) == set(AGGREGATIONS)
    rows = {(row["n"], row["method"]): row for row in selection_table(pools, [1, 4], resamples=500)}
    assert rows[4, "avg"]["over_avg"] == (0.0, 0.0, 0.0)
    for how in AGGREGATIONS:
        value, low, high = rows[4, f"best of n: {how}"]["over_avg"]
        assert 0 < low < value < high < rows[4, "pass@n"]["over_avg"][2]
    at_one = {row["value"] for (n, _), row in rows.items() if n == 1}
    assert np.ptp(list(at_one)) < 1e-12  # with one answer there is nothing to choose
