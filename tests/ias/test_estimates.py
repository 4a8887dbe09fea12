"""Estimates beside pools: who speaks for which question, which samples may be spent, and what calibration buys."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from prmfast.calibration import CalibrationData, RawScore, study
from prmfast.calibration.study import midpoint_levels, question_mark
from prmfast.ias import QuestionEstimates, ReplayPool, replay
from tests.handmade import traces, with_column


def rows(*samples: tuple[Any, ...], **more: list[Any]) -> pa.Table:
    """A table of (question, policy, step scores or None, correct or None)."""
    question, policy, scores, correct = (list(column) for column in zip(*samples, strict=True))
    columns = {"question_id": question, "policy_id": policy, "prm_step_scores": scores, "correct": correct, **more}
    return pa.table({**columns, "prm_step_scores": pa.array(scores, pa.list_(pa.float64()))})


def outcomes(pool: ReplayPool) -> dict[tuple[str, str], list[bool]]:
    return {
        (question, policy): pool.correct[i, : int(pool.size[i])].tolist()
        for i, (question, policy) in enumerate(zip(pool.question, pool.policy, strict=True))
    }


def by_pair(estimates: QuestionEstimates) -> dict[tuple[str, str], float]:
    assert estimates.data.question == estimates.pool.question
    pairs = zip(estimates.pool.question, estimates.pool.policy, strict=True)
    return dict(zip(pairs, estimates.data.score.tolist(), strict=True))


TWO_POLICIES = (
    ("x", "big", [0.25], True),
    ("y", "small", [0.5], False),
    ("x", "small", [0.75], False),
    ("x", "big", [0.125], False),
    ("y", "small", [0.375], True),
    ("x", "small", [0.625], True),
    ("x", "big", [0.875], True),
)


def test_pairs_by_question_and_policy_from_the_empty_answer() -> None:
    score = {("x", "big"): 0.1, ("x", "small"): 0.2, ("y", "small"): 0.3}
    table = rows(*TWO_POLICIES, question_score=[score[row[0], row[1]] for row in TWO_POLICIES])
    estimates = QuestionEstimates.from_traces(table)
    assert not estimates.pilot
    assert by_pair(estimates) == pytest.approx(score)
    assert outcomes(estimates.pool) == {  # every sample, in the order stored
        ("x", "big"): [True, False, True],
        ("x", "small"): [False, True],
        ("y", "small"): [False, True],
    }
    assert estimates.data.features[:, estimates.data.feature_names.index("step_index")].tolist() == [0, 0, 0]
    assert estimates.data.policy_id == "big, small"


def test_the_pilot_speaks_and_leaves_the_pool() -> None:
    estimates = QuestionEstimates.from_traces(rows(*TWO_POLICIES))
    assert estimates.pilot
    assert by_pair(estimates) == {("x", "big"): 0.25, ("x", "small"): 0.75, ("y", "small"): 0.5}
    assert outcomes(estimates.pool) == {
        ("x", "big"): [False, True],
        ("x", "small"): [True],
        ("y", "small"): [True],
    }


def test_exactly_the_pilot_leaves_the_pool() -> None:
    table = traces(30, 5, policies=("a", "b"), question_score=False, seed=3)
    everything = outcomes(ReplayPool.from_table(table))
    estimates = QuestionEstimates.from_traces(table)
    left = outcomes(estimates.pool)
    assert set(left) == set(everything)
    assert all(left[pair] == everything[pair][1:] for pair in everything)
    first: dict[tuple[str, str], float] = {}
    columns = (table[name].to_pylist() for name in ("question_id", "policy_id", "prm_step_scores"))
    for question, policy, scores in zip(*columns, strict=True):
        first.setdefault((question, policy), scores[-1])
    assert by_pair(estimates) == pytest.approx(first)


def test_the_pilot_is_the_first_scored_sample() -> None:
    estimates = QuestionEstimates.from_traces(
        rows(
            ("x", "m", None, True),  # not scored: to be spent
            ("x", "m", [0.25], None),  # outcome not known, which a pilot need not have
            ("x", "m", [0.5], False),
            ("x", "m", None, False),
        )
    )
    assert by_pair(estimates) == {("x", "m"): 0.25}
    assert outcomes(estimates.pool) == {("x", "m"): [True, False, False]}
    assert estimates.pool.score is None


def test_answers_without_a_step_are_spent_but_do_not_speak() -> None:
    table = rows(
        ("x", "m", [], False),
        ("x", "m", [0.25, 0.5], True),
        ("x", "m", [], True),
        ("y", "m", [], True),
        ("y", "m", [], False),
        steps=[[], ["a", "b"], [], [], []],
    )
    estimates = QuestionEstimates.from_traces(table)
    assert by_pair(estimates) == {("x", "m"): 0.5}
    assert outcomes(estimates.pool) == {("x", "m"): [False, True]}
    assert estimates.pool.score is not None
    assert estimates.pool.score[0].tolist() == [0.0, 0.0]  # never picked before an answer that has steps
    whole = QuestionEstimates.from_traces(table.append_column("question_score", pa.array([0.5] * 3 + [0.25] * 2)))
    assert by_pair(whole) == {("x", "m"): 0.5, ("y", "m"): 0.25}
    assert whole.pool.size.tolist() == [3, 2]


def test_questions_without_an_estimate_or_another_sample_are_left_out() -> None:
    pilot = QuestionEstimates.from_traces(
        rows(
            ("alone", "m", [0.5], True),
            ("unscored", "m", None, True),
            ("unscored", "m", None, True),
            ("unknown", "m", [0.5], True),
            ("unknown", "m", [0.5], None),
            ("good", "m", [0.5], None),
            ("good", "m", None, True),
        )
    )
    assert pilot.data.question == ("good",)
    table = rows(
        ("good", "m", None, True),
        ("unknown", "m", None, None),
        ("no score", "m", [0.5], True),
        ("ok", "m", None, False),
        question_score=[0.5, 0.5, None, 0.25],
        question_trials=[4, 4, None, None],
        question_successes=[1, 2, None, None],
    )
    with pytest.warns(UserWarning, match="1 of 4 questions have no question_score"):
        whole = QuestionEstimates.from_traces(table)
    assert whole.data.question == ("good", "ok")
    assert whole.data.trials.tolist() == [4, 1]


def test_a_policy_without_question_scores_has_no_estimate_beside_one_that_has() -> None:
    # its finished samples are in the pool: were one to speak, its question would spend what it was judged by
    score = [None if row[1] == "small" else 0.5 for row in TWO_POLICIES]
    estimates = QuestionEstimates.from_traces(rows(*TWO_POLICIES, question_score=score))
    assert not estimates.pilot
    assert by_pair(estimates) == {("x", "big"): 0.5}
    assert outcomes(estimates.pool) == {("x", "big"): [True, False, True]}


def test_one_policy() -> None:
    table = rows(*TWO_POLICIES)
    estimates = QuestionEstimates.from_traces(table, policy_id="small")
    assert by_pair(estimates) == {("x", "small"): 0.75, ("y", "small"): 0.5}
    nameless = table.drop_columns(["policy_id"])
    assert set(QuestionEstimates.from_traces(nameless, policy_id="mine").pool.policy) == {"mine"}
    with pytest.raises(ValueError, match="policy_id must be one of big, small, got 'nobody'"):
        QuestionEstimates.from_traces(table, policy_id="nobody")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (rows(*TWO_POLICIES).slice(0, 0), "the table must have at least 1 row"),
        (rows(*TWO_POLICIES).drop_columns(["correct"]), "correct must be a column"),
        (rows(("x", "m", [math.nan], True)), r"row 0: prm_step_scores must lie in \[0, 1\], got nan"),
        (rows(("x", "m", [0.5], True), ("y", "m", [0.5], True)), "no question has both a PRM score and another"),
        (rows(("x", "m", None, True), ("x", "m", None, True)), "no question has both a PRM score and another"),
        (
            rows(("x", "m", None, True), ("x", "m", None, True)).drop_columns(["prm_step_scores"]),
            "no question has both a PRM score and another",
        ),
        (rows(("x", "m", [0.5], None), ("x", "m", [0.5], None)), "no sample with known correctness"),
        (
            rows(("x", "m", None, True), ("x", "m", None, True), question_score=[0.5, 0.25]),
            "row 1: question_score must be that of row 0",
        ),
    ],
)
def test_errors(table: pa.Table, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionEstimates.from_traces(table)


def test_budgets_selection_and_unseen(tmp_path: Path) -> None:
    table = traces(20, 3, hidden=True)
    made = study.calibrate(table, tmp_path, methods=["raw", "isotonic"], progress=False)
    estimates = QuestionEstimates.from_traces(table)
    assert estimates.data.hidden is not None
    given = estimates.budgets(made.calibrators["question"], levels=8)
    assert list(given) == ["raw", "isotonic"]
    expected = made.calibrators["question"]["isotonic"].quantile(estimates.data, midpoint_levels(8))
    assert torch.equal(given["isotonic"], expected)
    rest = estimates.unseen(made)
    assert {question_mark(q) for q in rest.data.question}.isdisjoint(made.training)
    assert len(rest.pool) == 4
    assert rest.data.question == rest.pool.question
    chosen = estimates.select([7, 2])
    assert chosen.data.question == chosen.pool.question == (estimates.data.question[7], estimates.data.question[2])
    assert chosen.pool.truth.tolist() == estimates.pool.truth[[7, 2]].tolist()
    assert chosen.pool.score is not None
    seen = estimates.select([i for i, q in enumerate(estimates.data.question) if q not in rest.data.question])
    with pytest.raises(ValueError, match="every one of 16 questions was fitted on"):
        seen.unseen(made)


def test_hidden_states_of_one_policy_alone_are_not_used() -> None:
    table = traces(4, 2, policies=("a", "b"), hidden=True)
    half = [
        None if p == "b" else h
        for p, h in zip(*(table[c].to_pylist() for c in ("policy_id", "question_hidden")), strict=True)
    ]
    estimates = QuestionEstimates.from_traces(with_column(table, "question_hidden", half))
    assert estimates.data.hidden is None
    assert len(estimates.data) == 8


QUESTIONS, SAMPLES, TARGETS = 400, 64, (0.6, 0.75, 0.9)


@pytest.fixture(scope="module")
def known() -> tuple[torch.Tensor, QuestionEstimates]:
    """p ~ Beta(4, 4) of 400 questions with 64 samples each; the PRM says p^(1/4) of the empty answer."""
    rng = np.random.default_rng(0)
    p = rng.beta(4.0, 4.0, QUESTIONS)
    correct = rng.random((QUESTIONS, SAMPLES)) < p[:, None]
    names = [f"q{i:03d}" for i in range(QUESTIONS)]
    table = pa.table(
        {
            "question_id": np.repeat(names, SAMPLES).tolist(),
            "policy_id": ["m"] * correct.size,
            "correct": correct.reshape(-1).tolist(),
            "question_score": np.repeat(p**0.25, SAMPLES).tolist(),
        }
    )
    return torch.from_numpy(p), QuestionEstimates.from_traces(table)


def expected_success(p: torch.Tensor, budget: torch.Tensor) -> float:
    """What budgets [Q] bring on average where question i succeeds with p[i] a sample."""
    return float((1 - (1 - p) ** budget.double()).mean())


def test_calibrated_quantiles_reach_the_target_and_raw_scores_miss_it(
    known: tuple[torch.Tensor, QuestionEstimates],
) -> None:
    from prmfast.ops import ias_budget

    p, estimates = known
    raw = estimates.budgets({"raw": RawScore().fit(estimates.data)})["raw"]
    assert torch.allclose(raw.double() ** 4, p[:, None].expand(-1, 100), atol=1e-4)
    given = {"point": p, "posterior": p[:, None].expand(-1, 100), "raw": raw}
    frontier = replay(estimates.pool, given, targets=TARGETS, n_max=SAMPLES, exact=True)
    assert [row.asked for row in frontier.of("point")] == [
        row.asked for row in frontier.of("posterior")
    ]  # a distribution that is one point is that point
    for method in ("point", "posterior", "raw"):
        for row in frontier.of(method):
            assert row.target is not None
            budget = ias_budget(given[method].reshape(QUESTIONS, -1), row.target, SAMPLES)
            half = (row.success.high - row.success.low) / 2
            # the interval is 1.96 standard errors wide to each side: 3 of them, against the known p
            assert abs(row.success.value - expected_success(p, budget)) < 3 / 1.96 * half
            if method == "raw":
                assert row.success.high < row.target
            else:
                assert row.success.low > row.target - half
                assert row.at_n_max < 0.02


def test_a_calibrated_posterior_that_is_wide_reaches_the_target(known: tuple[torch.Tensor, QuestionEstimates]) -> None:
    _, estimates = known
    levels = midpoint_levels().double().numpy()
    from scipy.stats import beta

    prior = torch.from_numpy(beta(4, 4).ppf(levels))[None].expand(QUESTIONS, -1)  # all that is known without a PRM
    mean = prior.mean(1)
    frontier = replay(estimates.pool, {"prior": prior, "its mean": mean}, targets=TARGETS, exact=True)
    for wide, point in zip(frontier.of("prior"), frontier.of("its mean"), strict=True):
        assert wide.target is not None
        assert wide.success.high > wide.target
        assert wide.asked >= point.asked
    assert frontier.of("prior")[-1].asked > frontier.of("its mean")[-1].asked
    assert frontier.of("its mean")[-1].success.high < TARGETS[-1]  # eq. 4 of the mean forgets the hard questions


def test_fixed_and_oracle_rows_are_always_there(known: tuple[torch.Tensor, QuestionEstimates]) -> None:
    p, estimates = known
    frontier = replay(estimates.pool, {}, targets=TARGETS, exact=True, truth=p)
    assert [(row.method, row.target) for row in frontier.rows] == [
        *(("fixed", None),) * 7,
        *(("oracle", target) for target in TARGETS),
    ]
    assert [row.asked for row in frontier.of("fixed")] == [1, 2, 4, 8, 16, 32, 64]
    successes = [row.success.value for row in frontier.of("fixed")]
    assert successes == sorted(successes)
    one = replay(estimates.pool, {"mine": 3}, targets=[0.9], n_max=6, trials=2)
    assert [row.method for row in one.rows] == ["mine", *["fixed"] * 4, "oracle"]
    assert [row.asked for row in one.of("fixed")] == [1, 2, 4, 6]


def test_curves_are_what_the_plot_takes(known: tuple[torch.Tensor, QuestionEstimates]) -> None:
    from prmfast.calibration import plots

    p, estimates = known
    frontier = replay(estimates.pool, {"a": p, "b": p**2, "three": 3}, targets=TARGETS, exact=True)
    curves = frontier.curves()
    assert list(curves) == ["fixed", "oracle", "curves"]
    assert list(curves["curves"]) == ["a", "b", "three"]
    for name, (cost, success) in {**curves["curves"], "fixed": curves["fixed"], "oracle": curves["oracle"]}.items():
        assert list(zip(cost, success, strict=True)) == [(r.spent.value, r.success.value) for r in frontier.of(name)]
    assert len(curves["curves"]["three"][0]) == 1
    kept = frontier.kept()
    assert set(kept) == {row.method for row in frontier.rows if row.target is not None}
    assert all(targets == sorted(targets) and len(targets) == len(success) for targets, success in kept.values())
    labels = [line.get_label() for line in plots.frontier(**curves).axes[0].lines]
    assert {"fixed N", "oracle (true p)", "a", "b", "three"} <= set(labels)


def test_data_is_that_of_the_question_unit() -> None:
    table = traces(10, 3, hidden=True, rollouts=5)
    estimates = QuestionEstimates.from_traces(table)
    data = CalibrationData.from_traces(table, unit="question")
    assert estimates.data.question == data.question
    for name in ("score", "features", "hidden", "successes", "trials"):
        assert torch.equal(getattr(estimates.data, name), getattr(data, name))


def test_the_benchmark_fits_out_of_fold_and_puts_quantiles_back_in_place() -> None:
    from benchmarks.replay_real import cross_fitted, verdicts

    class Spy(RawScore):
        def fit(self, data: CalibrationData, *arguments: Any, **options: Any) -> Any:
            self.seen = set(data.question)
            return super().fit(data, *arguments, **options)

        def quantile(self, data: Any, *arguments: Any, **options: Any) -> torch.Tensor:
            assert self.seen.isdisjoint(data.question)
            assert len(self.seen) + len(set(data.question)) == 20
            return super().quantile(data, *arguments, **options)

    table = traces(20, 4, policies=("a", "b"), question_score=False)
    data, estimates = CalibrationData.from_traces(table, unit="question"), QuestionEstimates.from_traces(table)
    quantiles, _ = cross_fitted(data, estimates, {"spy": lambda seed: Spy()}, folds=5, seed=1, show=False)
    assert quantiles["spy"].shape == (40, 100)
    assert torch.equal(quantiles["spy"][:, 0], estimates.data.score)
    rows: list[dict[str, object]] = [
        {"method": "a", "target": 0.5, "open_success_high": 0.6},
        {"method": "a", "target": 0.9, "open_success_high": 0.8},
        {"method": "b", "target": 0.9, "open_success_high": math.nan},
    ]
    assert verdicts(rows, ["a", "b"]) == {"a": [0.9], "b": []}
