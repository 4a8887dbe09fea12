"""Calibration metrics with bootstrap intervals by question; torch or numpy in, float64 inside, floats out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    from prmfast.calibration.base import Calibrator
    from prmfast.calibration.data import CalibrationData

ArrayLike = Any
Array = npt.NDArray[Any]
Positive = Literal["class", "strict", "over", "weighted"]
Rule = Literal["trapezoid", "mean"]
LEVELS = tuple(i / 10 for i in range(11))


class Interval(NamedTuple):
    """A metric's value and its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Terms:
    """A metric as row means: ``values`` [N, C] and how the means [..., C] of any sample of rows combine to [...]."""

    values: Array
    combine: Callable[[Array], Array]

    def value(self) -> float:
        """The metric over all rows."""
        return float(self.combine(self.values.mean(axis=0)))


def _array(name: str, value: ArrayLike, ndim: int) -> Array:
    raw = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value, dtype=np.float64)
    if raw.ndim != ndim or raw.size == 0:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)} and a row, got shape {raw.shape}")
    if not np.isfinite(raw).all():
        row = int(np.argwhere(~np.isfinite(raw))[0][0])
        raise ValueError(f"{name} must be finite, got NaN or infinity at row {row}")
    return np.asarray(raw)


def _pair(p: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    predicted, target = _array("p", p, 1), _array("y", y, 1)
    if predicted.shape != target.shape:
        raise ValueError(f"y must have shape {predicted.shape} like p, got {target.shape}")
    return predicted, target


def _quantiles(q: ArrayLike, levels: ArrayLike) -> tuple[Array, Array]:
    quantiles, taus = _array("quantiles", q, 2), _array("levels", levels, 1)
    if quantiles.shape[1] != len(taus):
        raise ValueError(f"quantiles must have shape (N, {len(taus)}) for {len(taus)} levels, got {quantiles.shape}")
    return quantiles, taus


def _with_target(q: ArrayLike, y: ArrayLike, levels: ArrayLike) -> tuple[Array, Array, Array]:
    quantiles, taus = _quantiles(q, levels)
    target = _array("y", y, 1)
    if len(target) != len(quantiles):
        raise ValueError(f"y must have shape ({len(quantiles)},), got {target.shape}")
    return quantiles, target, taus


def _first(means: Array) -> Array:
    return np.asarray(means[..., 0])


def _ratio(means: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(means[..., 0] / means[..., 1])


def brier_terms(p: ArrayLike, y: ArrayLike) -> Terms:
    """Row terms of `brier`."""
    predicted, target = _pair(p, y)
    return Terms(((predicted - target) ** 2)[:, None], _first)


def pos_brier_terms(p: ArrayLike, y: ArrayLike, positive: Positive = "class") -> Terms:
    """Row terms of `pos_brier`."""
    predicted, target = _pair(p, y)
    error = predicted - target
    if positive in ("class", "strict"):
        chosen = (target >= 0.5 if positive == "class" else target > 0.5).astype(np.float64)
        return Terms(np.stack((chosen * error**2, chosen), axis=1), _ratio)
    if positive == "over":
        return Terms((np.maximum(error, 0.0) ** 2)[:, None], _first)
    if positive == "weighted":
        return Terms((target * error**2)[:, None], _first)
    raise ValueError(f"positive must be 'class', 'strict', 'over' or 'weighted', got {positive!r}")


def ece_terms(p: ArrayLike, y: ArrayLike, *, bins: int = 12, eps: float = 1e-3) -> Terms:
    """Row terms of `ece`: the signed error, in the column of its bin."""
    predicted, target = _pair(p, y)
    if bins < 1 or eps < 0:
        raise ValueError(f"bins must be at least 1 and eps at least 0, got {bins} and {eps}")
    edges = np.linspace(-eps, 1.0 + eps, bins + 1)
    bin_of = np.digitize(predicted, edges) - 1
    inside = (bin_of >= 0) & (bin_of < bins)
    values = np.zeros((len(predicted), bins))
    values[inside, bin_of[inside]] = (predicted - target)[inside]
    return Terms(values, lambda means: np.asarray(np.abs(means).sum(axis=-1)))


def wql_terms(quantiles: ArrayLike, y: ArrayLike, levels: ArrayLike = LEVELS) -> Terms:
    """Row terms of `wql`."""
    q, target, taus = _with_target(quantiles, y, levels)
    error = target[:, None] - q
    return Terms(np.maximum(taus * error, (taus - 1.0) * error).mean(axis=1)[:, None], _first)


def area_terms(quantiles: ArrayLike, y: ArrayLike, levels: ArrayLike = LEVELS, *, rule: Rule = "trapezoid") -> Terms:
    """Row terms of `calibration_area`."""
    q, target, taus = _with_target(quantiles, y, levels)
    below = (target[:, None] <= q).astype(np.float64)
    if rule == "trapezoid":
        return Terms(below, lambda curve: np.asarray(np.trapezoid(np.abs(curve - taus), taus, axis=-1)))
    if rule == "mean":
        return Terms(below, lambda curve: np.asarray(np.abs(curve - taus).mean(axis=-1)))
    raise ValueError(f"rule must be 'trapezoid' or 'mean', got {rule!r}")


def crossing_terms(quantiles: ArrayLike) -> Terms:
    """Row terms of `crossing_rate`."""
    q = _array("quantiles", quantiles, 2)
    if q.shape[1] < 2:
        raise ValueError(f"quantiles must have at least 2 levels to cross, got {q.shape[1]}")
    return Terms((np.diff(q, axis=1) < 0).mean(axis=1)[:, None], _first)


def brier(p: ArrayLike, y: ArrayLike) -> float:
    """``mean((p - y)^2)`` of predictions [N] against success rates or outcomes [N]."""
    return brier_terms(p, y).value()


def pos_brier(p: ArrayLike, y: ArrayLike, *, positive: Positive = "class") -> float:
    """Brier score of the positives, which the paper names without a formula [D sec. 5.2].

    "class": the mean over the rows with y >= 0.5 (NaN if there is none), "strict": over those with y > 0.5, which
    differs where an even number of rollouts ties; "over": ``mean(max(p - y, 0)^2)``, the optimistic part; "weighted":
    ``mean(y (p - y)^2)``.
    """
    return pos_brier_terms(p, y, positive).value()


def ece(p: ArrayLike, y: ArrayLike, *, bins: int = 12, eps: float = 1e-3) -> float:
    """Expected calibration error: ``sum_b n_b / N |mean p - mean y|`` over equal-width bins on [-eps, 1 + eps]."""
    return ece_terms(p, y, bins=bins, eps=eps).value()


def wql(quantiles: ArrayLike, y: ArrayLike, levels: ArrayLike = LEVELS) -> float:
    """Pinball loss of quantiles [N, M] against y [N], averaged over rows, then over levels [M]."""
    return wql_terms(quantiles, y, levels).value()


def calibration_curve(quantiles: ArrayLike, y: ArrayLike) -> Array:
    """``P(y <= Q(level))`` for every level: [N, M] and [N] -> [M] float64. Calibrated: equal to the levels."""
    q = _array("quantiles", quantiles, 2)
    return np.asarray(area_terms(q, y, np.linspace(0.0, 1.0, q.shape[1])).values.mean(axis=0))


def calibration_area(
    quantiles: ArrayLike, y: ArrayLike, levels: ArrayLike = LEVELS, *, rule: Rule = "trapezoid"
) -> float:
    """Area between the calibration curve and the diagonal, by the trapezoid rule or as the plain mean over levels."""
    return area_terms(quantiles, y, levels, rule=rule).value()


def crossing_rate(quantiles: ArrayLike) -> float:
    """Share of adjacent level pairs with ``Q(b') < Q(b)``, for quantiles [N, M] at ascending levels."""
    return crossing_terms(quantiles).value()


def expected_from_quantiles(quantiles: ArrayLike, levels: ArrayLike = LEVELS) -> Array:
    """E[p] as the trapezoid over the levels [D sec. 5.2]: [N, M] and [M] -> [N] float64. Clips nothing."""
    q, taus = _quantiles(quantiles, levels)
    return np.asarray(np.trapezoid(q, taus, axis=1))


def frequency_quantiles(quantiles: ArrayLike, trials: ArrayLike, levels: ArrayLike = LEVELS) -> Array:
    """Quantiles of k/n when those of p are known: [N, M] at midpoint levels, n [N] -> [N, L] float64.

    k given p is binomial, so a law of p says what k/n must look like; a method that fits p itself is compared with one
    that fits k/n through this.
    """
    q = np.clip(_array("quantiles", quantiles, 2), 0.0, 1.0)
    n, taus = _array("trials", trials, 1), _array("levels", levels, 1)
    if len(n) != len(q) or (n < 1).any():
        raise ValueError(
            f"trials must have shape ({len(q)},) and be at least 1, got shape {n.shape}, least {n.min():g}"
        )
    from scipy.stats import binom

    result = np.zeros((len(q), len(taus)))
    for count in np.unique(n):
        rows = np.flatnonzero(n == count)
        k = np.arange(int(count))
        cdf = np.stack([binom.cdf(i, count, q[rows]).mean(axis=1) for i in k], axis=1)
        # the least k with P(K <= k) >= level; the slack keeps level 1.0 on the side that rounding took it from
        result[rows] = (cdf[:, None, :] < taus[None, :, None] - 1e-12).sum(axis=2) / count
    return result


def spearman(p: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation with mean ranks for ties; NaN if either side is constant."""
    from scipy.stats import rankdata

    predicted, target = _pair(p, y)
    a, b = rankdata(predicted), rankdata(target)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else float("nan")


def pit(
    quantiles: ArrayLike,
    successes: ArrayLike,
    trials: ArrayLike,
    levels: ArrayLike | None = None,
    *,
    law: Literal["frequency", "probability"] = "frequency",
    seed: int = 0,
) -> Array:
    """Randomised probability integral transform of k of n: [N] float64, uniform if the quantiles [N, M] are right.

    law="frequency": the quantiles are those of k/n. A smooth quantile function cannot have the grid's atoms, so k/n
    stands for its cell ((k - 1/2)/n, (k + 1/2)/n], open-ended at 0 and n; u is drawn between the cell's two ends.
    law="probability": the quantiles are those of p itself, at midpoint levels; u is drawn between P(K < k) and
    P(K <= k) of their binomial mixture. ``levels`` defaults to the midpoints (m + 1/2) / M.
    """
    q = np.sort(_array("quantiles", quantiles, 2), axis=1)
    k, n = _array("successes", successes, 1), _array("trials", trials, 1)
    if not len(k) == len(n) == len(q):
        raise ValueError(f"successes and trials must have shape ({len(q)},), got {k.shape} and {n.shape}")
    columns = q.shape[1]
    taus = (np.arange(columns) + 0.5) / columns if levels is None else _quantiles(q, levels)[1]
    if law == "frequency":
        low = np.where(k <= 0, 0.0, _cdf(q, taus, (k - 0.5) / n))
        high = np.where(k >= n, 1.0, _cdf(q, taus, (k + 0.5) / n))
    elif law == "probability":
        from scipy.stats import binom

        inside = np.clip(q, 0.0, 1.0)
        high = binom.cdf(k[:, None], n[:, None], inside).mean(axis=1)
        low = np.where(k <= 0, 0.0, binom.cdf(k[:, None] - 1.0, n[:, None], inside).mean(axis=1))
    else:
        raise ValueError(f"law must be 'frequency' or 'probability', got {law!r}")
    # a stream of its own: with plain default_rng(seed) the draws could repeat those that made the caller's data
    draws = np.random.default_rng((seed, 0x504954)).random(len(k))
    return np.asarray(low + draws * (high - low))


def _cdf(q: Array, taus: Array, at: Array) -> Array:
    """Level at which sorted quantiles [N, M] pass ``at`` [N]: linear between levels, 0 and 1 beyond the ends."""
    below = (q <= at[:, None]).sum(axis=1)
    row = np.arange(len(q))
    left, right = np.clip(below - 1, 0, q.shape[1] - 1), np.clip(below, 0, q.shape[1] - 1)
    gap = q[row, right] - q[row, left]
    share = np.where(gap > 0, (at - q[row, left]) / np.where(gap > 0, gap, 1.0), 0.0)
    inner = taus[left] + share * (taus[right] - taus[left])
    return np.where(below == 0, 0.0, np.where(below == q.shape[1], 1.0, inner))


def pit_error(u: ArrayLike, score: ArrayLike, *, groups: int = 5) -> float:
    """Mean over equal-count groups of ``score`` of the Kolmogorov distance between PIT values and the uniform law.

    Looks at each group on its own, so that a model that ignores its context does not pass.
    """
    values, by = _pair(u, score)
    if not 1 <= groups <= len(values):
        raise ValueError(f"groups must lie in [1, {len(values)}], got {groups}")
    order = np.argsort(by, kind="stable")
    distances = []
    for part in np.array_split(values[order], groups):
        ordered = np.sort(part)
        ranks = np.arange(len(part) + 1) / len(part)
        distances.append(max(float((ranks[1:] - ordered).max()), float((ordered - ranks[:-1]).max())))
    return float(np.mean(distances))


def bootstrap(
    metric: Terms | ArrayLike | Callable[[Array], float],
    question: Sequence[str] | Array,
    *,
    n: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """(value, low, high): percentile interval from resampling whole questions, as rows of one question hang together.

    ``metric``: the `Terms` of a metric or row values [N] (their mean), both without a loop over the rows; or any
    function of an array of row numbers, called n + 1 times.

    ECE and area are sums of absolute values: resampling noise makes them larger, so that their intervals lie high and
    may leave out a small value.
    """
    _, codes = np.unique(np.asarray(question), return_inverse=True)
    rows, questions = len(codes), int(codes.max()) + 1
    if n < 1 or not 0 < confidence < 1:
        raise ValueError(f"n must be at least 1 and confidence lie in (0, 1), got {n} and {confidence}")
    rng = np.random.default_rng(seed)
    if callable(metric):
        members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
        value = float(metric(np.arange(rows)))
        draws = rng.integers(questions, size=(n, questions))
        samples = np.array([metric(np.concatenate([members[i] for i in draw])) for draw in draws], dtype=np.float64)
    else:
        terms = metric if isinstance(metric, Terms) else Terms(_array("metric", metric, 1)[:, None], _first)
        if len(terms.values) != rows:
            raise ValueError(f"question must name {len(terms.values)} rows, got {rows}")
        value = terms.value()
        samples = _resample(terms, codes, questions, n, rng)
    known = samples[~np.isnan(samples)]
    if len(known) == 0:
        return Interval(value, float("nan"), float("nan"))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(known, (tail, 1.0 - tail))
    return Interval(value, float(low), float(high))


def _resample(terms: Terms, codes: Array, questions: int, n: int, rng: np.random.Generator) -> Array:
    columns = np.concatenate((terms.values, np.ones((len(codes), 1))), axis=1)
    sums = np.zeros((questions, columns.shape[1]))
    np.add.at(sums, codes, columns)
    samples = []
    block = max(1, 4_000_000 // questions)
    for start in range(0, n, block):
        counts = rng.multinomial(questions, np.full(questions, 1.0 / questions), size=min(block, n - start))
        totals = counts.astype(np.float64) @ sums
        samples.append(terms.combine(totals[:, :-1] / totals[:, -1:]))
    return np.concatenate(samples)


def terms_of(
    p: ArrayLike, quantiles: ArrayLike, y: ArrayLike, *, raw_quantiles: ArrayLike | None = None
) -> dict[str, Terms]:
    """Terms of every metric of `summary` but the rank correlation, from predictions [N] and quantiles [N, 11]."""
    return {
        "brier": brier_terms(p, y),
        "pos_brier": pos_brier_terms(p, y),
        "ece": ece_terms(p, y),
        "wql": wql_terms(quantiles, y),
        "area": area_terms(quantiles, y),
        "crossing_rate": crossing_terms(quantiles if raw_quantiles is None else raw_quantiles),
    }


def summary(calibrator: Calibrator, data: CalibrationData, *, n: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Every metric of a fitted calibrator on ``data`` with its 95 % interval by question.

    Brier, PosBrier, ECE and Spearman of `expected`; WQL and area of the clipped quantiles at 11 levels; the crossing
    rate of the unclipped ones.
    """
    raw = calibrator.quantile(data, LEVELS, clip=False)
    p, y = calibrator.expected(data), data.target
    codes = data.question_codes().numpy()
    terms = terms_of(p, raw.clamp(0.0, 1.0), y, raw_quantiles=raw)
    result = {name: bootstrap(term, codes, n=n, seed=seed) for name, term in terms.items()}
    predicted, target = _pair(p, y)
    result["spearman"] = bootstrap(
        lambda rows: spearman(predicted[rows], target[rows]), codes, n=min(n, 200), seed=seed
    )
    return result
