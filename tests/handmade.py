"""Traces of a Bernoulli world with known success probabilities and an overconfident PRM: small, made in no time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from prmfast.traces import SCHEMA, validate


def traces(
    questions: int,
    samples: int = 4,
    *,
    policies: Sequence[str] = ("small",),
    question_score: bool = True,
    hidden: bool = False,
    rollouts: int = 0,
    seed: int = 0,
) -> pa.Table:
    """``samples`` answers of every policy to every question; scores are about p^(1/4)."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    for number in range(questions):
        for policy in policies:
            p = rng.beta(1.5, 1.5)
            empty: dict[str, object] = {}
            if question_score:
                empty = {"question_score": p**0.25}
                if hidden:
                    empty["question_hidden"] = [p, rng.normal()]
                if rollouts:
                    empty |= {"question_successes": int(rng.binomial(rollouts, p)), "question_trials": rollouts}
            for _ in range(samples):
                correct, steps = bool(rng.random() < p), int(rng.integers(1, 4))
                row = {
                    "question_id": f"q{number:03d}",
                    "question": f"question {number}",
                    "policy_id": policy,
                    "completion": "\n\n".join(f"step {t}" for t in range(steps)),
                    "prm_step_scores": list(np.clip(p**0.25 + 0.05 * rng.normal(size=steps) + 0.05 * correct, 0, 1)),
                    "correct": correct,
                    **empty,
                }
                if hidden:
                    row["hidden_states"] = [[p, rng.normal()] for _ in range(steps)]
                if rollouts:
                    row["step_successes"] = [int(rng.binomial(rollouts, p)) for _ in range(steps)]
                    row["step_trials"] = [rollouts] * steps
                rows.append(row)
    return validate(pa.table({name: pa.array([row[name] for row in rows], SCHEMA[name]) for name in rows[0]}))


def with_column(table: pa.Table, name: str, values: Sequence[object]) -> pa.Table:
    """``table`` with one column replaced, in the schema's own type."""
    return table.set_column(table.column_names.index(name), name, pa.array(values, SCHEMA[name]))
