from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prmfast.traces import SCHEMA, TraceError, read_traces, validate, write_traces


def table(**columns: Any) -> pa.Table:
    base: dict[str, Any] = {
        "question_id": ["a", "a", "b"],
        "policy_id": ["m", "m", "m"],
        "completion": ["one\n\ntwo", "one", "x\n\ny\n\nz"],
        "prm_step_scores": [[0.5, 0.25], None, [0.9, 0.8, 0.7]],
        "correct": [True, False, None],
    }
    base.update(columns)
    return pa.table({name: value for name, value in base.items() if value is not None})


def test_defaults_are_filled_and_unknown_columns_kept() -> None:
    checked = validate(table(extra=[{"x": 1}, {"x": 2}, {"x": 3}]))
    assert checked.column("steps").to_pylist() == [["one", "two"], None, ["x", "y", "z"]]
    assert checked.column("sample_id").to_pylist() == ["0", "1", "0"]
    assert checked.column("extra").to_pylist() == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert checked.schema.field("prm_step_scores").type == SCHEMA["prm_step_scores"]


def test_validating_twice_changes_nothing() -> None:
    once = validate(table())
    assert validate(once).equals(once)


def test_steps_are_null_where_their_number_disagrees_with_the_scores() -> None:
    checked = validate(table(prm_step_scores=[[0.5], [0.5], None]))
    assert checked.column("steps").to_pylist() == [None, ["one"], None]


def test_aliases() -> None:
    found = validate(table(question_id=None, policy_id=None, qkey=["a", "b", "c"], model=["m", "m", "n"]))
    assert found.column("question_id").to_pylist() == ["a", "b", "c"]
    assert found.column("policy_id").to_pylist() == ["m", "m", "n"]
    both = validate(table(model=["x", "y", "z"]))
    assert both.column("policy_id").to_pylist() == ["m", "m", "m"]
    assert both.column("model").to_pylist() == ["x", "y", "z"]


def test_policy_id_can_be_named_by_the_caller_but_is_not_invented() -> None:
    assert validate(table(policy_id=None), policy_id="llama").column("policy_id").to_pylist() == ["llama"] * 3
    with pytest.raises(TraceError, match=r"policy_id must be a column.*policy_id=.*--policy-id"):
        validate(table(policy_id=None))


def test_numbers_and_text_are_widened_within_their_kind() -> None:
    checked = validate(
        table(
            question_id=pa.array(["a", "a", "b"], pa.large_string()),
            policy_id=pa.array(["m", "m", "m"]).dictionary_encode(),
            prm_step_scores=pa.array([[0.5, 0.25], None, [1, 0, 1]], pa.large_list(pa.float32())),
            correct=pa.array([1, 0, None], pa.int8()),
        )
    )
    assert checked.column("correct").to_pylist() == [True, False, None]
    assert all(checked.schema.field(name).type == SCHEMA[name] for name in ("question_id", "policy_id", "correct"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question_id": None}, r"question_id must be a column, got policy_id, "),
        ({"correct": None}, r"correct must be a column"),
        ({"correct": [1, 0, 2]}, r"row 2: correct must be a boolean or 0 or 1, got 2"),
        ({"correct": ["yes", "no", "no"]}, r"correct must be bool, got string"),
        ({"prm_step_scores": [["a"], None, None]}, r"prm_step_scores must be list<.*double>, got list<.*string>"),
        ({"prm_step_scores": [0.1, 0.2, 0.3]}, r"prm_step_scores must be list<.*double>, got double"),
        ({"question_id": [1, 2, 3]}, r"question_id must be string, got int64"),
        ({"question_id": ["a", None, ""]}, r"(?s)2 problems.*row 1: question_id must be a name, got None.*row 2: .*''"),
        (
            {"prm_step_scores": [[0.5, 1.5], None, [0.1, 0.2, 0.3]]},
            r"row 0: prm_step_scores must lie in \[0, 1\], got 1.5",
        ),
        ({"prm_step_scores": [[0.5, 0.5], None, [0.1, float("nan"), 0.3]]}, r"row 2: prm_step_scores .*got nan"),
        ({"prm_step_scores": [[0.5, None], None, [0.1, 0.2, 0.3]]}, r"row 0: prm_step_scores .*got nan"),
        (
            {"prm_step_scores": [[], None, None]},
            r"row 0: prm_step_scores must hold a step or be null, got an empty list",
        ),
        ({"steps": [["one"], ["one"], ["x", "y", "z"]]}, r"row 0: steps must have one entry per score \(2\), got 1"),
        ({"hidden_states": [[[1.0]], None, None]}, r"row 0: hidden_states must have one entry per score \(2\), got 1"),
        ({"hidden_states": [None, [[1.0]], None]}, r"row 1: hidden_states must have one entry per score \(0\), got 1"),
        (
            {"hidden_states": [[[1.0], [2.0]], None, [[1.0], [1.0, 2.0], [3.0]]]},
            r"row 2: hidden_states must be 1 wide like the first, got 2",
        ),
        (
            {"hidden_states": [[[1.0], [float("inf")]], None, None]},
            r"row 0: hidden_states must be finite, got inf",
        ),
        ({"question_score": [0.5, 0.5, -0.1]}, r"row 2: question_score must lie in \[0, 1\], got -0.1"),
        ({"step_successes": [[1, 1], None, None]}, r"step_trials must come with step_successes, got no such column"),
        (
            {"step_successes": [[1, 9], None, None], "step_trials": [[8, 8], None, None]},
            r"row 0: step_successes must lie in \[0, step_trials\], got 9",
        ),
        (
            {"step_successes": [[1], None, None], "step_trials": [[8, 8], None, None]},
            r"row 0: step_successes must have one entry per score \(2\), got 1",
        ),
        (
            {"step_successes": [[1, 1], None, None], "step_trials": [[8, -1], None, None]},
            r"row 0: step_trials must be at least 0, got -1",
        ),
        (
            {"question_successes": [1, 3, None], "question_trials": [2, 2, None]},
            r"row 1: question_successes must lie in \[0, question_trials\], got 3",
        ),
        (
            {"question_successes": [1, None, None], "question_trials": [2, 2, None]},
            r"row 1: question_successes .*got nan",
        ),
    ],
)
def test_what_breaks_the_schema_is_named_with_its_row(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        validate(table(**columns))


def test_rollouts_need_steps_but_no_scores() -> None:
    counts = {"step_successes": [[1, 2], [3], None], "step_trials": [[4, 4], [4], None]}
    steps = [["one", "two"], ["one"], None]
    for scores in (None, [None, None, None], [None, [0.5], None]):
        checked = validate(table(prm_step_scores=scores, steps=steps, **counts))
        assert checked.column("step_successes").to_pylist() == counts["step_successes"]
    with pytest.raises(TraceError, match="step_trials must come with prm_step_scores or steps, got no such column"):
        validate(table(prm_step_scores=None, **counts))
    with pytest.raises(TraceError, match="hidden_states must come with prm_step_scores, got no such column"):
        validate(table(prm_step_scores=None, steps=steps, hidden_states=[[[0.5], [0.5]], [[0.5]], None]))
    with pytest.raises(TraceError, match=r"row 0: step_trials must have one entry per step \(1\), got 2"):
        validate(table(prm_step_scores=None, steps=[["one"], ["one"], None], **counts))
    wrong = {name: [None, [4, 4], None] for name in counts}
    with pytest.raises(TraceError, match=r"row 1: step_successes must have one entry per score \(1\), got 2"):
        validate(table(prm_step_scores=[None, [0.5], None], steps=[["one", "two"], ["one"], None], **wrong))


def test_at_most_ten_problems_are_shown_in_row_order() -> None:
    rows = 25
    bad = pa.table(
        {
            "question_id": ["q"] * rows,
            "policy_id": ["m"] * rows,
            "correct": [True] * rows,
            "prm_step_scores": [[2.0, 3.0]] * rows,
        }
    )
    with pytest.raises(
        TraceError, match=r"(?s)^25 problems in traces:.*row 0: .*row 9: .*\.\.\. and 15 more$"
    ) as caught:
        validate(bad)
    assert [problem.row for problem in caught.value.problems] == list(range(10))


def test_empty_tables_and_other_kinds() -> None:
    with pytest.raises(TraceError, match="must have at least 1 row, got 0 rows"):
        validate(table().slice(0, 0))
    with pytest.raises(TypeError, match=r"table must be a pyarrow.Table, got dict"):
        validate({"question_id": []})  # type: ignore[arg-type]


def test_sliced_and_chunked_tables_report_the_right_row() -> None:
    bad = table(prm_step_scores=[[0.5, 0.5], None, [0.1, 7.0, 0.3]])
    with pytest.raises(TraceError, match=r"row 1: prm_step_scores .*got 7"):
        validate(bad.slice(1))
    with pytest.raises(TraceError, match=r"row 5: prm_step_scores .*got 7"):
        validate(pa.concat_tables([table(), bad]))


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    path = tmp_path / "traces.parquet"
    path.write_bytes(b"")
    with pytest.raises(TraceError, match=r"traces.parquet:\n  the file must be parquet"):
        read_traces(path)
    path.write_text("question_id,correct\n" * 100)
    with pytest.raises(TraceError, match="must be parquet"):
        read_traces(path)
    with pytest.raises(FileNotFoundError):
        read_traces(tmp_path / "absent.parquet")


def test_write_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "traces.parquet"
    write_traces(table(), path)
    assert read_traces(path).equals(validate(table()))


def test_a_bad_table_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "traces.parquet"
    write_traces(table(), path)
    before = path.read_bytes()
    with pytest.raises(TraceError):
        write_traces(table(correct=["a", "b", "c"]), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_real_traces(shared_data: Path) -> None:
    checked = read_traces(shared_data / "math500_iid_samples.parquet")
    assert checked.num_rows == 5111
    assert {"run", "pred_answer", "n_tokens"} <= set(checked.column_names)
    scored = checked.filter(checked.column("prm_step_scores").is_valid())
    assert scored.num_rows == 919
    assert scored.column("steps").null_count == 0
    assert pq.read_schema(shared_data / "math500_iid_samples.parquet").names[0] == "qkey"
