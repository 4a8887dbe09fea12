"""Score features: what a calibrator can read of a prefix when the PRM's hidden states are not stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FEATURE_NAMES: tuple[str, ...] = (
    "last",  # score of the last step so far
    "min",  # least score so far
    "product",  # product of the scores so far
    "mean",  # mean of the scores so far
    "step_index",  # steps so far, counted from 1; 0 is the empty answer
    "log_steps",  # log(1 + step_index): the first steps tell more than the twentieth
    "logit_last",
    "logit_min",
    "logit_mean",  # mean of the logits so far, not the logit of the mean
)
SCORE_FEATURE_NAMES: tuple[str, ...] = ("last", "logit_last")
LOGIT_EPS = 1e-4

Array = npt.NDArray[np.float64]


def logit(score: Tensor, eps: float = LOGIT_EPS) -> Tensor:
    """``log(s / (1 - s))`` of ``s = score.clamp(eps, 1 - eps)``; the clamp keeps saturated PRM scores finite."""
    clipped = score.clamp(eps, 1.0 - eps)
    return torch.log(clipped) - torch.log1p(-clipped)


def _logit(score: Array) -> Array:
    clipped = np.clip(score, LOGIT_EPS, 1.0 - LOGIT_EPS)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))


def prefix_features(scores: Sequence[float] | Array) -> Array:
    """Features of every prefix of one answer: ``scores`` [T] in [0, 1] -> [T, F] float64, columns `FEATURE_NAMES`.

    The answer's total number of steps is not among them: a running decoder does not know it.
    """
    values = np.asarray(scores, dtype=np.float64)
    steps = np.arange(1, len(values) + 1, dtype=np.float64)
    least = np.minimum.accumulate(values)
    logits = _logit(values)
    columns = (
        values,
        least,
        np.cumprod(values),
        np.cumsum(values) / steps,
        steps,
        np.log1p(steps),
        logits,
        _logit(least),
        np.cumsum(logits) / steps,
    )
    return np.stack(columns, axis=1)


def question_features(scores: Sequence[float] | Array) -> Array:
    """Features of empty answers: question scores [N] in [0, 1] -> [N, F] float64 with ``step_index`` 0."""
    values = np.asarray(scores, dtype=np.float64)
    logits = _logit(values)
    nothing = np.zeros_like(values)
    return np.stack((values, values, values, values, nothing, nothing, logits, logits, logits), axis=1)


def score_features(score: Tensor) -> Tensor:
    """The two features that one score alone has: [N] in [0, 1] -> [N, 2], columns `SCORE_FEATURE_NAMES`."""
    return torch.stack((score, logit(score)), dim=1)
