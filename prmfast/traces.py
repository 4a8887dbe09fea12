"""Traces: a parquet table with one row per sampled answer, its step scores and what is known of its correctness.

| column | type | meaning |
| --- | --- | --- |
| question_id* | string | the same for every sample of a question |
| question | string | its text |
| policy_id* | string | the model (and settings) that answered |
| sample_id | string | numbered within question and policy if absent |
| completion | string | the answer |
| steps | list<string> | ``completion.split("\\n\\n")`` if absent and as many as there are scores |
| prm_step_scores | list<double> | PRM score after each step, in [0, 1]; null: not scored; empty where steps are |
| correct* | bool | null: unknown |
| hidden_states | list<list<float>> | the PRM's hidden state at each step |
| question_score | double | PRM score of the empty answer, in [0, 1] |
| question_hidden | list<float> | PRM hidden state of the empty answer |
| step_successes, step_trials | list<int64> | Monte-Carlo rollouts from each step's prefix: k of n, 0 of 0 if unknown |
| question_successes, question_trials | int64 | rollouts of the empty answer: k of n |

``*`` required. ``qkey`` is read as question_id and ``model`` as policy_id. Unknown columns are kept as they are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prmfast._files import atomic_path

__all__ = ["ALIASES", "SCHEMA", "Problem", "TraceError", "read_traces", "validate", "write_traces"]

SCHEMA: dict[str, Any] = {
    "question_id": pa.string(),
    "question": pa.string(),
    "policy_id": pa.string(),
    "sample_id": pa.string(),
    "completion": pa.string(),
    "steps": pa.list_(pa.string()),
    "prm_step_scores": pa.list_(pa.float64()),
    "correct": pa.bool_(),
    "hidden_states": pa.list_(pa.list_(pa.float32())),
    "question_score": pa.float64(),
    "question_hidden": pa.list_(pa.float32()),
    "step_successes": pa.list_(pa.int64()),
    "step_trials": pa.list_(pa.int64()),
    "question_successes": pa.int64(),
    "question_trials": pa.int64(),
}
ALIASES = {"qkey": "question_id", "model": "policy_id"}
_REQUIRED = ("question_id", "policy_id", "correct")
_SHOWN = 10

Mask = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule: row number from 0 (None: the whole column), column, rule and the value found."""

    row: int | None
    column: str
    rule: str
    value: str

    def __str__(self) -> str:
        where = "" if self.row is None else f"row {self.row}: "
        return f"{where}{self.column} must {self.rule}, got {self.value}"


class TraceError(ValueError):
    """A trace table breaks its schema; ``problems`` holds the first ten broken rules, the message shows them."""

    def __init__(self, problems: list[Problem], total: int | None = None, source: str = "traces") -> None:
        self.problems = tuple(problems[:_SHOWN])
        count = len(problems) if total is None else total
        more = f"\n  ... and {count - len(self.problems)} more" if count > len(self.problems) else ""
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{count} problem{'s' * (count != 1)} in {source}:{lines}{more}")


def read_traces(path: str | os.PathLike[str], *, policy_id: str | None = None) -> pa.Table:
    """The validated trace table of a parquet file, see `validate`. TraceError or FileNotFoundError."""
    try:
        table = pq.read_table(os.fspath(path))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise TraceError(
            [Problem(None, "the file", "be parquet", str(error).split("\n")[0])], source=str(path)
        ) from error
    return validate(table, policy_id=policy_id, source=str(path))


def write_traces(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Validates ``table`` and writes it as zstd parquet, atomically: a reader sees all of it or nothing."""
    checked = validate(table)
    with atomic_path(path) as temporary:
        pq.write_table(checked, temporary, compression="zstd")


def validate(table: pa.Table, *, policy_id: str | None = None, source: str = "traces") -> pa.Table:
    """The table with canonical names and types, defaults filled in and every rule of the schema checked.

    ``policy_id`` names the policy of a table that has no such column. TypeError for another kind than a table,
    TraceError with row, column, rule and value of up to ten problems. Validating twice changes nothing.
    """
    if not isinstance(table, pa.Table):
        raise TypeError(f"table must be a pyarrow.Table, got {type(table).__name__}")
    metadata = table.schema.metadata
    table = _canonical_names(table, policy_id, source)
    if table.num_rows == 0:
        raise TraceError([Problem(None, "the table", "have at least 1 row", "0 rows")], source=source)
    table = _cast(table, source)
    problems = _problems(table)
    if problems:
        problems.sort(key=lambda problem: -1 if problem.row is None else problem.row)
        raise TraceError(problems, source=source)
    return _with_defaults(table).replace_schema_metadata(metadata)


def _canonical_names(table: pa.Table, policy_id: str | None, source: str) -> pa.Table:
    names = list(table.column_names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TraceError(
            [Problem(None, name, "appear once", f"{names.count(name)} columns") for name in twice], source=source
        )
    renamed = [ALIASES[name] if name in ALIASES and ALIASES[name] not in names else name for name in names]
    table = table.rename_columns(renamed)
    if policy_id is not None and "policy_id" not in renamed:
        table = table.append_column("policy_id", pa.array([policy_id] * table.num_rows, pa.string()))
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        has = ", ".join(names) or "no columns"
        hint = {"policy_id": "; name the policy with policy_id=... (command line: --policy-id)"}
        found = [Problem(None, name, "be a column", f"{has}{hint.get(name, '')}") for name in missing]
        raise TraceError(found, source=source)
    return table


def _cast(table: pa.Table, source: str) -> pa.Table:
    problems = []
    for index, name in enumerate(table.column_names):
        wanted = SCHEMA.get(name)
        column = table.column(index)
        if wanted is None or column.type == wanted:
            continue
        try:
            if not _may_cast(column.type, wanted):
                raise pa.ArrowInvalid("another kind")
            if pa.types.is_boolean(wanted):
                problems += _not_zero_or_one(name, column)
            table = table.set_column(index, name, column.cast(wanted))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            detail = "" if str(error) == "another kind" else f" ({str(error).splitlines()[0]})"
            problems.append(Problem(None, name, f"be {wanted}", f"{column.type}{detail}"))
    if problems:
        raise TraceError(problems, source=source)
    return table


def _not_zero_or_one(name: str, column: Any) -> list[Problem]:
    values = column.to_pylist()
    return [Problem(i, name, "be a boolean or 0 or 1", str(v)) for i, v in enumerate(values) if v not in (None, 0, 1)]


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _may_cast(found: Any, wanted: Any) -> bool:
    """Widening within a kind only: text to text, integers to integers or floats, 0/1 to bool; never text to numbers."""
    types = pa.types
    if types.is_null(found):
        return True
    if types.is_dictionary(found):
        return _may_cast(found.value_type, wanted)
    if _is_list(wanted):
        return _is_list(found) and _may_cast(found.value_type, wanted.value_type)
    if types.is_string(wanted):
        return bool(types.is_string(found) or types.is_large_string(found) or types.is_string_view(found))
    if types.is_floating(wanted):
        return bool(types.is_floating(found) or types.is_integer(found))
    return bool(types.is_integer(found)) if types.is_integer(wanted) or types.is_boolean(wanted) else False


class _Lists:
    """One list column as flat values: ``lengths`` (-1 for null), ``values`` and the row of each value."""

    def __init__(self, table: pa.Table, name: str) -> None:
        chunk = _one_chunk(table, name)
        lengths = pc.fill_null(pc.list_value_length(chunk), -1)
        self.lengths: Array = lengths.to_numpy(zero_copy_only=False)
        self.flat = pc.list_flatten(chunk)
        self.rows: Array = np.repeat(np.arange(len(chunk)), np.maximum(self.lengths, 0))


def _one_chunk(table: pa.Table, name: str) -> Any:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _numbers(array: Any) -> Array:
    """Values of an arrow array as numpy, nulls as NaN."""
    if array.null_count == 0:
        return np.asarray(array.to_numpy(zero_copy_only=False))
    return np.asarray(array.cast(pa.float64()).to_numpy(zero_copy_only=False))


def _problems(table: pa.Table) -> list[Problem]:
    names = set(table.column_names)
    found: list[Problem] = []
    for name in _REQUIRED[:2]:
        column = _one_chunk(table, name)
        empty = pc.fill_null(pc.equal(pc.utf8_length(column), 0), True).to_numpy(zero_copy_only=False)
        found += [Problem(int(row), name, "be a name", repr(column[int(row)].as_py())) for row in np.flatnonzero(empty)]
    lists = {name: _Lists(table, name) for name, kind in SCHEMA.items() if name in names and _is_list(kind)}
    found += _scores(table, names, lists)
    for name in ("hidden_states", "question_hidden"):
        if name in lists:
            found += _hidden(name, lists[name])
    found += _lengths(lists)
    found += _counts(table, names, lists)
    return found


def _scores(table: pa.Table, names: set[str], lists: dict[str, _Lists]) -> list[Problem]:
    found: list[Problem] = []
    if "prm_step_scores" in lists:
        column = lists["prm_step_scores"]
        values = _numbers(column.flat)
        bad = ~((values >= 0) & (values <= 1))
        found += _each("prm_step_scores", "lie in [0, 1]", column.rows[bad], values[bad])
        empty = column.lengths == 0
        if "steps" in lists:  # a scored answer may have no step; then its steps say so too
            empty = empty & (lists["steps"].lengths != 0)
        found += [
            Problem(int(row), "prm_step_scores", "hold a step or be null", "an empty list")
            for row in np.flatnonzero(empty)
        ]
    if "question_score" in names:
        array = _one_chunk(table, "question_score")
        present = array.is_valid().to_numpy(zero_copy_only=False)
        values = _numbers(array)
        bad = present & ~((values >= 0) & (values <= 1))
        found += _each("question_score", "lie in [0, 1]", np.flatnonzero(bad), values[bad])
    return found


def _each(name: str, rule: str, rows: Array, values: Array) -> list[Problem]:
    """At most one problem per row: a row of 3,584 NaN is one bad row."""
    kept, first = np.unique(rows, return_index=True)
    return [Problem(int(row), name, rule, f"{values[at]:g}") for row, at in zip(kept, first, strict=True)]


def _hidden(name: str, column: _Lists) -> list[Problem]:
    if name == "question_hidden":
        values, value_rows = _numbers(column.flat), column.rows
        widths, width_rows = column.lengths[column.lengths >= 0], np.flatnonzero(column.lengths >= 0)
    else:
        widths = pc.fill_null(pc.list_value_length(column.flat), 0).to_numpy(zero_copy_only=False)
        width_rows = column.rows
        values, value_rows = _numbers(pc.list_flatten(column.flat)), np.repeat(column.rows, widths)
    bad = ~np.isfinite(values)
    found = _each(name, "be finite", value_rows[bad], values[bad])
    if len(widths):
        wanted = int(widths[0])
        other = widths != wanted
        found += _each(name, f"be {wanted} wide like the first", width_rows[other], widths[other])
    return found


def _lengths(lists: dict[str, _Lists]) -> list[Problem]:
    found: list[Problem] = []
    for name in ("steps", "hidden_states", "step_successes", "step_trials"):
        # Rollouts need no PRM: where there are no scores, they go by the steps.
        guides = ("prm_step_scores", "steps") if name in ("step_successes", "step_trials") else ("prm_step_scores",)
        known = [guide for guide in guides if guide in lists]
        if name not in lists or (name == "steps" and not known):
            continue
        if not known:
            found.append(Problem(None, name, f"come with {' or '.join(guides)}", "no such column"))
            continue
        wanted = lists[known[0]].lengths
        if len(known) == 2:
            wanted = np.where(wanted >= 0, wanted, lists[known[1]].lengths)
        lengths = lists[name].lengths
        scored = (lengths >= 0) & ((wanted >= 0) | (name != "steps"))
        for row in np.flatnonzero(scored & (lengths != wanted)):
            rule = f"have one entry per {'step' if known[0] == 'steps' else 'score'} ({max(int(wanted[row]), 0)})"
            found.append(Problem(int(row), name, rule, str(lengths[row])))
    return found


def _counts(table: pa.Table, names: set[str], lists: dict[str, _Lists]) -> list[Problem]:
    found: list[Problem] = []
    for prefix in ("step", "question"):
        k_name, n_name = f"{prefix}_successes", f"{prefix}_trials"
        present = [name for name in (k_name, n_name) if name in names]
        if len(present) == 1:
            other = n_name if present[0] == k_name else k_name
            found.append(Problem(None, other, f"come with {present[0]}", "no such column"))
        if len(present) < 2:
            continue
        if prefix == "step":
            if not np.array_equal(lists[k_name].lengths, lists[n_name].lengths):
                rows = np.flatnonzero(lists[k_name].lengths != lists[n_name].lengths)
                found += [
                    Problem(int(row), k_name, f"be as long as {n_name} ({lists[n_name].lengths[row]})",
                            str(lists[k_name].lengths[row])) for row in rows
                ]  # fmt: skip
                continue
            k, n, rows = _numbers(lists[k_name].flat), _numbers(lists[n_name].flat), lists[k_name].rows
        else:
            k_array, n_array = _one_chunk(table, k_name), _one_chunk(table, n_name)
            either = (k_array.is_valid().to_numpy(zero_copy_only=False)
                      | n_array.is_valid().to_numpy(zero_copy_only=False))  # fmt: skip
            rows = np.flatnonzero(either)
            k, n = _numbers(k_array)[rows], _numbers(n_array)[rows]
        bad_n = ~(n >= 0)
        found += _each(n_name, "be at least 0", rows[bad_n], n[bad_n])
        bad_k = ~bad_n & ~((k >= 0) & (k <= n))
        found += _each(k_name, f"lie in [0, {n_name}]", rows[bad_k], k[bad_k])
    return found


def _with_defaults(table: pa.Table) -> pa.Table:
    names = table.column_names
    if "sample_id" not in names:
        table = table.append_column("sample_id", _sample_ids(table))
    if "steps" not in names and "completion" in names and "prm_step_scores" in names:
        lengths = _Lists(table, "prm_step_scores").lengths
        split = pc.split_pattern(_one_chunk(table, "completion"), "\n\n")
        agrees = pc.fill_null(pc.equal(pc.list_value_length(split), pa.array(lengths, pa.int32())), False)
        table = table.append_column("steps", pc.if_else(agrees, split, pa.scalar(None, split.type)))
    return table


def _sample_ids(table: pa.Table) -> Any:
    count: dict[tuple[str, str], int] = {}
    ids = []
    for key in zip(table.column("question_id").to_pylist(), table.column("policy_id").to_pylist(), strict=True):
        ids.append(str(count.get(key, 0)))
        count[key] = count.get(key, 0) + 1
    return pa.array(ids, pa.string())
