from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prmfast.calibration import CalibrationData, QuantileRegressionCalibrator, metrics
from prmfast.calibration.objectives import pinball
from prmfast.calibration.quantile_regression import qr_forward


def make(rows: int = 3000, seed: int = 0, width: int = 3) -> tuple[CalibrationData, np.ndarray]:
    """y = k / 64 is close to p, uniform on [0.2 + 0.4 s, 0.4 + 0.6 s] with s = sigmoid of the first hidden unit."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, width))
    s = 1 / (1 + np.exp(-hidden[:, 0]))
    low, high = 0.2 + 0.4 * s, 0.4 + 0.6 * s
    p = low + rng.random(rows) * (high - low)
    data = CalibrationData.from_arrays(
        score=np.full(rows, 0.5),
        hidden=hidden,
        successes=np.round(64 * p).astype(int),
        trials=np.full(rows, 64),
        question=[f"q{i % 100}" for i in range(rows)],
    )
    return data, np.stack((low, high), axis=1)


def test_paper_vectors(shared_vectors: Path) -> None:
    arrays = np.load(shared_vectors / "paper_qr.npz")
    for case in json.loads(str(arrays["manifest"]))["cases"]:
        name, tau = case["case"], torch.tensor(case["params"]["tau"], dtype=torch.float64)
        given = {key: torch.from_numpy(arrays[f"{name}/in/{key}"]) for key in case["in"]}
        for suffix, link in (("", "identity"), ("_sigmoid", "sigmoid")):
            wanted = {key: arrays[f"{name}/out/{key}{suffix}"] for key in ("q", "loss", "gW", "gb", "crossings")}
            weight, bias = given["W"].clone().requires_grad_(), given["b"].clone().requires_grad_()
            q = qr_forward(given["h"], weight, bias, link=link)  # type: ignore[arg-type]
            loss = pinball(q, given["y"], tau)
            loss.backward()  # type: ignore[no-untyped-call]
            pairs = q.shape[0] * (q.shape[1] - 1)
            assert weight.grad is not None
            assert bias.grad is not None
            for found, key in ((q, "q"), (loss, "loss"), (weight.grad, "gW"), (bias.grad, "gb")):
                np.testing.assert_allclose(found.detach().numpy(), wanted[key], rtol=1e-9, atol=1e-12)
            assert round(metrics.crossing_rate(q) * pairs) == int(wanted["crossings"])


def test_released_pinball_vectors(shared_vectors: Path) -> None:
    arrays = np.load(shared_vectors / "calprm_wql.npz")
    for case in json.loads(str(arrays["manifest"]))["cases"]:
        name = case["case"]
        levels = torch.tensor(case["params"]["quantiles"], dtype=torch.float64)
        target = torch.from_numpy(arrays[f"{name}/in/targets"])
        scores = torch.from_numpy(arrays[f"{name}/out/scores_f64"]).requires_grad_()
        loss = pinball(scores, target, levels)
        loss.backward()  # type: ignore[no-untyped-call]
        assert scores.grad is not None
        np.testing.assert_allclose(loss.item(), arrays[f"{name}/out/loss_f64"], rtol=1e-9)
        np.testing.assert_allclose(scores.grad.numpy(), arrays[f"{name}/out/gscores_f64"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_learns_the_conditional_quantiles(head: Any) -> None:
    data, ends = make()
    model = QuantileRegressionCalibrator(head, steps=400, learning_rate=1e-2).fit(data, progress=False)
    new, ends = make(seed=1)
    truth = ends[:, :1] + np.array([[0.1, 0.5, 0.9]]) * (ends[:, 1:] - ends[:, :1])
    error = np.abs(model.quantile(new, [0.1, 0.5, 0.9]).numpy() - truth).mean()
    marginal = np.abs(np.quantile(data.target, [0.1, 0.5, 0.9])[None, :] - truth).mean()
    assert error < 0.025 < 0.05 < marginal
    assert model.crossing_rate_ < 0.05
    mean = ends.mean(axis=1)
    assert np.abs(model.expected(new, kind="mean").numpy() - mean).mean() < 0.025


def test_other_levels_are_linear_between_and_constant_beyond() -> None:
    data, _ = make(300)
    model = QuantileRegressionCalibrator(levels=(0.2, 0.4, 0.8), steps=30).fit(data, progress=False)
    q = model.quantile(data, [0.0, 0.2, 0.3, 0.4, 0.7, 0.8, 1.0], clip=False)
    assert torch.equal(q[:, 0], q[:, 1])
    assert torch.equal(q[:, 6], q[:, 5])
    torch.testing.assert_close(q[:, 2], (q[:, 1] + q[:, 3]) / 2)
    torch.testing.assert_close(q[:, 4], q[:, 3] + 0.75 * (q[:, 5] - q[:, 3]))
    own = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
    each = torch.stack([model.quantile(data, own[i], clip=False)[i] for i in range(20)])
    torch.testing.assert_close(model.quantile(data, own, clip=False)[:20], each, rtol=0, atol=1e-6)


def test_at_its_own_levels_it_is_the_network() -> None:
    data, _ = make(300)
    model = QuantileRegressionCalibrator("mlp", steps=30).fit(data, progress=False)
    with torch.no_grad():
        raw = model._raw(model._inputs(data))
    assert torch.equal(model.quantile(data, model.levels, clip=False), raw)
    assert data.hidden is not None
    assert torch.equal(model.quantile(data.hidden, model.levels, data.score, clip=False), raw)
    assert torch.equal(model.expected(data.hidden, data.score), model.expected(data))


def test_sorting_removes_the_crossings_that_are_reported() -> None:
    rng = np.random.default_rng(0)
    data = CalibrationData.from_arrays(
        score=rng.random(400), hidden=rng.normal(size=(400, 40)), successes=rng.integers(0, 2, 400),
        question=[f"q{i % 40}" for i in range(400)],
    )  # fmt: skip
    plain = QuantileRegressionCalibrator("mlp", dropout=0.0, steps=300, learning_rate=1e-2)
    ordered = QuantileRegressionCalibrator("mlp", dropout=0.0, steps=300, learning_rate=1e-2, sort=True)
    for model in (plain, ordered):
        model.fit(data, progress=False)
    assert plain.name == "QR mlp"
    assert ordered.name == "QR mlp, sorted (rearranged)"
    assert plain.crossing_rate_ == ordered.crossing_rate_ > 0.05
    assert metrics.crossing_rate(plain.quantile(data, plain.levels, clip=False)) > 0.05
    assert metrics.crossing_rate(ordered.quantile(data, ordered.levels, clip=False)) == 0.0


def test_the_point_is_the_median_unless_asked() -> None:
    data, _ = make(300)
    model = QuantileRegressionCalibrator(steps=30).fit(data, progress=False)
    assert torch.equal(model.expected(data), model.quantile(data, 0.5)[:, 0])
    levels = metrics.LEVELS
    trapezoid = metrics.expected_from_quantiles(model.quantile(data, levels), levels)
    np.testing.assert_allclose(model.expected(data, kind="mean"), trapezoid, atol=1e-6)
    by_mean = QuantileRegressionCalibrator(steps=30, point="mean").fit(data, progress=False)
    assert torch.equal(by_mean.expected(data), model.expected(data, kind="mean"))
    with pytest.raises(ValueError, match="kind must be 'median' or 'mean', got 'mode'"):
        model.expected(data, kind="mode")  # type: ignore[arg-type]


def test_sigmoid_link_stays_inside() -> None:
    data, _ = make(300)
    q = QuantileRegressionCalibrator(link="sigmoid", steps=30).fit(data, progress=False).quantile(data, 1.0, clip=False)
    assert bool(((q > 0) & (q < 1)).all())


def test_fits_are_seeded_and_leave_the_callers_randomness_alone() -> None:
    data, _ = make(300)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    first, second, other = (
        QuantileRegressionCalibrator("mlp", steps=20, seed=s).fit(data, progress=False) for s in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(first.quantile(data, 0.3), second.quantile(data, 0.3))
    assert not torch.equal(first.quantile(data, 0.3), other.quantile(data, 0.3))


def test_a_killed_fit_continues_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prmfast.calibration import head

    data, _ = make(300)
    whole = QuantileRegressionCalibrator("mlp", steps=60).fit(data, progress=False)
    evaluate = head._HeadFit.evaluate
    calls = []

    def dies_at_the_twentieth(self: Any) -> float:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return evaluate(self)

    monkeypatch.setattr(head._HeadFit, "evaluate", dies_at_the_twentieth)
    with pytest.raises(KeyboardInterrupt):
        QuantileRegressionCalibrator("mlp", steps=60).fit(data, progress=False, checkpoint_dir=tmp_path)
    resumed = QuantileRegressionCalibrator("mlp", steps=60).fit(data, progress=False, checkpoint_dir=tmp_path)
    assert len(calls) < 2 * 60
    assert torch.equal(resumed.quantile(data, 0.3), whole.quantile(data, 0.3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head": "tree"}, ValueError, r"head must be one of \('linear', 'mlp'\), got 'tree'"),
        ({"link": "exp"}, ValueError, r"link must be one of"),
        ({"point": "mode"}, ValueError, r"point must be one of"),
        ({"levels": (0.5,)}, ValueError, r"levels must be at least 2 and ascending, got \[0.5\]"),
        ({"levels": (0.5, 0.1)}, ValueError, r"levels must be at least 2 and ascending"),
        ({"levels": (0.5, 1.1)}, ValueError, r"levels must lie in \[0, 1\], got 1.1"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"steps": 0}, ValueError, r"steps must be at least 1, got 0"),
        ({"encoder": (8, 2.5)}, TypeError, r"encoder\[1\] must be an int, got float"),
        ({"learning_rate": 0.0}, ValueError, r"learning_rate must be > 0, got 0.0"),
        ({"context": "all"}, ValueError, r"context must be one of \('auto', 'mlp', 'summary'\), got 'all'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantileRegressionCalibrator(**arguments)


def test_hidden_states_of_another_width() -> None:
    model = QuantileRegressionCalibrator(steps=5).fit(make(300)[0], progress=False)
    with pytest.raises(ValueError, match=r"was fitted on hidden states of width 3, got width 5"):
        model.quantile(make(10, width=5)[0], 0.5)
    with pytest.raises(ValueError, match=r"was fitted on hidden states of width 3, got none"):
        model.quantile(CalibrationData.from_arrays(score=[0.5], successes=[1]), 0.5)
    with pytest.raises(ValueError, match=r"was fitted on hidden states of width 3, got width 5"):
        QuantileRegressionCalibrator(steps=5).fit(make(300)[0], make(300, width=5)[0], progress=False)


def test_without_hidden_states_it_reads_the_features() -> None:
    rng = np.random.default_rng(0)
    score = rng.random(400)
    data = CalibrationData.from_arrays(
        score=score,
        successes=rng.binomial(8, score),
        trials=np.full(400, 8),
        question=[f"q{i % 40}" for i in range(400)],
    )
    model = QuantileRegressionCalibrator(steps=300, learning_rate=1e-2).fit(data, progress=False)
    assert metrics.spearman(model.expected(data), data.score) > 0.9
    assert model.hidden_width_ is None
