from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import beta as beta_law

from prmfast.calibration import BetaBinomialCalibrator, CalibrationData, metrics
from prmfast.calibration.beta_binomial import InflatedBeta


def laws() -> InflatedBeta:
    raw = torch.tensor(
        [[-1.0, -2.0, 0.5, 0.3], [-30.0, -30.0, -2.0, 3.0], [2.0, 3.0, 0.0, -3.0], [0.0, -50.0, 6.0, 8.0]]
    )
    return InflatedBeta.from_raw(raw)


def test_likelihood_is_the_integral_over_p() -> None:
    law = laws()
    zero, one = law.atoms
    for row in range(2):
        a, b = float(law.alpha[row]), float(law.beta[row])
        inside = 1 - float(zero[row]) - float(one[row])
        for k, n in ((0, 1), (1, 1), (0, 8), (3, 8), (8, 8)):
            density = beta_law(a, b).pdf
            integral = quad(lambda p: p**k * (1 - p) ** (n - k) * density(p), 0, 1, epsabs=1e-12)[0]  # noqa: B023
            wanted = inside * integral + float(zero[row]) * (k == 0) + float(one[row]) * (k == n)
            found = law.log_likelihood(torch.full((4,), k), torch.full((4,), n))[row]
            assert float(found.exp()) == pytest.approx(wanted, rel=1e-6)


def test_likelihoods_of_all_outcomes_sum_to_one() -> None:
    from scipy.special import comb

    n = 11
    each = [laws().log_likelihood(torch.full((4,), k), torch.full((4,), n)).exp() * comb(n, k) for k in range(n + 1)]
    torch.testing.assert_close(torch.stack(each).sum(0), torch.ones(4, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_quantile_inverts_the_distribution_function() -> None:
    law = laws()
    levels = torch.linspace(0, 1, 1001, dtype=torch.float64)
    q = law.quantile(levels).numpy()
    zero, one = (x.numpy()[:, None] for x in law.atoms)
    cdf = zero + (1 - zero - one) * beta_law.cdf(q, law.alpha.numpy()[:, None], law.beta.numpy()[:, None])
    inside = (q > 1e-12) & (q < 1 - 1e-12)
    np.testing.assert_allclose(cdf[inside], np.broadcast_to(levels.numpy(), q.shape)[inside], atol=1e-8)
    assert (np.diff(q, axis=1) >= 0).all()
    assert (q[np.broadcast_to(levels.numpy(), q.shape) <= zero] == 0).all()
    assert (q[np.broadcast_to(levels.numpy(), q.shape) >= 1 - one] == 1).all()


def test_mean_is_the_integral_of_the_quantile_function() -> None:
    levels = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    torch.testing.assert_close(laws().quantile(levels).mean(1), laws().mean(), rtol=0, atol=1e-4)


def test_gradients_are_those_of_finite_differences_and_never_nan() -> None:
    raw = torch.tensor([[-1.0, -2.0, 0.5, 0.3], [0.3, 0.1, -2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    k, n = torch.tensor([0, 5]), torch.tensor([4, 5])
    assert torch.autograd.gradcheck(lambda r: InflatedBeta.from_raw(r).log_likelihood(k, n), (raw,))
    extreme = torch.tensor([[-900.0, 900.0, 80.0, 90.0], [900.0, -900.0, -80.0, -90.0]], requires_grad=True)
    InflatedBeta.from_raw(extreme).log_likelihood(torch.tensor([0, 3]), torch.tensor([3, 3])).sum().backward()
    assert extreme.grad is not None
    assert bool(torch.isfinite(extreme.grad).all())


def make(rows: int, seed: int, trials: np.ndarray | int) -> tuple[CalibrationData, np.ndarray]:
    """p is 0 with probability 0.2, else Beta with a mean that follows the first of four hidden units."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, 4))
    mean = 1 / (1 + np.exp(-1.5 * hidden[:, 0]))
    p = np.where(rng.random(rows) < 0.2, 0.0, rng.beta(6 * mean, 6 * (1 - mean)))
    n = np.broadcast_to(trials, rows)
    data = CalibrationData.from_arrays(
        score=np.full(rows, 0.5), hidden=hidden, successes=rng.binomial(n, p), trials=n.copy(),
        question=[f"q{i % 200}" for i in range(rows)],
    )  # fmt: skip
    levels = (np.arange(50) + 0.5) / 50
    inner = np.clip((levels[None, :] - 0.2) / 0.8, 0, 1)
    return data, np.where(levels < 0.2, 0.0, beta_law.ppf(inner, 6 * mean[:, None], 6 * (1 - mean[:, None])))


@pytest.mark.parametrize("mixed", [False, True])
def test_recovers_the_law_of_p_from_counts(mixed: bool) -> None:
    levels = (np.arange(50) + 0.5) / 50
    trials = np.random.default_rng(9).integers(1, 12, 4000) if mixed else 8
    data, _ = make(4000, 0, trials)
    model = BetaBinomialCalibrator(context="mlp", steps=350, learning_rate=1e-2).fit(data, progress=False)
    new, truth = make(800, 1, 8)
    found = model.quantile(new, levels.tolist())
    marginal = np.sort(truth.ravel()).reshape(50, -1).mean(axis=1)
    assert np.abs(found.numpy() - truth).mean() < 0.045 < 0.5 * np.abs(marginal[None, :] - truth).mean()
    assert metrics.crossing_rate(found) == 0.0
    assert float((model.expected(new) - torch.from_numpy(truth.mean(axis=1))).abs().mean()) < 0.04
    u = metrics.pit(found, new.successes, new.trials, law="probability")
    assert metrics.pit_error(u, new.hidden[:, 0] if new.hidden is not None else new.score, groups=3) < 0.09


def test_auto_context_takes_the_better_validation_likelihood() -> None:
    data, _ = make(400, 0, 4)
    fits = {
        kind: BetaBinomialCalibrator(context=kind, steps=60).fit(data, progress=False)  # type: ignore[arg-type]
        for kind in ("mlp", "summary", "auto")
    }
    best = min(("mlp", "summary"), key=lambda kind: fits[kind].record_.best_loss)
    assert fits["auto"].context_kind_ == best
    assert torch.equal(fits["auto"].quantile(data, 0.4), fits[best].quantile(data, 0.4))


def test_single_outcomes_of_one_kind() -> None:
    data = CalibrationData.from_arrays(
        score=np.linspace(0.1, 0.9, 60), successes=[1] * 60, question=[f"q{i % 12}" for i in range(60)]
    )
    model = BetaBinomialCalibrator(steps=200, learning_rate=1e-2).fit(data, progress=False)
    assert float(model.expected(data).min()) > 0.85
    assert bool(torch.isfinite(model.quantile(data, [0.0, 0.5, 1.0])).all())


def test_too_few_questions_to_hold_one_out() -> None:
    data = CalibrationData.from_arrays(score=[0.5] * 9, successes=[1] * 9, question=["q"] * 9)
    with pytest.raises(ValueError, match="a split by question needs at least 2 questions, got 1"):
        BetaBinomialCalibrator().fit(data)
