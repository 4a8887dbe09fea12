"""Calibrators fitted on random rows: what matters here is that the engine computes what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prmfast.calibration import BetaBinomialCalibrator, CalibrationData, Calibrator, IsotonicCalibrator
from prmfast.calibration.features import FEATURE_NAMES
from prmfast.calibration.judging import step_features

WIDTH = 64


def data(*, hidden: bool, width: int = WIDTH, **ids: Any) -> CalibrationData:
    """400 steps of 100 answers with scores, features of all steps so far, and hidden states where asked for."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(100, 4, generator=generator, dtype=torch.float64)
    states = torch.randn(400, width, generator=generator)
    chance = (scores.flatten() + states[:, :4].tanh().mean(1)).clamp(0.02, 0.98)
    return CalibrationData.from_arrays(
        score=scores.flatten(),
        features=torch.cat([step_features(row.tolist()) for row in scores]),
        feature_names=FEATURE_NAMES,
        hidden=states if hidden else None,
        successes=torch.binomial(torch.full((400,), 8.0), chance.float(), generator=generator).long(),
        trials=torch.full((400,), 8),
        question=[str(i // 4) for i in range(400)],
        **ids,
    )


def fitted(kind: str, **ids: Any) -> Calibrator:
    """kind: "score" reads the score, "features" those of all steps so far, "hidden" the hidden state."""
    if kind == "score":
        return IsotonicCalibrator().fit(data(hidden=False, **ids), progress=False)
    calibrator = BetaBinomialCalibrator(context="mlp", steps=20, seed=1)
    return calibrator.fit(data(hidden=kind == "hidden", **ids), progress=False)


def save(folder: Path, kind: str, **ids: Any) -> str:
    """The folder of a saved calibrator."""
    path = folder / f"{kind}-calibrator"
    fitted(kind, **ids).save_pretrained(path)
    return str(path)
