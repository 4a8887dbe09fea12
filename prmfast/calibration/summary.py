"""A summary context for wide hidden states and few rows: cross-fitted logistic views in the context's place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prmfast._progress import progress as progress_bar
from prmfast.calibration.data import CalibrationData

Array = npt.NDArray[np.float64]

_STRENGTHS = (1e-3, 1e-2, 1e-1)  # inverse regularisation C of the logistic views, chosen by out-of-fold log-likelihood
_COMPONENTS = 2
_VIEWS = ("mean", "positive", "certain", "spread")  # E[y], P(y > 0), P(y = 1), E|y - p|


class SummaryContext:
    """Maps standardised contexts [N, c] to [N, 7]: four logistic logits, the logit score (last context column), two
    components.

    `fit_transform` gives the training rows out-of-fold values (folds by question), so that what is fitted on the
    summary sees the same noise that new rows will have; `transform` uses models of all rows.
    """

    width = len(_VIEWS) + 1 + _COMPONENTS

    def __init__(self, folds: int = 5, seed: int = 0) -> None:
        self.folds, self.seed = folds, seed

    def fit_transform(self, data: CalibrationData, context: Tensor, *, progress: bool = False) -> Tensor:
        """Fits on rows ``context`` [N, c] of ``data`` and returns their out-of-fold summary [N, 7] float32."""
        x = context.double().cpu().numpy()
        share = data.target.double().cpu().numpy()
        weight = data.weight.double().cpu().numpy()
        parts = data.fold_indices(min(self.folds, len(set(data.question))), self.seed)
        with progress_bar(len(_STRENGTHS) + len(_VIEWS), "summary context", progress) as bar:
            candidates = []
            for strength in _STRENGTHS:
                candidates.append(_out_of_fold(x, share, weight, parts, strength))
                bar.advance()
            best = int(np.argmin([_log_loss(logits, share, weight) for logits in candidates]))
            self.strength_, mean = _STRENGTHS[best], candidates[best]
            out = np.empty((len(x), len(_VIEWS)))
            models = np.empty((len(_VIEWS), x.shape[1] + 1))
            targets = (share, (share > 0).astype(float), (share == 1).astype(float), np.abs(share - _sigmoid(mean)))
            for view, target in enumerate(targets):
                out[:, view] = mean if view == 0 else _out_of_fold(x, target, weight, parts, self.strength_)
                models[view] = _logistic(x, target, weight, self.strength_)
                bar.advance()
        self.models_ = torch.from_numpy(models)
        self.components_ = torch.from_numpy(_principal(x))
        return self._assemble(torch.from_numpy(out), context)

    def transform(self, context: Tensor) -> Tensor:
        """[N, c] -> [N, 7] float32 for new rows."""
        models = self.models_.to(context.device)
        return self._assemble(context.double() @ models[:, :-1].T + models[:, -1], context)

    def _assemble(self, logits: Tensor, context: Tensor) -> Tensor:
        components = context.double() @ self.components_.to(context.device)
        return torch.cat([logits.to(context.device), context[:, -1:].double(), components], 1).float()

    def state(self) -> dict[str, Tensor]:
        """The fitted numbers."""
        return {"summary.models": self.models_, "summary.components": self.components_}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor]) -> SummaryContext:
        """From `state`."""
        summary = cls()
        summary.models_, summary.components_ = tensors["summary.models"], tensors["summary.components"]
        return summary


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -40, 40))))


def _log_loss(logits: Array, share: Array, weight: Array) -> float:
    losses = np.logaddexp(0.0, logits) - share * logits
    return float((weight * losses).sum() / weight.sum())


def _logistic(x: Array, share: Array, weight: Array, strength: float) -> Array:
    """Coefficients and intercept of a logistic model of ``share`` in [0, 1]: a row is part success, part failure."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    y = np.r_[np.ones(len(x)), np.zeros(len(x))]
    weights = np.r_[weight * share, weight * (1 - share)]
    used = weights > 0
    if len(np.unique(y[used])) < 2:  # one class only: a constant, kept finite
        return np.append(np.zeros(x.shape[1]), 6.0 if y[used][0] else -6.0)
    model = LogisticRegression(C=strength, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a summary needs direction, not the last digit
        model.fit(np.vstack([x, x])[used], y[used], sample_weight=weights[used])
    return np.append(np.asarray(model.coef_[0], dtype=np.float64), model.intercept_)


def _out_of_fold(x: Array, share: Array, weight: Array, parts: list[tuple[Any, Any]], strength: float) -> Array:
    out = np.empty(len(x))
    for train, held_out in parts:
        model = _logistic(x[train], share[train], weight[train], strength)
        out[held_out] = x[held_out] @ model[:-1] + model[-1]
    return out


def _principal(x: Array) -> Array:
    """[c, 2]: the two largest principal directions, scaled to unit variance, sign fixed by the largest entry."""
    covariance = x.T @ x / len(x)
    values, vectors = np.linalg.eigh(covariance)
    top = vectors[:, ::-1][:, :_COMPONENTS] / np.sqrt(np.maximum(values[::-1][:_COMPONENTS], 1e-12))
    top = top * np.sign(top[np.abs(top).argmax(0), np.arange(top.shape[1])])
    return np.pad(top, ((0, 0), (0, _COMPONENTS - top.shape[1])))
