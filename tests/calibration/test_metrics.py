from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prmfast.calibration import CalibrationData, IsotonicCalibrator, metrics

RNG = np.random.default_rng


def cases(path: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    arrays = np.load(path)
    manifest = json.loads(str(arrays["manifest"]))
    return [
        (
            case["case"],
            {name: arrays[f"{case['case']}/in/{name}"] for name in case["in"]},
            {name: arrays[f"{case['case']}/out/{name}"] for name in case["out"]},
        )
        for case in manifest["cases"]
    ]


def from_vector(key: str, arrays: dict[str, Any]) -> Any:
    p, y, q, tau = (arrays[name] for name in ("p", "y", "q", "tau"))
    if key.startswith("ece_eps"):
        return metrics.ece(p, y, eps=float(key.removeprefix("ece_eps")))
    found: dict[str, Callable[[], Any]] = {
        "expected_p": lambda: metrics.expected_from_quantiles(q, tau),
        "brier": lambda: metrics.brier(p, y),
        "pos_brier_class": lambda: metrics.pos_brier(p, y),
        "pos_brier_over": lambda: metrics.pos_brier(p, y, positive="over"),
        "pos_brier_yweighted": lambda: metrics.pos_brier(p, y, positive="weighted"),
        "wql": lambda: metrics.wql(q, y, tau),
        "cal_curve": lambda: metrics.calibration_curve(q, y),
        "cal_area_trapz": lambda: metrics.calibration_area(q, y, tau),
        "cal_area_mean": lambda: metrics.calibration_area(q, y, tau, rule="mean"),
    }
    return found[key]()


def test_paper_vectors(shared_vectors: Path) -> None:
    checked = 0
    for name, arrays, wanted in cases(shared_vectors / "paper_metrics.npz"):
        for key, value in wanted.items():
            np.testing.assert_allclose(from_vector(key, arrays), value, rtol=1e-9, atol=1e-12, err_msg=f"{name}/{key}")
            checked += 1
    assert checked == 13 * 13


def test_pos_brier_of_ties() -> None:
    p, y = [0.0, 0.0, 0.0], [0.5, 1.0, 0.0]
    assert metrics.pos_brier(p, y) == pytest.approx((0.25 + 1.0) / 2)
    assert metrics.pos_brier(p, y, positive="strict") == 1.0
    assert np.isnan(metrics.pos_brier([0.5], [0.0]))


def test_torch_and_numpy_give_the_same() -> None:
    rng = RNG(0)
    p, y, q = rng.random(50), rng.random(50), np.sort(rng.random((50, 11)), axis=1)
    assert metrics.ece(torch.from_numpy(p), torch.from_numpy(y)) == metrics.ece(p, y)
    assert metrics.wql(torch.from_numpy(q), torch.from_numpy(y)) == metrics.wql(q, y)


def test_perfect_quantiles_have_the_least_wql() -> None:
    rng = RNG(0)
    y = rng.random(4000)
    right = np.tile(metrics.LEVELS, (4000, 1))
    assert metrics.wql(right, y) < metrics.wql(right**1.3, y)
    assert metrics.calibration_area(right, y) < 0.02 < metrics.calibration_area(right**1.3, y)


def test_crossing_rate_counts_pairs() -> None:
    assert metrics.crossing_rate([[0.0, 0.2, 0.1], [0.5, 0.5, 0.5]]) == 0.25
    with pytest.raises(ValueError, match="at least 2 levels to cross, got 1"):
        metrics.crossing_rate([[0.0]])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    import warnings

    from scipy.stats import spearmanr

    a, b = np.array(pairs, dtype=float).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = spearmanr(a, b).statistic
    np.testing.assert_allclose(metrics.spearman(a, b), wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.brier([0.5], [0.5, 0.5]), r"y must have shape \(1,\) like p, got \(2,\)"),
        (lambda: metrics.brier([np.nan, 0.1], [0.5, 0.5]), r"p must be finite, got NaN or infinity at row 0"),
        (lambda: metrics.brier([], []), r"p must have 1 dimension and a row, got shape \(0,\)"),
        (
            lambda: metrics.wql(np.zeros((2, 3)), [0, 1]),
            r"quantiles must have shape \(N, 11\) for 11 levels, got \(2, 3\)",
        ),
        (lambda: metrics.wql(np.zeros((2, 11)), [0]), r"y must have shape \(2,\), got \(1,\)"),
        (lambda: metrics.pos_brier([0.5], [1], positive="all"), r"positive must be .*got 'all'"),  # type: ignore[arg-type]
        (lambda: metrics.calibration_area(np.zeros((1, 11)), [0], rule="sum"), r"rule must be"),  # type: ignore[arg-type]
        (lambda: metrics.ece([0.5], [1], bins=0), r"bins must be at least 1 and eps at least 0, got 0"),
        (lambda: metrics.pit(np.zeros((1, 2)), [0], [1], law="x"), r"law must be"),  # type: ignore[arg-type]
        (lambda: metrics.pit(np.zeros((1, 2)), [0, 1], [1, 1]), r"successes and trials must have shape \(1,\)"),
        (lambda: metrics.pit_error([0.5], [0.5], groups=2), r"groups must lie in \[1, 1\], got 2"),
        (lambda: metrics.bootstrap([0.5], ["a"], n=0), r"n must be at least 1"),
        (lambda: metrics.bootstrap([0.5, 0.1], ["a"]), r"question must name 2 rows, got 1"),
        (lambda: metrics.frequency_quantiles([[0.5]], [0]), r"trials must have shape \(1,\) and be at least 1"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def beta_world(rows: int, trials: int, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """score, exact quantiles of p at midpoints, k, n for p ~ Beta(4 s, 4 (1 - s)) given the score s."""
    from scipy.stats import beta

    rng = RNG(seed)
    grid = np.linspace(0.1, 0.9, 15)
    which = rng.integers(len(grid), size=rows)
    score = grid[which]
    levels = (np.arange(200) + 0.5) / 200
    quantiles = beta.ppf(levels[None, :], 4 * grid[:, None], 4 * (1 - grid[:, None]))[which]
    successes = rng.binomial(trials, rng.beta(4 * score, 4 * (1 - score)))
    return score, quantiles, successes, np.full(rows, trials)


@pytest.mark.parametrize("trials", [1, 3, 8])
def test_pit_is_uniform_for_the_true_law_of_p(trials: int) -> None:
    score, quantiles, k, n = beta_world(6000, trials)
    u = metrics.pit(quantiles, k, n, law="probability")
    assert metrics.pit_error(u, score) < 0.04
    # a model that ignores the score is uniform over all rows, but not within groups
    marginal = np.tile(np.quantile(quantiles, (np.arange(200) + 0.5) / 200), (6000, 1))
    blind = metrics.pit(marginal, k, n, law="probability")
    assert metrics.pit_error(blind, score, groups=1) < 0.04 < metrics.pit_error(blind, score)


def test_pit_of_frequencies_is_uniform_for_the_law_of_the_frequency() -> None:
    score, quantiles, k, n = beta_world(6000, 8)
    levels = (np.arange(400) + 0.5) / 400
    of_frequency = metrics.frequency_quantiles(quantiles, n, levels)
    # each atom spread evenly over its cell, as the transform supposes
    atom = np.sort(of_frequency + RNG(1).uniform(-0.5, 0.5, of_frequency.shape) / 8, axis=1)
    assert metrics.pit_error(metrics.pit(atom, k, n, levels), score) < 0.04
    assert metrics.pit_error(metrics.pit(atom**2, k, n, levels), score) > 0.1


def test_frequency_quantiles_of_one_trial_are_the_mean() -> None:
    _, quantiles, _, n = beta_world(50, 1)
    found = metrics.frequency_quantiles(quantiles, n, [0.0, 0.3, 1.0])
    assert set(np.unique(found)) <= {0.0, 1.0}
    np.testing.assert_array_equal(found[:, 1], (quantiles.mean(axis=1) > 0.7).astype(float))
    np.testing.assert_array_equal(found[:, 2], 1.0)


def test_frequency_quantiles_match_simulation() -> None:
    _, quantiles, _, _ = beta_world(4, 5)
    found = metrics.frequency_quantiles(quantiles, [5, 5, 3, 1], [0.1, 0.5, 0.95])
    rng = RNG(0)
    for row, n in enumerate([5, 5, 3, 1]):
        draws = rng.binomial(n, rng.choice(quantiles[row], 200_000)) / n
        np.testing.assert_allclose(found[row], np.quantile(draws, [0.1, 0.5, 0.95], method="inverted_cdf"), atol=1e-9)


def clustered(seed: int, questions: int = 60) -> tuple[Any, Any, Any]:
    rng = RNG(seed)
    size = rng.integers(1, 12, questions)
    question = np.repeat(np.arange(questions), size)
    y = (rng.random(len(question)) < rng.random(questions)[question]).astype(float)
    return rng.random(len(question)), y, question


TERMS: dict[str, tuple[Callable[[Any, Any], metrics.Terms], Callable[[Any, Any], float]]] = {
    "brier": (metrics.brier_terms, metrics.brier),
    "pos_brier": (metrics.pos_brier_terms, metrics.pos_brier),
    "ece": (metrics.ece_terms, metrics.ece),
    "wql": (
        lambda p, y: metrics.wql_terms(np.outer(p, metrics.LEVELS), y),
        lambda p, y: metrics.wql(np.outer(p, metrics.LEVELS), y),
    ),
    "area": (
        lambda p, y: metrics.area_terms(np.outer(p, metrics.LEVELS), y),
        lambda p, y: metrics.calibration_area(np.outer(p, metrics.LEVELS), y),
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_the_vectorised_bootstrap_has_the_law_of_the_general_one(name: str) -> None:
    terms, function = TERMS[name]
    p, y, question = clustered(0)
    fast = metrics.bootstrap(terms(p, y), question, n=4000, seed=1)
    slow = metrics.bootstrap(lambda rows: function(p[rows], y[rows]), question, n=1500, seed=2)
    assert fast.value == pytest.approx(slow.value, rel=1e-12)
    width = slow.high - slow.low
    assert fast.low == pytest.approx(slow.low, abs=0.12 * width)
    assert fast.high == pytest.approx(slow.high, abs=0.12 * width)
    assert fast.low <= fast.value <= fast.high or name == "ece"


def test_the_interval_is_by_question() -> None:
    p, y, question = clustered(0)
    error = (p - y) ** 2
    rows = np.arange(len(error))
    by_question = metrics.bootstrap(np.repeat(error, 5), np.repeat(question, 5), n=2000)
    once = metrics.bootstrap(error, question, n=2000)
    naive = metrics.bootstrap(np.repeat(error, 5), np.arange(5 * len(rows)), n=2000)
    # copies of rows say nothing new: the interval by question does not shrink, the one by row does
    np.testing.assert_allclose(by_question, once, rtol=1e-9)
    assert naive.high - naive.low < 0.6 * (once.high - once.low)


def test_the_interval_covers_the_truth() -> None:
    inside = 0
    for seed in range(100):
        rng = RNG(seed)
        level = rng.normal(size=80)
        values = np.repeat(level, 5) + rng.normal(size=400)
        interval = metrics.bootstrap(values, np.repeat(np.arange(80), 5), n=400, seed=seed)
        inside += interval.low <= 0.0 <= interval.high
    assert 88 <= inside <= 100


def test_bootstrap_is_seeded_and_survives_a_missing_class() -> None:
    p, y, question = clustered(3)
    assert metrics.bootstrap(p, question, seed=5) == metrics.bootstrap(p, question, seed=5)
    assert metrics.bootstrap(p, question, seed=5) != metrics.bootstrap(p, question, seed=6)
    none = metrics.bootstrap(metrics.pos_brier_terms(p, 0 * y), question)
    assert all(np.isnan(x) for x in none)


def test_summary_holds_every_metric() -> None:
    rng = RNG(0)
    score = rng.random(300)
    data = CalibrationData.from_arrays(
        score=score,
        successes=rng.binomial(4, score),
        trials=np.full(300, 4),
        question=[f"q{i % 40}" for i in range(300)],
    )
    found = metrics.summary(IsotonicCalibrator(spread="bins").fit(data), data, n=100)
    assert list(found) == ["brier", "pos_brier", "ece", "wql", "area", "crossing_rate", "spearman"]
    assert all(np.isfinite(x) for interval in found.values() for x in interval)
    assert found["brier"].value == pytest.approx(
        metrics.brier(IsotonicCalibrator().fit(data).expected(data), data.target)
    )
    assert found["crossing_rate"] == (0.0, 0.0, 0.0)
