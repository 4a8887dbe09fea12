"""Calibrators: from what a PRM says of a prefix to the distribution of its success probability."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prmfast._lazy import lazy_names

if TYPE_CHECKING:
    from prmfast.calibration import metrics, plots
    from prmfast.calibration.artifact import ArtifactError
    from prmfast.calibration.base import Calibrator, NotFittedError
    from prmfast.calibration.baselines import (
        IsotonicCalibrator,
        LogisticCalibrator,
        PlattCalibrator,
        RawScore,
        TemperatureCalibrator,
    )
    from prmfast.calibration.beta_binomial import BetaBinomialCalibrator
    from prmfast.calibration.condot import CondOTCalibrator
    from prmfast.calibration.data import CalibrationData
    from prmfast.calibration.quantile_regression import QuantileRegressionCalibrator

_HOME = {
    "ArtifactError": "artifact",
    "BetaBinomialCalibrator": "beta_binomial",
    "CalibrationData": "data",
    "Calibrator": "base",
    "CondOTCalibrator": "condot",
    "IsotonicCalibrator": "baselines",
    "LogisticCalibrator": "baselines",
    "NotFittedError": "base",
    "PlattCalibrator": "baselines",
    "QuantileRegressionCalibrator": "quantile_regression",
    "RawScore": "baselines",
    "TemperatureCalibrator": "baselines",
    "metrics": "metrics",
    "plots": "plots",
}

__all__ = [
    "ArtifactError",
    "BetaBinomialCalibrator",
    "CalibrationData",
    "Calibrator",
    "CondOTCalibrator",
    "IsotonicCalibrator",
    "LogisticCalibrator",
    "NotFittedError",
    "PlattCalibrator",
    "QuantileRegressionCalibrator",
    "RawScore",
    "TemperatureCalibrator",
    "load_calibrator",
    "metrics",
    "plots",
]


def load_calibrator(directory: str | os.PathLike[str]) -> Calibrator:
    """The calibrator that ``save_pretrained`` wrote to ``directory``, of whatever class its config names."""
    from prmfast.calibration.artifact import load

    return load(directory)


__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
