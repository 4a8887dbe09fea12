from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prmfast.calibration import (
    CalibrationData,
    Calibrator,
    IsotonicCalibrator,
    LogisticCalibrator,
    NotFittedError,
    PlattCalibrator,
    RawScore,
    TemperatureCalibrator,
)
from prmfast.calibration.base import Standardiser, check_levels

SCORE_METHODS = (RawScore, IsotonicCalibrator, PlattCalibrator, TemperatureCalibrator, LogisticCalibrator)


def make(rows: int = 400, seed: int = 0, trials: int = 4, **columns: Any) -> CalibrationData:
    """Scores that say sigmoid(2 z) where the truth is sigmoid(z - 0.5)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=rows) * 1.5
    given: dict[str, Any] = {
        "score": 1 / (1 + np.exp(-2 * z)),
        "successes": rng.binomial(trials, 1 / (1 + np.exp(0.5 - z))),
        "trials": np.full(rows, trials),
    }
    given.update(columns)
    return CalibrationData.from_arrays(**given)


def single_outcomes(data: CalibrationData) -> CalibrationData:
    """k of n as n rows of one outcome each."""
    rows = np.repeat(np.arange(len(data)), data.trials.numpy())
    outcomes = np.concatenate(
        [np.arange(n) < k for k, n in zip(data.successes.tolist(), data.trials.tolist(), strict=True)]
    )
    return CalibrationData.from_arrays(
        score=data.score[rows], features=data.features[rows], feature_names=data.feature_names, successes=outcomes
    )


def test_raw_score_is_the_score() -> None:
    data = make()
    model = RawScore().fit(data)
    assert torch.equal(model.expected(data), data.score)
    assert torch.equal(model.quantile(data, [0.0, 0.3, 1.0]), data.score[:, None].expand(-1, 3))


@pytest.mark.parametrize("method", SCORE_METHODS)
def test_k_of_n_is_worth_n_single_outcomes(method: type[Calibrator]) -> None:
    data = make(150)
    grouped, single = method().fit(data), method().fit(single_outcomes(data))
    torch.testing.assert_close(grouped.expected(data), single.expected(data), rtol=0, atol=2e-5)


def test_isotonic_is_sklearns() -> None:
    from sklearn.isotonic import IsotonicRegression

    data, new = make(), make(seed=1)
    wanted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(
        data.score.double(), data.target.double(), sample_weight=data.trials
    )
    found = IsotonicCalibrator().fit(data).expected(new)
    np.testing.assert_allclose(found, wanted.predict(new.score.double()), atol=1e-6)


def test_isotonic_never_falls_and_stays_inside() -> None:
    model = IsotonicCalibrator().fit(make())
    grid = torch.linspace(0, 1, 501)
    values = model.expected(CalibrationData.from_arrays(score=grid, successes=torch.zeros(501, dtype=torch.int64)))
    assert bool((values.diff() >= 0).all())
    assert 0 <= float(values.min()) <= float(values.max()) <= 1


def test_platt_finds_the_true_map() -> None:
    data = make(20_000, trials=8)
    model = PlattCalibrator().fit(data)
    # truth: sigmoid(z - 1/2), score: sigmoid(2 z)
    assert model.coefficients_[0] == pytest.approx(0.5, abs=0.02)
    assert model.intercept_[0] == pytest.approx(-0.5, abs=0.02)


def test_temperature_finds_the_true_temperature() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=20_000)
    data = CalibrationData.from_arrays(
        score=1 / (1 + np.exp(-3 * z)), successes=rng.binomial(8, 1 / (1 + np.exp(-z))), trials=np.full(20_000, 8)
    )
    assert TemperatureCalibrator().fit(data).temperature_ == pytest.approx(3.0, rel=0.05)


def test_temperature_of_a_score_that_points_the_wrong_way_is_infinite() -> None:
    data = CalibrationData.from_arrays(score=[0.9] * 10 + [0.1] * 10, successes=[0] * 10 + [1] * 10)
    model = TemperatureCalibrator().fit(data)
    assert model.temperature_ == float("inf")
    assert model.expected(data).tolist() == [0.5] * 20


@pytest.mark.parametrize("outcome", [0, 1])
@pytest.mark.parametrize("method", SCORE_METHODS[1:])
def test_equal_outcomes_everywhere(method: type[Calibrator], outcome: int) -> None:
    data = CalibrationData.from_arrays(score=np.linspace(0.2, 0.8, 30), successes=[outcome] * 30)
    p = method().fit(data).expected(data)
    assert bool(torch.isfinite(p).all())
    if method is not TemperatureCalibrator:  # it has no intercept: a constant other than 1/2 is out of its reach
        assert bool(((p - outcome).abs() < 0.1).all())


def test_logistic_beats_one_score_when_features_matter() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 2))
    p = 1 / (1 + np.exp(-x.sum(1)))
    columns = {
        "score": 1 / (1 + np.exp(-x[:, 0])),
        "features": np.c_[x, np.ones(4000)],
        "feature_names": ("a", "b", "constant"),
        "successes": rng.binomial(1, p),
    }
    data = CalibrationData.from_arrays(**columns)
    model = LogisticCalibrator().fit(data)
    assert float((model.expected(data) - torch.from_numpy(p)).abs().mean()) < 0.02
    assert model.coefficients_[2] == 0.0
    reordered = CalibrationData.from_arrays(
        **{**columns, "features": np.c_[x[:, 1], np.zeros(4000), np.ones(4000), x[:, 0]],
           "feature_names": ("b", "unused", "constant", "a")}
    )  # fmt: skip
    assert torch.equal(model.expected(reordered), model.expected(data))


def test_bins_give_the_targets_quantiles_near_the_prediction() -> None:
    data = make(6000, trials=1)
    for model in (IsotonicCalibrator(spread="bins", bins=5), LogisticCalibrator(spread="bins", bins=5)):
        model.fit(data)
        q = model.quantile(data, torch.linspace(0, 1, 101))
        assert bool((q.diff(dim=1) >= 0).all())
        # the mean of the binned quantile function is the bin's success rate, which the prediction must be close to
        assert float((q.mean(1) - model.expected(data)).abs().mean()) < 0.06
        assert set(q.unique().tolist()) >= {0.0, 1.0}
    point = IsotonicCalibrator().fit(data)
    assert torch.equal(point.quantile(data, [0.1, 0.9])[:, 0], point.expected(data))


def test_bins_that_tie_are_merged() -> None:
    data = CalibrationData.from_arrays(score=[0.5] * 40 + [0.7] * 10, successes=[0, 1] * 20 + [1] * 10)
    model = RawScore().fit(data)
    binned = IsotonicCalibrator(spread="bins", bins=20).fit(data)
    assert len(binned.bin_quantiles_) == 2
    assert binned.quantile(data, 0.5)[-1].item() == 1.0
    assert model.quantile(data, 0.5)[-1].item() == pytest.approx(0.7)


def test_levels_of_each_row_its_own() -> None:
    data = make(50, trials=1)
    model = LogisticCalibrator(spread="bins", bins=3).fit(data)
    own = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    together = model.quantile(data, own)
    single = torch.stack([model.quantile(data, own[i])[i] for i in range(50)])
    assert torch.equal(together, single)


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        (1.5, ValueError, r"levels must lie in \[0, 1\], got 1.5"),
        ([0.1, -0.25], ValueError, r"levels must lie in \[0, 1\], got -0.25"),
        (float("nan"), ValueError, r"levels must lie in \[0, 1\], got nan"),
        ([], ValueError, r"levels must have shape \(M,\) or \(400, M\), got \(0,\)"),
        (torch.zeros(3, 2), ValueError, r"levels must have shape \(M,\) or \(400, M\), got \(3, 2\)"),
        ("median", TypeError, r"levels must be numbers, got 'median'"),
        (None, TypeError, r"levels must be a number, a flat sequence or a tensor, got NoneType"),
    ],
)
def test_bad_levels(levels: Any, error: type[Exception], message: str) -> None:
    model = RawScore().fit(make())
    with pytest.raises(error, match=message):
        model.quantile(make(), levels)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_levels_keep_their_values(levels: list[float]) -> None:
    np.testing.assert_allclose(check_levels(levels, 7, torch.device("cpu")), levels, rtol=1e-6, atol=1e-38)


def test_hidden_states_with_scores_instead_of_data() -> None:
    data = make()
    model = IsotonicCalibrator().fit(data)
    hidden = torch.zeros(400, 3)
    assert torch.equal(model.expected(hidden, data.score), model.expected(data))
    cases: tuple[tuple[Any, Any, type[Exception], str], ...] = (
        (hidden, None, TypeError, r"score must be a tensor \[B\] beside hidden states, got NoneType"),
        (hidden, data.score[:3], ValueError, r"score must have shape \(400,\), got \(3,\)"),
        (hidden[0], data.score, ValueError, r"data \(hidden states\) must have 2 dimensions, got shape \(3,\)"),
        (hidden.long(), data.score, TypeError, r"must be floating point, got torch.int64"),
        (hidden, data.score + 1, ValueError, r"score must lie in \[0, 1\], got 1"),
        (hidden / 0.0, data.score, ValueError, r"must be finite, got NaN or infinity at row 0"),
        (data, data.score, ValueError, r"score is part of a CalibrationData"),
        ([0.5], None, TypeError, r"data must be a CalibrationData or a tensor of hidden states, got list"),
    )
    for given_data, score, error, message in cases:
        with pytest.raises(error, match=message):
            model.expected(given_data, score)


def test_missing_features_are_named() -> None:
    features = np.random.default_rng(0).random((400, 2))
    model = LogisticCalibrator().fit(make(features=features, feature_names=("last", "depth")))
    with pytest.raises(ValueError, match=r"was fitted on features last, depth; depth missing: pass a CalibrationData"):
        model.expected(make())


def test_unfitted_and_badly_made() -> None:
    with pytest.raises(NotFittedError, match=r"PlattCalibrator is not fitted; call fit"):
        PlattCalibrator().expected(make())
    with pytest.raises(TypeError, match=r"data must be a CalibrationData, got list"):
        RawScore().fit([0.5])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"spread must be 'none' or 'bins', got 'wide'"):
        IsotonicCalibrator(spread="wide")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bins must be at least 1, got 0"):
        IsotonicCalibrator(bins=0)
    with pytest.raises(TypeError, match=r"bins must be an int, got float"):
        IsotonicCalibrator(bins=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"regularisation must be > 0, got 0"):
        LogisticCalibrator(regularisation=0)


def test_a_fit_that_fails_leaves_the_calibrator_unfitted() -> None:
    class Broken(RawScore):
        def _fit_point(self, inputs: Any, data: Any) -> None:
            raise RuntimeError("no")

    model = Broken()
    with pytest.raises(RuntimeError, match="no"):
        model.fit(make())
    with pytest.raises(NotFittedError):
        model.expected(make())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 50))
def test_standardiser(width: int, rows: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) * 100 + 7
    x[:, 0] = 3.25
    out = Standardiser(width).fit(x)(x)
    assert bool((out[:, 0] == 0).all())
    torch.testing.assert_close(out[:, 1:].mean(0), torch.zeros(width - 1), rtol=0, atol=1e-4)
