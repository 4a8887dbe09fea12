"""From what a PRM says of steps to quantiles: the one way in which judges and budgets ask a calibrator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prmfast.calibration.artifact import ArtifactError
from prmfast.calibration.data import CalibrationData
from prmfast.calibration.features import FEATURE_NAMES, prefix_features, question_features

if TYPE_CHECKING:
    from prmfast.calibration.base import Calibrator


def mid_levels(m: int) -> Tensor:
    """Levels (i + 1/2) / M, i = 0 ... M - 1, as [M] float32."""
    if m < 1:
        raise ValueError(f"levels must be at least 1, got {m}")
    return ((torch.arange(m, dtype=torch.float64) + 0.5) / m).float()


def step_features(scores: Sequence[float], *, empty: bool = False) -> Tensor:
    """Features [n, F] float64, columns `FEATURE_NAMES`.

    ``scores`` [n] are the steps of one answer; with ``empty=True`` of the empty answers of n questions.
    """
    return torch.from_numpy(question_features(scores) if empty else prefix_features(scores))


def quantiles(calibrator: Calibrator, score: Tensor, hidden: Tensor | None, features: Tensor, levels: int) -> Tensor:
    """Quantiles of the success probability at `mid_levels`, [n, M] float32 on the CPU.

    score: [n] in [0, 1] · hidden: [n, d], None where the calibrator does not read it · features: [n, F] of
    `step_features`; any device and float dtype
    """
    asked = mid_levels(levels)
    if score.shape[0] == 0:
        return torch.zeros(0, levels)
    data = CalibrationData.from_arrays(
        score=score.detach().float().cpu(),
        successes=torch.zeros(score.shape[0], dtype=torch.int64),
        hidden=None if hidden is None else hidden.detach().float().cpu(),
        features=features.float().cpu(),
        feature_names=FEATURE_NAMES,
    )
    return calibrator.quantile(data, asked).cpu()


def check_calibrator(
    calibrator: Calibrator, *, prm_id: str | None, hidden_width: int | None = None, policy_id: str | None = None
) -> None:
    """ArtifactError unless a fitted calibrator belongs to this PRM (and policy, where given) and can read it.

    A calibrator whose provenance does not name a PRM or a policy is taken at its user's word.
    """
    calibrator._check_fitted()
    name, known = type(calibrator).__name__, calibrator.provenance_
    for kind, fitted, found in (("prm", known.prm_id, prm_id), ("policy", known.policy_id, policy_id)):
        if None not in (fitted, found) and fitted != found:
            raise ArtifactError(
                f"{name} was fitted for {kind}_id {fitted!r}, this is {found!r}; fit one on traces of this {kind}, or "
                f"pass {kind}_id={fitted!r} where both names mean the same model"
            )
    if calibrator.reads == "score":
        return
    width = calibrator.hidden_width_
    if None not in (width, hidden_width) and width != hidden_width:
        raise ArtifactError(
            f"{name} was fitted on hidden states of width {width}, this PRM's have width {hidden_width}; "
            "fit one on this PRM's hidden states"
        )
    missing = [feature for feature in calibrator.feature_names_ if feature not in FEATURE_NAMES]
    if width is None and missing:
        raise ArtifactError(
            f"{name} was fitted on features that a PRM's scores do not give: {', '.join(missing)}; "
            f"fit one on {', '.join(FEATURE_NAMES)}"
        )
