"""Point calibrators from scikit-learn: raw score, isotonic, Platt, temperature, logistic on score features."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prmfast.calibration.base import Calibrator, Inputs, Reads
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.features import logit

Array = npt.NDArray[np.float64]
Spread = Literal["none", "bins"]

_GRID = 101  # levels at which a bin's quantiles are kept


class PointCalibrator(Calibrator):
    """A calibrator that predicts one probability per row: `expected` is that probability.

    With spread="none" `quantile` gives it at every level, so that eq. 5 of NUMERICS 2 becomes eq. 4. With spread="bins"
    the rows of the fit are put into equal-count bins of the prediction and `quantile` gives the empirical quantiles of
    k/n in the row's bin.
    """

    reads: ClassVar[Reads] = "score"
    fitted_arrays: ClassVar[tuple[str, ...]]  # names of the fitted arrays: attributes ``<name>_``, tensors ``<name>``
    bin_edges_: Array
    bin_quantiles_: Array

    def __init__(self, *, spread: Spread = "none", bins: int = 20) -> None:
        if spread not in ("none", "bins"):
            raise ValueError(f"spread must be 'none' or 'bins', got {spread!r}")
        if isinstance(bins, bool) or not isinstance(bins, int):
            raise TypeError(f"bins must be an int, got {type(bins).__name__}")
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        self.spread, self.bins = spread, bins

    @abc.abstractmethod
    def _fit_point(self, inputs: Inputs, data: CalibrationData) -> None:
        """Fits the arrays that ``fitted_arrays`` names and `_predict` reads."""

    @abc.abstractmethod
    def _predict(self, inputs: Inputs) -> Array:
        """Success probabilities [B] float64."""

    def _fit(
        self,
        data: CalibrationData,
        validation: CalibrationData | None,
        *,
        progress: bool,
        checkpoint_dir: str | os.PathLike[str] | None,
    ) -> None:
        inputs = self._inputs(data)
        self._fit_point(inputs, data)
        self.bin_edges_, self.bin_quantiles_ = np.zeros(0), np.zeros((0, _GRID))
        if self.spread == "bins":
            target = data.target.double().numpy(force=True)
            self.bin_edges_, self.bin_quantiles_ = _bin_quantiles(self._predict(inputs), target, self.bins)

    def _quantile(self, inputs: Inputs, levels: Tensor) -> Tensor:
        point = self._predict(inputs)
        if self.spread == "none":
            values = torch.from_numpy(point).float().to(levels.device)
            return values[:, None].expand(len(inputs), levels.shape[-1]).contiguous()
        rows = self.bin_quantiles_[np.searchsorted(self.bin_edges_, point, side="right")]
        at = levels.double().numpy(force=True) * (_GRID - 1)
        low = np.minimum(at.astype(np.int64), _GRID - 2)
        low, at = np.broadcast_to(low, (len(rows), low.shape[-1])), np.broadcast_to(at, (len(rows), at.shape[-1]))
        left, right = np.take_along_axis(rows, low, 1), np.take_along_axis(rows, low + 1, 1)
        return torch.from_numpy(left + (at - low) * (right - left)).float().to(levels.device)

    def expected(self, data: CalibrationData | Tensor, score: Tensor | None = None) -> Tensor:
        """The point prediction [B] float32, whatever the spread."""
        inputs = self._inputs(data, score)
        return torch.from_numpy(self._predict(inputs)).float().to(inputs.score.device)

    def _state(self) -> dict[str, Tensor]:
        names = (*self.fitted_arrays, "bin_edges", "bin_quantiles")
        return {name: torch.from_numpy(np.array(getattr(self, f"{name}_"), dtype=np.float64)) for name in names}

    def _restore(self, tensors: Mapping[str, Tensor], fitted: Mapping[str, Any]) -> None:
        for name in (*self.fitted_arrays, "bin_edges", "bin_quantiles"):
            setattr(self, f"{name}_", tensors[name].double().numpy())


class RawScore(PointCalibrator):
    """The PRM's own score, uncalibrated: every table shows it beside the others. `fit` learns nothing."""

    fitted_arrays = ()

    def __init__(self) -> None:
        super().__init__()

    def _fit_point(self, inputs: Inputs, data: CalibrationData) -> None:
        return None

    def _predict(self, inputs: Inputs) -> Array:
        return np.asarray(inputs.score.double().numpy(force=True))


class IsotonicCalibrator(PointCalibrator):
    """``sklearn.isotonic.IsotonicRegression`` of k/n on the score, each row with weight n."""

    fitted_arrays = ("knots", "values")
    knots_: Array
    values_: Array

    def _fit_point(self, inputs: Inputs, data: CalibrationData) -> None:
        from sklearn.isotonic import IsotonicRegression

        score, target, weight = (x.double().numpy(force=True) for x in (inputs.score, data.target, data.weight))
        model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(score, target, sample_weight=weight)
        self.knots_, self.values_ = np.float64(model.X_thresholds_), np.float64(model.y_thresholds_)

    def _predict(self, inputs: Inputs) -> Array:
        return np.asarray(np.interp(inputs.score.double().numpy(force=True), self.knots_, self.values_))


class _LinearLogit(PointCalibrator):
    """``sigmoid(coefficients . standardised columns + intercept)``; subclasses choose the columns and the fit."""

    fitted_arrays = ("centre", "scale", "coefficients", "intercept")
    centre_: Array
    scale_: Array
    coefficients_: Array
    intercept_: Array

    @abc.abstractmethod
    def _columns(self, inputs: Inputs) -> Array:
        """What the logit is linear in: [B, F] float64."""

    def _predict(self, inputs: Inputs) -> Array:
        x = (self._columns(inputs) - self.centre_) / self.scale_
        z = x @ self.coefficients_ + self.intercept_[0]
        return np.asarray(torch.sigmoid(torch.from_numpy(z)).numpy())


class PlattCalibrator(_LinearLogit):
    """``sigmoid(a logit(score) + b)`` fitted by logistic regression with Platt's smoothed targets, k of n per row."""

    def _columns(self, inputs: Inputs) -> Array:
        return np.asarray(logit(inputs.score.double()).numpy(force=True)[:, None])

    def _fit_point(self, inputs: Inputs, data: CalibrationData) -> None:
        x = self._columns(inputs)
        positives, negatives = float(data.successes.sum()), float((data.trials - data.successes).sum())
        high, low = (positives + 1.0) / (positives + 2.0), 1.0 / (negatives + 2.0)
        k, n = data.successes.double().numpy(force=True), data.trials.double().numpy(force=True)
        share = (k * high + (n - k) * low) / n
        self.centre_, self.scale_ = np.zeros(1), np.ones(1)
        self.coefficients_, self.intercept_ = _logistic(x, share, n, regularisation=1e-8)


class TemperatureCalibrator(_LinearLogit):
    """``sigmoid(logit(score) / T)``; T > 0 by maximum likelihood, infinite where the score points the wrong way."""

    @property
    def temperature_(self) -> float:
        """The fitted T."""
        return float(1.0 / self.coefficients_[0]) if self.coefficients_[0] > 0 else float("inf")

    def _columns(self, inputs: Inputs) -> Array:
        return np.asarray(logit(inputs.score.double()).numpy(force=True)[:, None])

    def _fit_point(self, inputs: Inputs, data: CalibrationData) -> None:
        share, n = data.target.double().numpy(force=True), data.weight.double().numpy(force=True)
        slope, _ = _logistic(self._columns(inputs), share, n, regularisation=1e-8, intercept=False)
        self.centre_, self.scale_ = np.zeros(1), np.ones(1)
        self.coefficients_, self.intercept_ = np.maximum(slope, 0.0), np.zeros(1)


class LogisticCalibrator(_LinearLogit):
    """Logistic regression on the standardised score features (``data.feature_names``), k of n per row.

    ``regularisation`` is the weight of the squared norm of the coefficients against the summed log-likelihood.
    """

    reads = "features"

    def __init__(self, *, regularisation: float = 1.0, spread: Spread = "none", bins: int = 20) -> None:
        super().__init__(spread=spread, bins=bins)
        if not regularisation > 0:
            raise ValueError(f"regularisation must be > 0, got {regularisation}")
        self.regularisation = regularisation

    def _columns(self, inputs: Inputs) -> Array:
        assert inputs.features is not None
        return np.asarray(inputs.features.double().numpy(force=True))

    def _fit_point(self, inputs: Inputs, data: CalibrationData) -> None:
        x = self._columns(inputs)
        spread = x.std(axis=0)
        self.centre_, self.scale_ = x.mean(axis=0), np.where(spread > 1e-9, spread, 1.0)
        share, n = data.target.double().numpy(force=True), data.weight.double().numpy(force=True)
        standard = (x - self.centre_) / self.scale_
        self.coefficients_, self.intercept_ = _logistic(standard, share, n, regularisation=self.regularisation)


def _logistic(
    x: Array, share: Array, weight: Array, *, regularisation: float, intercept: bool = True
) -> tuple[Array, Array]:
    """Coefficients [F] and intercept [1] of a logistic model of ``share`` [N] in [0, 1], rows weighted."""
    from sklearn.linear_model import LogisticRegression

    labels = np.r_[np.ones(len(x)), np.zeros(len(x))]
    weights = np.r_[weight * share, weight * (1.0 - share)]
    used = weights > 0
    if len(np.unique(labels[used])) < 2:
        # every outcome equal: the rate with one pseudo-success and one pseudo-failure
        rate = (weight @ share + 1.0) / (weight.sum() + 2.0)
        return np.zeros(x.shape[1]), np.array([np.log(rate / (1.0 - rate)) if intercept else 0.0])
    model = LogisticRegression(C=1.0 / regularisation, fit_intercept=intercept, max_iter=2000, tol=1e-6)
    model.fit(np.vstack([x, x])[used], labels[used], sample_weight=weights[used])
    return np.asarray(model.coef_[0], dtype=np.float64), np.asarray(model.intercept_, dtype=np.float64).reshape(1)


def _bin_quantiles(prediction: Array, target: Array, bins: int) -> tuple[Array, Array]:
    """Inner edges [b - 1] of equal-count bins of the prediction and the targets' quantiles [b, 101] in each."""
    edges = np.unique(np.quantile(prediction, np.arange(1, bins) / bins))
    bin_of = np.searchsorted(edges, prediction, side="right")
    occupied = np.unique(bin_of)
    edges = edges[occupied[1:] - 1]
    levels = np.linspace(0.0, 1.0, _GRID)
    return edges, np.stack([np.quantile(target[bin_of == i], levels) for i in occupied])
