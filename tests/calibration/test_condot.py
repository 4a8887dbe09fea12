from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.synthetic_law import draw_rows
from prmfast.calibration import CalibrationData, CondOTCalibrator, load_calibrator
from prmfast.calibration.condot import rounded_up
from prmfast.calibration.picnn import ConditionalPicnn, beta_quantiles, smoothed_quantiles
from prmfast.calibration.training import CHECKPOINT_NAME
from tests.ops.device import backends, device_of

QUICK = {"steps": 80, "context": "mlp"}
OBJECTIVES = ("binomial", "crps", "dual")


def rows(count: int, seed: int = 0, trials: int = 8, width: int = 6) -> CalibrationData:
    rng = np.random.default_rng(seed)
    return draw_rows(count, width, rng).data(trials, rng)


@pytest.fixture(scope="module")
def data() -> CalibrationData:
    return rows(500)


@pytest.fixture(scope="module", params=[(o, link) for o in OBJECTIVES for link in ("sigmoid", "clip")], ids=str)
def fitted(request: pytest.FixtureRequest, data: CalibrationData) -> CondOTCalibrator:
    objective, link = request.param
    return CondOTCalibrator(objective, link=link, **QUICK).fit(data, progress=False)


def contexts(count: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, 6, generator=generator), torch.rand(count, generator=generator)


@pytest.mark.parametrize("backend", backends("picnn"))
def test_no_crossing_at_101_levels_of_10000_contexts(
    fitted: CondOTCalibrator, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRMFAST_BACKEND", backend)
    interpreted = backend == "triton" and device_of(backend) == "cpu"
    hidden, score = (t.to(device_of(backend)) for t in contexts(5 if interpreted else 10_000))
    quantiles = fitted.quantile(hidden, torch.linspace(0, 1, 101), score=score, clip=False)
    assert quantiles.shape == (len(hidden), 101)
    assert int((quantiles.diff(dim=1) < 0).sum()) == 0


def test_the_map_increases_before_any_rounding_is_removed(fitted: CondOTCalibrator) -> None:
    hidden, score = contexts(2_000)
    context = torch.cat([hidden, torch.logit(score, 1e-4)[:, None]], 1)
    network = fitted.network_
    _, raw = network(fitted.standardiser_(context), torch.linspace(0, 1, 101))
    assert bool((raw.diff(dim=1) > 0).all())


def test_convex_in_the_level(fitted: CondOTCalibrator) -> None:
    hidden, score = contexts(200)
    context = fitted.standardiser_(torch.cat([hidden, torch.logit(score, 1e-4)[:, None]], 1)).double()
    value, _ = fitted.network_.double()(context, torch.linspace(0, 1, 101, dtype=torch.float64))
    fitted.network_.float()
    assert bool((value[:, 1:-1] <= 0.5 * (value[:, :-2] + value[:, 2:]) + 1e-9).all())


def test_any_level_without_refit(fitted: CondOTCalibrator, data: CalibrationData) -> None:
    some = data.select(range(5))
    all_levels = fitted.quantile(some, torch.linspace(0, 1, 101))
    torch.testing.assert_close(fitted.quantile(some, 0.37)[:, 0], all_levels[:, 37], rtol=0, atol=1e-6)
    own = torch.rand(5, 7)
    assert fitted.quantile(some, own).shape == (5, 7)
    assert bool(((all_levels >= 0) & (all_levels <= 1)).all())


def test_quantiles_do_not_depend_on_the_chunk(data: CalibrationData, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrator = CondOTCalibrator("crps", **QUICK).fit(data, progress=False)
    whole = calibrator.quantile(data, [0.1, 0.9])
    monkeypatch.setattr("prmfast.calibration.network._ROWS", 100)
    torch.testing.assert_close(calibrator.quantile(data, [0.1, 0.9]), whole)


@pytest.mark.parametrize("context", ["mlp", "summary", "auto"])
def test_save_and_load_bitwise(context: str, data: CalibrationData, tmp_path: Path) -> None:
    calibrator = CondOTCalibrator(steps=40, context=context).fit(data, progress=False)
    calibrator.save_pretrained(tmp_path / "cal")
    for loaded in (load_calibrator(tmp_path / "cal"), CondOTCalibrator.from_pretrained(tmp_path / "cal")):
        assert isinstance(loaded, CondOTCalibrator)
        levels = torch.linspace(0, 1, 21)
        assert torch.equal(loaded.quantile(data, levels), calibrator.quantile(data, levels))
        assert loaded.hyperparameters() == calibrator.hyperparameters()
    assert sorted(p.name for p in (tmp_path / "cal").iterdir()) == ["config.json", "model.safetensors"]


def test_auto_keeps_the_better_context() -> None:
    wide = rows(400, width=48)
    validation = rows(200, seed=9, width=48)
    losses = {}
    for context in ("mlp", "summary", "auto"):
        losses[context] = CondOTCalibrator(steps=60, context=context).fit(wide, validation, progress=False)
    best = min(("mlp", "summary"), key=lambda name: losses[name].record_.best_loss)
    assert losses["auto"].context_kind_ == best
    assert losses["auto"].record_.best_loss == losses[best].record_.best_loss


@pytest.mark.parametrize("backend", backends("picnn"))
def test_a_fit_is_the_same_on_every_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and levels are drawn on the CPU, so without dropout only rounding is left between two devices."""
    few = rows(24)
    size = {"steps": 2, "batch_size": 8, "width": 3, "depth": 2, "encoder": [8], "dropout": 0.0, "context": "mlp"}
    quantiles = []
    for device, name in (("cpu", "reference"), (device_of(backend), backend)):
        monkeypatch.setenv("PRMFAST_BACKEND", name)
        fitted = CondOTCalibrator(device=device, **size).fit(few, progress=False)
        monkeypatch.setenv("PRMFAST_BACKEND", "reference")
        quantiles.append(fitted.quantile(few.select(range(4)), [0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles[1], quantiles[0], rtol=1e-4, atol=1e-4)


def test_seeds(data: CalibrationData) -> None:
    levels = torch.linspace(0, 1, 11)
    state = torch.get_rng_state()
    first = CondOTCalibrator(seed=1, **QUICK).fit(data, progress=False).quantile(data, levels)
    assert torch.equal(state, torch.get_rng_state()), "a fit must not move the caller's random numbers"
    torch.rand(3)
    again = CondOTCalibrator(seed=1, **QUICK).fit(data, progress=False).quantile(data, levels)
    other = CondOTCalibrator(seed=2, **QUICK).fit(data, progress=False).quantile(data, levels)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_binomial_learns_the_law_of_p_from_single_outcomes() -> None:
    """Two groups with different p; n = 1: the mean is what single outcomes can tell, and it must be right."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 2, 2000)
    p = np.where(group == 1, 0.8, 0.25)
    single = CalibrationData.from_arrays(
        score=torch.full((2000,), 0.5),
        hidden=torch.tensor(group, dtype=torch.float32)[:, None],
        successes=torch.tensor(rng.binomial(1, p)),
        trials=torch.ones(2000, dtype=torch.int64),
        question=[str(i) for i in range(2000)],
    )
    calibrator = CondOTCalibrator(steps=200, context="mlp").fit(single, progress=False)
    mean = calibrator.expected(torch.tensor([[0.0], [1.0]]), score=torch.tensor([0.5, 0.5]))
    assert mean.tolist() == pytest.approx([0.25, 0.8], abs=0.06)


def test_binomial_beats_crps_on_the_law_of_p_with_few_rollouts() -> None:
    """Two rollouts a row: k/2 has atoms that p has not, and only the likelihood knows."""
    rng = np.random.default_rng(0)
    p = rng.beta(2.0, 2.0, 6000)
    pairs = CalibrationData.from_arrays(
        score=torch.full((6000,), 0.5),
        hidden=torch.zeros(6000, 1),
        successes=torch.tensor(rng.binomial(2, p)),
        trials=torch.full((6000,), 2),
        question=[str(i) for i in range(6000)],
    )
    levels = (torch.arange(50) + 0.5) / 50
    truth = torch.tensor(np.quantile(p, levels.numpy()), dtype=torch.float32)
    error = {}
    for objective in ("binomial", "crps"):
        calibrator = CondOTCalibrator(objective, steps=200, context="mlp").fit(pairs, progress=False)
        error[objective] = float(
            (calibrator.quantile(torch.zeros(1, 1), levels, score=torch.tensor([0.5])) - truth).abs().mean()
        )
    assert error["binomial"] < 0.05
    assert error["binomial"] < 0.5 * error["crps"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_interrupted_fit_continues_bit_equal(objective: str, data: CalibrationData, tmp_path: Path) -> None:
    options = {"steps": 60, "context": "mlp"}
    whole = CondOTCalibrator(objective, **options).fit(data, progress=False)
    calls = 0
    original = torch.save

    class Stopped(RuntimeError):
        pass

    def save(state: object, path: object) -> None:
        nonlocal calls
        original(state, path)
        calls += 1
        if calls == 7:
            raise Stopped

    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "save", save)
    interrupted = CondOTCalibrator(objective, **options)
    with pytest.raises(Stopped):
        interrupted.fit(data, progress=False, checkpoint_dir=tmp_path)
    patch.undo()
    assert not hasattr(interrupted, "provenance_")
    assert [p.name for p in (tmp_path / "mlp").iterdir()] == [CHECKPOINT_NAME]
    resumed = CondOTCalibrator(objective, **options).fit(data, progress=False, checkpoint_dir=tmp_path)
    levels = torch.linspace(0, 1, 11)
    assert torch.equal(resumed.quantile(data, levels), whole.quantile(data, levels))
    assert resumed.record_ == whole.record_


@pytest.mark.slow
def test_a_killed_fit_continues_bit_equal(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, torch; torch.set_num_threads(1)\n"
        "from tests.calibration.test_condot import rows\n"
        "from prmfast.calibration import CondOTCalibrator\n"
        "fit = CondOTCalibrator(steps=240, context='mlp').fit(rows(300), progress=False, checkpoint_dir=sys.argv[1])\n"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, env={**os.environ})
    checkpoint = tmp_path / "mlp" / CHECKPOINT_NAME
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    levels = torch.linspace(0, 1, 11)
    data = rows(300)
    resumed = CondOTCalibrator(steps=240, context="mlp").fit(data, progress=False, checkpoint_dir=tmp_path)
    whole = CondOTCalibrator(steps=240, context="mlp").fit(data, progress=False)
    assert torch.equal(resumed.quantile(data, levels), whole.quantile(data, levels))


def test_a_foreign_or_damaged_checkpoint_is_refused(data: CalibrationData, tmp_path: Path) -> None:
    CondOTCalibrator(steps=5, context="mlp").fit(data, progress=False, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="belongs to a fit with other data or settings"):
        CondOTCalibrator(steps=6, context="mlp").fit(data, progress=False, checkpoint_dir=tmp_path)
    (tmp_path / "mlp" / CHECKPOINT_NAME).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a checkpoint of a fit"):
        CondOTCalibrator(steps=5, context="mlp").fit(data, progress=False, checkpoint_dir=tmp_path)


@pytest.mark.parametrize("selection", ["wql", "likelihood", "area"])
def test_selection_rules(selection: str, data: CalibrationData) -> None:
    calibrator = CondOTCalibrator("crps", selection=selection, steps=60, context="mlp").fit(data, progress=False)
    record = calibrator.record_
    assert record.best_loss == min(record.losses)
    assert record.finished


def test_patience_stops_early(data: CalibrationData) -> None:
    calibrator = CondOTCalibrator(steps=240, patience=1, context="mlp", learning_rate=1e-9).fit(data, progress=False)
    assert calibrator.record_.steps_run < 240


def test_without_hidden_states_the_features_are_the_context() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(300, generator=generator)
    plain = CalibrationData.from_arrays(
        score=score,
        successes=(torch.rand(300, generator=generator) < score).long(),
        trials=torch.ones(300, dtype=torch.int64),
        question=[str(i // 3) for i in range(300)],
    )
    calibrator = CondOTCalibrator(steps=60).fit(plain, progress=False)
    assert calibrator.context_kind_ == "mlp"
    assert calibrator.expected(plain).shape == (300,)


def test_initial_map_follows_the_curve() -> None:
    curve = smoothed_quantiles(np.random.default_rng(0).beta(0.5, 0.7, 5000))
    network = ConditionalPicnn(9, encoder=(16,), dropout=0.1, width=32, depth=2).eval()
    network.initialise(curve, generator=torch.Generator().manual_seed(0))
    _, found = network(0.5 * torch.randn(20, 9), torch.linspace(0, 1, 101))
    assert float((found.detach() - torch.tensor(curve)).abs().max()) < 0.1


def test_beta_quantiles_match_moments_and_fall_back_for_single_outcomes() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(2.0, 3.0, 100_000)
    curve = beta_quantiles(rng.binomial(4, p).astype(float), np.full(100_000, 4.0))
    assert np.abs(curve - np.quantile(p, (np.arange(101) + 0.5) / 101)).max() < 0.02
    single = beta_quantiles(rng.binomial(1, p).astype(float), np.ones(100_000))
    assert abs(single.mean() - p.mean()) < 0.02


def test_rounded_up_keeps_the_callers_level_order() -> None:
    levels = torch.tensor([0.9, 0.1, 0.5])
    quantiles = torch.tensor([[0.7, 0.2, 0.1]])
    assert rounded_up(quantiles, levels).tolist() == [pytest.approx([0.7, 0.2, 0.2])]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"objective": "mse"}, ValueError, "objective must be one of .* got 'mse'"),
        ({"link": "tanh"}, ValueError, "link must be one of"),
        ({"context": "hidden"}, ValueError, "context must be one of"),
        ({"selection": "loss"}, ValueError, "selection must be one of"),
        ({"source": "score"}, ValueError, "source='score' needs objective='dual', got objective='binomial'"),
        ({"width": 0}, ValueError, "width must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an int, got float"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"encoder": ()}, ValueError, "encoder must have at least one layer"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be > 0, got 0.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CondOTCalibrator(**arguments)  # type: ignore[arg-type]


def test_bad_queries(data: CalibrationData) -> None:
    calibrator = CondOTCalibrator(steps=5, context="mlp").fit(data, progress=False)
    hidden, score = contexts(3)
    with pytest.raises(ValueError, match=r"levels must lie in \[0, 1\], got 1.5"):
        calibrator.quantile(hidden, [0.5, 1.5], score=score)
    with pytest.raises(ValueError, match="hidden states of width 6, got width 4"):
        calibrator.quantile(hidden[:, :4], 0.5, score=score)
    with pytest.raises(ValueError, match="score must lie in"):
        calibrator.quantile(hidden, 0.5, score=score + 1)
    with pytest.raises(TypeError, match="score must be a tensor"):
        calibrator.quantile(hidden, 0.5)
    with pytest.raises(RuntimeError, match="is not fitted"):
        CondOTCalibrator().quantile(hidden, 0.5, score=score)


def test_hidden_states_alone_are_enough(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 5, generator=generator)
    successes = torch.distributions.Binomial(8, torch.sigmoid(hidden[:, 0])).sample().long()
    scoreless = CalibrationData.from_arrays(hidden=hidden, successes=successes, trials=torch.full((300,), 8))
    calibrator = CondOTCalibrator(**QUICK).fit(scoreless, progress=False)
    expected = calibrator.expected(hidden)
    assert torch.equal(expected, calibrator.expected(scoreless))
    calibrator.save_pretrained(tmp_path)
    assert torch.equal(CondOTCalibrator.from_pretrained(tmp_path).expected(hidden), expected)
    with pytest.raises(ValueError, match="score=None needs hidden or features"):
        CalibrationData.from_arrays(successes=successes)


def test_score_source_and_dual(data: CalibrationData) -> None:
    calibrator = CondOTCalibrator("dual", source="score", steps=30, context="mlp").fit(data, progress=False)
    assert bool(torch.isfinite(calibrator.quantile(data, [0.1, 0.5])).all())
