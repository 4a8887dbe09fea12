"""Finding the first wrong step of a chain, as ProcessBench scores it ([V] arXiv 2604.13197, eq. 30 and 31)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prmfast.calibration.metrics import Terms

Array = npt.NDArray[np.float64]
Chains = Sequence[Sequence[float]]


class FirstErrorMetrics(NamedTuple):
    """Harmonic mean of two accuracies: on chains with an error its exact place, on others that none is found.

    Each is NaN where there is no such chain.
    """

    f1: float
    accuracy_error: float
    accuracy_correct: float


def first_errors(step_scores: Chains, threshold: float) -> list[int]:
    """Index of each chain's first step whose score is under the threshold, -1 where none is."""
    return [next((i for i, score in enumerate(chain) if score < threshold), -1) for chain in step_scores]


def first_error_terms(predicted: Sequence[int], labels: Sequence[int]) -> Terms:
    """Row terms of the F1, for `calibration.metrics.bootstrap`."""
    truth, found = np.asarray(labels), np.asarray(predicted)
    wrong, hit = truth != -1, truth == found
    columns = np.stack((hit & wrong, wrong, hit & ~wrong, ~wrong), axis=1).astype(np.float64)

    def combine(means: Any) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(_harmonic(means[..., 0] / means[..., 1], means[..., 2] / means[..., 3]))

    return Terms(columns, combine)


def first_error_metrics(predicted: Sequence[int], labels: Sequence[int]) -> FirstErrorMetrics:
    """F1 of predicted first errors against ``labels``: the index of the first wrong step, -1 for none."""
    if len(predicted) != len(labels):
        raise ValueError(f"predicted must have one entry per label ({len(labels)}), got {len(predicted)}")
    truth, found = np.asarray(labels), np.asarray(predicted)
    wrong = truth != -1
    hit = (truth == found).astype(np.float64)
    error = float(hit[wrong].mean()) if wrong.any() else math.nan
    correct = float(hit[~wrong].mean()) if not wrong.all() else math.nan
    return FirstErrorMetrics(float(_harmonic(np.float64(error), np.float64(correct))), error, correct)


def optimal_threshold(step_scores: Chains, labels: Sequence[int]) -> float:
    """The threshold of the highest F1 on these chains, exactly: from the sorted scores, not from a grid.

    F1 is constant between neighbouring scores; the answer is the middle of the best such gap, of the lowest one among
    equals, so that it holds for new scores on both sides.

    step_scores: one sequence of finite scores per chain, none empty. labels: index of the first wrong step, -1 for
    none. ValueError for what is not that, and unless there are chains with an error and chains without.
    """
    error, correct = _intervals(step_scores, labels)
    edges = np.unique(np.concatenate([np.asarray(chain, dtype=np.float64) for chain in step_scores]))
    tops = np.append(edges, np.inf)  # gap i is (edges[i - 1], tops[i]]: every threshold in it predicts the same
    best = int(np.argmax(_f1_at(error, correct, tops)))
    if best == 0:
        return float(edges[0])
    if best == len(edges):
        return math.nextafter(float(edges[-1]), math.inf)
    low, high = float(edges[best - 1]), float(edges[best])
    middle = low + (high - low) / 2
    return middle if middle > low else high


def grid_threshold(
    step_scores: Chains, labels: Sequence[int], thresholds: Sequence[float] | Array
) -> tuple[float | None, float]:
    """The released search: the first of ``thresholds`` with the highest F1, and that F1, on the same chains.

    (None, 0.0) where one of the two classes is empty or no threshold gets anything right. Optimistic, since it reports
    what it has chosen on; `cross_fitted_first_errors` does not.
    """
    truth = np.asarray(labels)
    if (truth == -1).all() or (truth != -1).all():
        return None, 0.0
    error, correct = _intervals(step_scores, labels)
    grid = np.asarray(thresholds, dtype=np.float64)
    f1 = _f1_at(error, correct, grid)
    best = int(np.argmax(f1))
    return (float(grid[best]), float(f1[best])) if f1[best] > 0 else (None, 0.0)


def _intervals(step_scores: Chains, labels: Sequence[int]) -> tuple[Array, Array]:
    """Which thresholds are right: (low, high] for a chain with an error [E, 2], up to a number for the others [C]."""
    if len(step_scores) != len(labels):
        raise ValueError(f"labels must have one entry per chain ({len(step_scores)}), got {len(labels)}")
    error, correct = [], []
    for i, (chain, label) in enumerate(zip(step_scores, labels, strict=True)):
        scores = np.asarray(chain, dtype=np.float64)
        if scores.ndim != 1 or len(scores) == 0 or not np.isfinite(scores).all():
            raise ValueError(f"step_scores[{i}] must be finite numbers and at least one, got {list(chain)!r:.80}")
        if not -1 <= label < len(scores):
            raise ValueError(f"labels[{i}] must lie in [-1, {len(scores)}), got {label}")
        if label == -1:
            correct.append(float(scores.min()))
        else:
            low, high = float(scores[label]), float(scores[:label].min()) if label else math.inf
            error.append((low, max(low, high)))  # an earlier score that is not above it: no threshold is right
    if not error or not correct:
        raise ValueError(
            f"labels must name chains with an error and chains without, got {len(error)} and {len(correct)}"
        )
    return np.array(error), np.array(correct)


def _f1_at(error: Array, correct: Array, thresholds: Array) -> Array:
    """F1 at each threshold: two sorted counts instead of a pass over the chains for each."""
    begun, ended, failed = (
        np.searchsorted(np.sort(ends), thresholds, side="left") for ends in (error[:, 0], error[:, 1], correct)
    )
    return np.asarray(_harmonic((begun - ended) / len(error), 1.0 - failed / len(correct)))


def _harmonic(a: Any, b: Any) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(a + b == 0, 0.0, 2.0 * a * b / (a + b))


class CrossFitted(NamedTuple):
    """Predictions that no chain's own question had a part in, and the threshold of each half."""

    predicted: list[int]
    thresholds: tuple[float, float]


def cross_fitted_first_errors(
    step_scores: Chains, labels: Sequence[int], questions: Sequence[str], *, seed: int = 0
) -> CrossFitted:
    """First errors of every chain at the threshold that is optimal for the questions of the other half.

    questions: one name per chain; whole questions go to one half or the other, drawn with ``seed``.
    """
    if len(questions) != len(labels):
        raise ValueError(f"questions must have one entry per chain ({len(labels)}), got {len(questions)}")
    names, of_chain = np.unique(np.asarray(questions), return_inverse=True)
    side = np.zeros(len(names), dtype=bool)
    side[np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]] = True
    half = side[of_chain]
    predicted = np.full(len(labels), -1)
    chosen = []
    for mine in (False, True):
        rows: list[int] = np.flatnonzero(half != mine).tolist()
        threshold = optimal_threshold([step_scores[i] for i in rows], [labels[i] for i in rows])
        judged: list[int] = np.flatnonzero(half == mine).tolist()
        predicted[judged] = first_errors([step_scores[i] for i in judged], threshold)
        chosen.append(threshold)
    return CrossFitted([int(p) for p in predicted], (chosen[0], chosen[1]))
