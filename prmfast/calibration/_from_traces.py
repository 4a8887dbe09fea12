"""From a trace table to rows of calibration data; see `CalibrationData.from_traces` for what the units mean."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prmfast import traces
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.features import FEATURE_NAMES, prefix_features, question_features

Array = npt.NDArray[Any]
Group = tuple[str, str]


@dataclass
class _Rows:
    """Calibration rows as they are collected, one list per field."""

    score: list[Array] = field(default_factory=list)
    features: list[Array] = field(default_factory=list)
    hidden: list[Array | None] = field(default_factory=list)
    successes: list[Array] = field(default_factory=list)
    trials: list[Array] = field(default_factory=list)
    question: list[str] = field(default_factory=list)

    def add(self, features: Array, hidden: Array | None, successes: Array, trials: Array, question: str) -> None:
        kept = trials > 0
        if not kept.any():
            return
        self.score.append(features[kept, 0])
        self.features.append(features[kept])
        self.hidden.append(None if hidden is None else hidden[kept])
        self.successes.append(successes[kept])
        self.trials.append(trials[kept])
        self.question += [question] * int(kept.sum())


def build(
    table: pa.Table | str | os.PathLike[str], unit: str, *, policy_id: str | None, prm_id: str | None
) -> CalibrationData:
    """What `CalibrationData.from_traces` returns."""
    if unit not in ("prefix", "question"):
        raise ValueError(f"unit must be 'prefix' or 'question', got {unit!r}")
    read = traces.validate if isinstance(table, pa.Table) else traces.read_traces
    checked = read(table, policy_id=policy_id)
    if policy_id is not None:
        known = sorted(set(checked.column("policy_id").to_pylist()))
        checked = checked.filter(pc.equal(checked.column("policy_id"), policy_id))
        if checked.num_rows == 0:
            raise ValueError(f"policy_id must be one of {', '.join(known)}, got {policy_id!r}")
    if unit == "prefix":
        rows = _prefixes(checked)
    else:
        has_question = "question_score" in checked.column_names and checked.column("question_score").null_count < len(
            checked
        )
        rows = _questions(checked) if has_question else _pilot(checked)
    if not rows.question:
        raise ValueError(
            f"unit={unit!r} needs rows with a PRM score and a known outcome, got none of {checked.num_rows}"
        )
    return _assemble(rows, checked, prm_id)


def _assemble(rows: _Rows, table: pa.Table, prm_id: str | None) -> CalibrationData:
    have = [part is not None for part in rows.hidden]
    if any(have) and not all(have):
        at = rows.question[int(np.cumsum([0, *map(len, rows.successes)])[have.index(False)])]
        raise ValueError(
            f"hidden states must be there for every scored answer or for none, got {sum(have)} of {len(have)} "
            f"(none for question {at!r})"
        )
    policies = sorted(set(table.column("policy_id").to_pylist()))
    stored = (table.schema.metadata or {}).get(b"prm_id")
    return CalibrationData.from_arrays(
        score=np.concatenate(rows.score),
        features=np.concatenate(rows.features),
        feature_names=FEATURE_NAMES,
        hidden=np.concatenate([part for part in rows.hidden if part is not None]) if all(have) else None,
        successes=np.concatenate(rows.successes),
        trials=np.concatenate(rows.trials),
        question=rows.question,
        prm_id=prm_id if prm_id is not None else (stored.decode() if stored else None),
        policy_id=", ".join(policies),
    )


def _column(table: pa.Table, name: str) -> list[Any]:
    return list(table.column(name).to_pylist()) if name in table.column_names else [None] * table.num_rows


def _list_column(table: pa.Table, name: str) -> list[Array | None]:
    """A numeric list column as one numpy array per row, None for null."""
    if name not in table.column_names:
        return [None] * table.num_rows
    chunk = traces._one_chunk(table, name)
    flat = pc.list_flatten(chunk)
    width = None
    if pa.types.is_list(flat.type):
        lengths = pc.list_value_length(flat)
        width = lengths[0].as_py() if len(lengths) else 0
        flat = pc.list_flatten(flat)
    values = flat.to_numpy(zero_copy_only=False)
    values = values if width is None else values.reshape(-1, width)
    sizes = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(sizes)
    valid = chunk.is_valid().to_numpy(zero_copy_only=False)
    return [values[end - size : end] if ok else None for end, size, ok in zip(ends, sizes, valid, strict=True)]


def _prefixes(table: pa.Table) -> _Rows:
    rows = _Rows()
    scores = _list_column(table, "prm_step_scores")
    hidden = _list_column(table, "hidden_states")
    successes, trials = _list_column(table, "step_successes"), _list_column(table, "step_trials")
    correct, question = _column(table, "correct"), _column(table, "question_id")
    for i, values in enumerate(scores):
        if values is None or not len(values):
            continue
        k, n = successes[i], trials[i]
        if k is None or n is None:
            known = correct[i] is not None
            n = np.full(len(values), int(known), dtype=np.int64)
            k = np.full(len(values), int(bool(correct[i])), dtype=np.int64)
        rows.add(prefix_features(values), hidden[i], k, n, question[i])
    return rows


def _groups(table: pa.Table) -> list[Group]:
    return list(zip(_column(table, "question_id"), _column(table, "policy_id"), strict=True))


def _outcomes(table: pa.Table) -> dict[Group, tuple[int, int]]:
    """(k, n) over all samples with a known outcome, by question and policy."""
    total: dict[Group, tuple[int, int]] = {}
    for group, correct in zip(_groups(table), _column(table, "correct"), strict=True):
        if correct is not None:
            k, n = total.get(group, (0, 0))
            total[group] = (k + int(correct), n + 1)
    return total


def _questions(table: pa.Table) -> _Rows:
    rows = _Rows()
    score, hidden = _column(table, "question_score"), _list_column(table, "question_hidden")
    successes, trials = _column(table, "question_successes"), _column(table, "question_trials")
    outcomes, groups = _outcomes(table), _groups(table)
    first: dict[Group, int] = {}
    for i, group in enumerate(groups):
        if score[i] is None:
            continue
        seen = first.setdefault(group, i)
        for name, values in (("question_score", score), ("question_successes", successes), ("question_trials", trials)):
            if values[i] != values[seen]:
                problem = traces.Problem(
                    i, name, f"be that of row {seen}, the same question and policy", str(values[i])
                )
                raise traces.TraceError([problem])
    without = len(set(groups)) - len(first)
    if without:
        warnings.warn(
            f"{without} of {len(set(groups))} questions have no question_score and are left out", stacklevel=4
        )
    for group, i in first.items():
        k, n = (successes[i], trials[i]) if trials[i] else outcomes.get(group, (0, 0))
        state = hidden[i]
        rows.add(
            question_features([score[i]]),
            None if state is None else state[None, :],
            np.array([k]),
            np.array([n]),
            group[0],
        )
    return rows


def _pilot(table: pa.Table) -> _Rows:
    rows = _Rows()
    scores, hidden = _list_column(table, "prm_step_scores"), _list_column(table, "hidden_states")
    correct, outcomes = _column(table, "correct"), _outcomes(table)
    for i, group in enumerate(_groups(table)):
        values, states = scores[i], hidden[i]
        if values is None or not len(values):
            continue
        k, n = outcomes.get(group, (0, 0))
        if correct[i] is not None:
            k, n = k - int(correct[i]), n - 1
        last = None if states is None else states[-1:]
        rows.add(prefix_features(values)[-1:], last, np.array([k]), np.array([n]), group[0])
    return rows
