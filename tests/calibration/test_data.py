from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prmfast.calibration import CalibrationData
from prmfast.calibration.features import FEATURE_NAMES, SCORE_FEATURE_NAMES, prefix_features, question_features
from prmfast.traces import TraceError


def arrays(rows: int = 12, **columns: Any) -> CalibrationData:
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {
        "score": rng.random(rows),
        "successes": rng.integers(0, 5, rows),
        "trials": np.full(rows, 4),
        "question": [f"q{i % 5}" for i in range(rows)],
    }
    given.update(columns)
    return CalibrationData.from_arrays(**given)


def test_defaults() -> None:
    data = CalibrationData.from_arrays(score=[0.1, 0.9], successes=[True, False])
    assert data.trials.tolist() == [1, 1]
    assert data.target.tolist() == [1.0, 0.0]
    assert len(set(data.question)) == 2
    assert data.feature_names == SCORE_FEATURE_NAMES
    assert data.features.shape == (2, 2)
    assert data.hidden is None


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (
            {"score": [0.5] * 11 + [1.2]},
            ValueError,
            r"score must lie in \[0, 1\], got 1.2\d* at row 11 \(1 such rows\)",
        ),
        (
            {"score": [0.5] * 3 + [float("nan")] * 9},
            ValueError,
            r"score must lie in \[0, 1\], got nan at row 3 \(9 such",
        ),
        ({"score": np.zeros((12, 1))}, ValueError, r"score must have shape \(N,\), got \(12, 1\)"),
        ({"score": ["a"] * 12}, TypeError, r"score must be a rectangular array of floats, got list"),
        ({"score": [0.5] * 11}, ValueError, r"score must have shape \(12,\), got \(11,\)"),
        ({"successes": np.full(12, 5)}, ValueError, r"successes must be at most trials, got 5 at row 0"),
        ({"successes": np.full(12, -1)}, ValueError, r"successes must be at least 0, got -1 at row 0"),
        ({"successes": np.full(12, 0.5)}, TypeError, r"successes must be integers \(or booleans\), got torch.float64"),
        ({"trials": [4] * 7 + [0] + [4] * 4}, ValueError, r"trials must be at least 1, got 0 at row 7"),
        ({"trials": [4] * 11}, ValueError, r"trials must have shape \(12,\), got \(11,\)"),
        ({"hidden": np.zeros((11, 3))}, ValueError, r"hidden must have shape \(12, width\), got \(11, 3\)"),
        ({"hidden": np.full((12, 3), np.inf)}, ValueError, r"hidden must be finite, got inf at row 0, column 0"),
        ({"hidden": [[1.0], [1.0, 2.0]]}, TypeError, r"hidden must be a rectangular array"),
        ({"features": np.zeros(12)}, ValueError, r"features must have shape \(12, width\), got \(12,\)"),
        (
            {"features": np.zeros((12, 2)), "feature_names": ["a"]},
            ValueError,
            r"feature_names must name 2 features, got 1",
        ),
        ({"feature_names": ["a"]}, ValueError, r"feature_names needs features, got features=None"),
        (
            {"score": [], "successes": np.zeros(0, dtype=int), "trials": None, "question": []},
            ValueError,
            r"data must have at least 1 row, got 0",
        ),
    ],
)
def test_bad_arrays(columns: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        arrays(**columns)


def test_wrong_dtype_of_the_dataclass_itself() -> None:
    data = arrays()
    with pytest.raises(TypeError, match=r"score must be torch.float32, got torch.float64"):
        CalibrationData(
            score=data.score.double(),
            features=data.features,
            hidden=None,
            successes=data.successes,
            trials=data.trials,
            question=data.question,
            feature_names=data.feature_names,
        )


def test_tensors_on_different_devices() -> None:
    data = arrays(hidden=np.zeros((12, 2)))
    with pytest.raises(ValueError, match=r"hidden must be on cpu like score, got meta"):
        CalibrationData(
            score=data.score,
            features=data.features,
            hidden=torch.zeros(12, 2, device="meta"),
            successes=data.successes,
            trials=data.trials,
            question=data.question,
            feature_names=data.feature_names,
        )


def test_select_takes_indices_masks_and_slices() -> None:
    data = arrays(hidden=np.random.default_rng(1).random((12, 3)))
    by_list, by_mask = data.select([3, 1]), data.select(torch.arange(12) == 3)
    assert by_list.question == (data.question[3], data.question[1])
    assert by_list.hidden is not None
    assert data.hidden is not None
    assert torch.equal(by_list.hidden, data.hidden[[3, 1]])
    assert torch.equal(by_mask.score, data.score[3:4])
    assert data.select(slice(0, 4)).question == data.question[:4]


def test_split_is_by_question_and_is_the_papers() -> None:
    from sklearn.model_selection import GroupShuffleSplit

    data = arrays(40, question=[f"q{i % 9}" for i in range(40)])
    train, test = data.split()
    assert not set(train.question) & set(test.question)
    wanted = next(GroupShuffleSplit(test_size=0.2, random_state=42).split(data.question, groups=data.question))
    assert torch.equal(test.score, data.score[torch.from_numpy(wanted[1])])
    with pytest.raises(ValueError, match="at least 2 questions, got 1"):
        arrays(question=["q"] * 12).split()


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=6, max_size=60).filter(lambda ids: len(set(ids)) >= 3), st.integers(0, 5))
def test_folds_cover_every_row_once_and_share_no_question(ids: list[int], seed: int) -> None:
    data = arrays(len(ids), question=[str(i) for i in ids])
    tested = []
    for train, test in data.fold_indices(3, seed):
        assert not {ids[i] for i in train} & {ids[i] for i in test}
        assert len(train) + len(test) == len(ids)
        tested += test.tolist()
    assert sorted(tested) == list(range(len(ids)))


def test_folds_do_not_depend_on_row_order() -> None:
    data = arrays(30, question=[f"q{i % 7}" for i in range(30)])
    order = torch.from_numpy(np.random.default_rng(0).permutation(30))
    there = [set(test.question) for _, test in data.folds(3)]
    shuffled = [set(test.question) for _, test in data.select(order).folds(3)]
    assert there == shuffled
    with pytest.raises(ValueError, match=r"k must lie in \[2, 7\] \(the number of questions\), got 8"):
        data.fold_indices(8)


def test_fingerprint_sees_every_value() -> None:
    data = arrays()
    assert data.fingerprint() == arrays().fingerprint()
    changed = arrays(successes=np.r_[arrays().successes.numpy()[:-1], (int(arrays().successes[-1]) + 1) % 5])
    assert data.fingerprint() != changed.fingerprint()
    assert data.fingerprint() != arrays(question=[f"p{i % 5}" for i in range(12)]).fingerprint()
    assert data.summary()["sha256"] == data.fingerprint()


def test_prefix_features_by_hand() -> None:
    features = prefix_features([0.5, 0.9, 0.2])
    column = {name: features[:, i] for i, name in enumerate(FEATURE_NAMES)}
    np.testing.assert_allclose(column["last"], [0.5, 0.9, 0.2])
    np.testing.assert_allclose(column["min"], [0.5, 0.5, 0.2])
    np.testing.assert_allclose(column["product"], [0.5, 0.45, 0.09])
    np.testing.assert_allclose(column["mean"], [0.5, 0.7, 1.6 / 3])
    np.testing.assert_allclose(column["step_index"], [1, 2, 3])
    np.testing.assert_allclose(column["logit_last"], np.log([1.0, 9.0, 0.25]))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 12))
def test_features_of_a_prefix_do_not_know_what_follows(scores: list[float], cut: int) -> None:
    np.testing.assert_array_equal(prefix_features(scores)[:cut], prefix_features(scores[:cut]))
    assert np.isfinite(prefix_features(scores)).all()


def test_question_features_are_those_of_no_step() -> None:
    features = question_features([0.3])[0]
    assert dict(zip(FEATURE_NAMES, features, strict=True))["step_index"] == 0
    np.testing.assert_allclose(features[:4], 0.3)


def traces(**columns: Any) -> pa.Table:
    base: dict[str, Any] = {
        "question_id": ["a", "a", "a", "b", "b"],
        "policy_id": ["m", "m", "m", "m", "n"],
        "prm_step_scores": [[0.5, 0.25], [0.75], None, [1.0], [0.125]],
        "correct": [True, False, True, None, True],
    }
    base.update(columns)
    return pa.table(base)


def test_prefix_unit_uses_outcomes_where_there_are_no_rollouts() -> None:
    data = CalibrationData.from_traces(traces())
    assert data.score.tolist() == [0.5, 0.25, 0.75, 0.125]
    assert data.successes.tolist() == [1, 1, 0, 1]
    assert data.trials.tolist() == [1, 1, 1, 1]
    assert data.question == ("a", "a", "a", "b")
    assert data.policy_id == "m, n"
    assert data.feature_names == FEATURE_NAMES


def test_prefix_unit_prefers_rollouts_and_drops_steps_without_any() -> None:
    data = CalibrationData.from_traces(
        traces(
            step_successes=[[3, 0], None, None, [2], None],
            step_trials=[[8, 0], None, None, [2], None],
        )
    )
    assert data.score.tolist() == [0.5, 0.75, 1.0, 0.125]
    assert list(zip(data.successes.tolist(), data.trials.tolist(), strict=True)) == [(3, 8), (0, 1), (2, 2), (1, 1)]


def test_one_policy_can_be_chosen() -> None:
    data = CalibrationData.from_traces(traces(), policy_id="n")
    assert data.score.tolist() == [0.125]
    assert data.policy_id == "n"
    with pytest.raises(ValueError, match=r"policy_id must be one of m, n, got 'o'"):
        CalibrationData.from_traces(traces(), policy_id="o")


def test_pilot_form_never_counts_the_samples_own_outcome() -> None:
    data = CalibrationData.from_traces(traces(), unit="question")
    # sample 0 is right: of the others (wrong, right) one is; sample 1 is wrong: both others are right
    assert data.score.tolist() == [0.25, 0.75]
    assert list(zip(data.successes.tolist(), data.trials.tolist(), strict=True)) == [(1, 2), (2, 2)]


def test_question_form_reads_the_empty_answer() -> None:
    table = traces(
        question_score=[0.5, 0.5, 0.5, 0.25, None],
        question_hidden=[[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [3.0, 4.0], None],
        question_successes=[6, 6, 6, None, None],
        question_trials=[8, 8, 8, None, None],
    )
    # b of policy m has no outcome at all, b of policy n no score
    with pytest.warns(UserWarning, match="1 of 3 questions have no question_score"):
        data = CalibrationData.from_traces(table, unit="question")
    assert data.score.tolist() == [0.5]
    assert (data.successes.tolist(), data.trials.tolist()) == ([6], [8])
    assert data.hidden is not None
    assert data.hidden.tolist() == [[1.0, 2.0]]


def test_question_form_counts_samples_where_there_are_no_rollouts() -> None:
    data = CalibrationData.from_traces(traces(question_score=[0.5, 0.5, 0.5, 0.25, 0.75]), unit="question")
    assert data.score.tolist() == [0.5, 0.75]
    assert list(zip(data.successes.tolist(), data.trials.tolist(), strict=True)) == [(2, 3), (1, 1)]


def test_rows_of_one_question_must_agree_on_its_score() -> None:
    with pytest.raises(TraceError, match=r"row 1: question_score must be that of row 0, .*got 0.6"):
        CalibrationData.from_traces(traces(question_score=[0.5, 0.6, 0.5, 0.25, 0.75]), unit="question")


def test_hidden_states_line_up_with_their_steps() -> None:
    states = [[[1.0, 0.0], [2.0, 0.0]], [[3.0, 0.0]], None, [[4.0, 0.0]], [[5.0, 0.0]]]
    data = CalibrationData.from_traces(traces(hidden_states=states))
    assert data.hidden is not None
    assert data.hidden[:, 0].tolist() == [1.0, 2.0, 3.0, 5.0]
    pilot = CalibrationData.from_traces(traces(hidden_states=states), unit="question")
    assert pilot.hidden is not None
    assert pilot.hidden[:, 0].tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match=r"every scored answer or for none, got 2 of 3 \(none for question 'a'\)"):
        CalibrationData.from_traces(traces(hidden_states=[states[0], None, None, None, states[4]]))


def test_traces_without_anything_to_learn_from() -> None:
    with pytest.raises(
        ValueError, match=r"unit='prefix' needs rows with a PRM score and a known outcome, got none of 5"
    ):
        CalibrationData.from_traces(traces(correct=pa.array([None] * 5, pa.bool_())))
    with pytest.raises(ValueError, match=r"unit must be 'prefix' or 'question', got 'step'"):
        CalibrationData.from_traces(traces(), unit="step")  # type: ignore[arg-type]


def test_prm_id_comes_from_the_file_or_the_caller() -> None:
    table = traces().replace_schema_metadata({"prm_id": "my-prm"})
    assert CalibrationData.from_traces(table).prm_id == "my-prm"
    assert CalibrationData.from_traces(table, prm_id="other").prm_id == "other"


def test_real_traces(shared_data: Path) -> None:
    data = CalibrationData.from_traces(shared_data / "math500_iid_samples.parquet")
    assert (len(data), len(set(data.question))) == (7647, 270)
    assert float(((data.score - data.target) ** 2).mean()) == pytest.approx(0.41330, abs=5e-6)


def test_the_public_names_are_there_and_importing_them_is_light() -> None:
    import prmfast.calibration

    assert all(getattr(prmfast.calibration, name) is not None for name in prmfast.calibration.__all__)
    heavy = ("sklearn", "scipy", "pyarrow", "matplotlib", "pandas", "transformers", "triton", "prmfast._C")
    code = (
        "import sys; from prmfast.calibration import CalibrationData, IsotonicCalibrator, metrics, plots;"
        f"found = [name for name in {heavy} if name in sys.modules]; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_concat_keeps_rows_and_what_all_parts_have() -> None:
    one = CalibrationData.from_arrays(
        score=[0.1, 0.2], successes=[0, 2], trials=[2, 2], hidden=[[1.0], [2.0]], question=["a", "b"], prm_id="p"
    )
    two = CalibrationData.from_arrays(score=[0.3], successes=[1], hidden=[[3.0]], question=["a"], prm_id="p")
    both = CalibrationData.concat([one, two])
    assert both.score.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert both.hidden is not None
    assert both.hidden.tolist() == [[1.0], [2.0], [3.0]]
    assert (both.successes.tolist(), both.trials.tolist()) == ([0, 2, 1], [2, 2, 1])
    assert (both.question, both.prm_id, both.policy_id) == (("a", "b", "a"), "p", None)
    bare = CalibrationData.from_arrays(score=[0.3], successes=[1], policy_id="x")
    assert CalibrationData.concat([one, bare]).hidden is None
    assert CalibrationData.concat([one, bare]).policy_id == "x"
    with pytest.raises(ValueError, match="parts must have at least one entry, got 0"):
        CalibrationData.concat([])
    other = CalibrationData.from_arrays(features=[[1.0]], successes=[1])
    with pytest.raises(ValueError, match=r"parts\[1\] must have the features last, logit_last, got \('x0',\)"):
        CalibrationData.concat([one, other])
