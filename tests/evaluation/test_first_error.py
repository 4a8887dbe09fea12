"""ProcessBench: step scores, exact thresholds against every threshold, the released search, cross-fitting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prmfast.evaluation import (
    cross_fitted_first_errors,
    first_error_metrics,
    first_errors,
    grid_threshold,
    optimal_threshold,
    released_scores,
    released_step_rewards,
    step_rewards,
)
from tests.vectors import Vectors

KINDS = ("sum", "sum_diff", "mean", "mean_diff")


def test_released_rewards(shared_vectors: Path) -> None:
    vectors = Vectors(shared_vectors / "processbench_rewards.npz")
    for case in vectors.cases:
        x, y = vectors.inputs(case), {name: value.numpy() for name, value in vectors.outputs(case).items()}
        reward, average = released_step_rewards(
            x["token_logratio"], x["step_pos"].tolist(), coefficient=case["params"]["coef"]
        )
        np.testing.assert_allclose(reward, y["reward"], rtol=0, atol=1e-6 * np.abs(y["reward"]).max())  # float32 sums
        np.testing.assert_allclose(average, y["avg_reward"], rtol=0, atol=1e-6 * np.abs(y["reward"]).max())


@pytest.fixture
def recorded(shared_vectors: Path) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((shared_vectors / "processbench_f1.json").read_text())
    return cases


@pytest.mark.parametrize("kind", KINDS)
def test_released_search(kind: Any, recorded: list[dict[str, Any]]) -> None:
    for case in recorded:
        labels = [item["label"] for item in case["data"]]
        scores = [
            released_scores(item["reward"], item["avg_reward"], kind=kind, coefficient=case["coef"])
            for item in case["data"]
        ]
        low = {"ipvrm": -1.0, "implicitprm": 0.0}
        for method, least in low.items():
            if kind not in case[method]:
                continue
            grid = np.linspace(least, 1.0, case["num_thresholds"])
            threshold, f1 = grid_threshold(scores, labels, grid)
            expected = case[method][kind]
            assert (threshold, f1) == (expected["best_threshold"], pytest.approx(expected["best_f1"], rel=1e-9))
        if kind == "sum_diff":
            for at in case.get("f1_at_threshold_sum_diff", ()):
                found = first_error_metrics(first_errors(scores, at["t"]), labels)
                assert found.f1 == pytest.approx(at["f1"], abs=1e-12)
                assert found.accuracy_correct == pytest.approx(at["acc_correct"])
                assert found.accuracy_error == pytest.approx(at["acc_error"])
        if len({label == -1 for label in labels}) == 2:
            best = first_error_metrics(first_errors(scores, optimal_threshold(scores, labels)), labels).f1
            assert best >= grid_threshold(scores, labels, np.linspace(-1, 1, case["num_thresholds"]))[1] - 1e-12


chains = st.lists(
    st.tuples(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=5), st.integers(-1, 4)),
    min_size=2,
    max_size=12,
)


@given(chains)
@settings(max_examples=150, deadline=None)
def test_the_threshold_is_optimal(rows: list[tuple[list[float], int]]) -> None:
    """No threshold of any kind does better: F1 changes only at scores, so trying every score and infinity is all."""
    scores = [chain for chain, _ in rows]
    labels = [min(label, len(chain) - 1) for chain, label in rows]
    if len({label == -1 for label in labels}) < 2:
        with pytest.raises(ValueError, match="labels must name chains with an error and chains without"):
            optimal_threshold(scores, labels)
        assert grid_threshold(scores, labels, [0.5]) == (None, 0.0)
        return
    threshold = optimal_threshold(scores, labels)
    every = [*sorted({score for chain in scores for score in chain}), math.inf]
    best = max(first_error_metrics(first_errors(scores, t), labels).f1 for t in every)
    assert first_error_metrics(first_errors(scores, threshold), labels).f1 == pytest.approx(best, abs=1e-12)
    grid, f1 = grid_threshold(scores, labels, every)
    assert f1 == pytest.approx(best, abs=1e-12)
    assert (grid is None) == (best == 0)
    assert math.isfinite(threshold)


def test_threshold_between_neighbouring_floats() -> None:
    low = 0.1
    high = math.nextafter(low, 1.0)
    threshold = optimal_threshold([[low], [high]], [0, -1])
    assert first_errors([[low], [high]], threshold) == [0, -1]


def test_step_rewards_by_hand() -> None:
    tokens = [9.0, 1.0, 2.0, -3.0, 4.0, 8.0]
    ends = [2, 3, 5]
    kwargs: dict[str, Any] = {"start": 1, "beta": 0.5}
    assert step_rewards(tokens, ends, **kwargs).tolist() == [1.5, 0.0, 6.0]
    assert step_rewards(tokens, ends, protocol="process", **kwargs).tolist() == [1.5, -1.5, 6.0]
    assert step_rewards(tokens, ends, average=True, **kwargs).tolist() == [0.75, 0.0, 1.2]
    assert step_rewards(tokens, ends, protocol="process", average=True, **kwargs).tolist() == [0.75, -1.5, 3.0]
    assert step_rewards(tokens, [], **kwargs).tolist() == []


def test_cross_fitting_judges_no_question_with_its_own_threshold() -> None:
    rng = np.random.default_rng(0)
    questions = [f"q{i % 40}" for i in range(200)]
    labels = [int(label) for label in rng.integers(-1, 4, 200)]
    scores = [rng.random(4) * np.where(np.arange(4) == label, 0.6, 1.0) for label in labels]
    found = cross_fitted_first_errors(scores, labels, questions)
    halves: dict[str, set[float]] = {}
    for chain, prediction, question in zip(scores, found.predicted, questions, strict=True):
        fits = {t for t in found.thresholds if first_errors([chain], t) == [prediction]}
        halves[question] = halves.get(question, set(found.thresholds)) & fits
    assert all(halves.values())  # one threshold explains all chains of a question
    own = first_error_metrics(first_errors(scores, optimal_threshold(scores, labels)), labels).f1
    crossed = first_error_metrics(found.predicted, labels).f1
    assert crossed <= own + 1e-12
    assert first_error_metrics([-1] * 200, labels).f1 < crossed


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([[0.5]], [0, -1], r"labels must have one entry per chain \(1\), got 2"),
        ([[0.5], []], [0, -1], r"step_scores\[1\] must be finite numbers and at least one, got \[\]"),
        ([[0.5], [float("nan")]], [0, -1], r"step_scores\[1\] must be finite"),
        ([[0.5], [0.5]], [1, -1], r"labels\[0\] must lie in \[-1, 1\), got 1"),
    ],
)
def test_errors(scores: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimal_threshold(scores, labels)


def test_more_errors() -> None:
    with pytest.raises(ValueError, match=r"step_ends must lie in \[start=1, 3\), got \[0, 2\]"):
        step_rewards([1.0, 2.0, 3.0], [0, 2], start=1)
    with pytest.raises(ValueError, match=r"step_ends must rise, got \[1, 1\]"):
        step_rewards([1.0, 2.0, 3.0], [1, 1])
    with pytest.raises(ValueError, match="protocol must be 'prefix' or 'process', got 'step'"):
        step_rewards([1.0], [0], protocol="step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"predicted must have one entry per label \(1\), got 2"):
        first_error_metrics([0, 1], [0])
    with pytest.raises(ValueError, match=r"questions must have one entry per chain \(2\), got 1"):
        cross_fitted_first_errors([[0.1], [0.2]], [0, -1], ["q"])
