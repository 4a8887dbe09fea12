"""The one way from scores, hidden states and features to quantiles, and whose calibrator may be asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prmfast.calibration import ArtifactError, CalibrationData, LogisticCalibrator, NotFittedError, PlattCalibrator
from prmfast.calibration.features import FEATURE_NAMES
from prmfast.calibration.judging import check_calibrator, mid_levels, quantiles, step_features


def data(**ids: str) -> CalibrationData:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(60, generator=generator)
    return CalibrationData.from_arrays(
        score=score,
        successes=(torch.rand(60, generator=generator) < score).long(),
        features=torch.cat([step_features([s]) for s in score.tolist()]),
        feature_names=FEATURE_NAMES,
        **ids,
    )


def test_mid_levels() -> None:
    assert mid_levels(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        mid_levels(0)


def test_features_of_steps_and_of_empty_answers() -> None:
    steps, empty = step_features([0.5, 0.25]), step_features([0.5, 0.25], empty=True)
    index, product = FEATURE_NAMES.index("step_index"), FEATURE_NAMES.index("product")
    assert steps[:, index].tolist() == [1, 2]
    assert steps[:, product].tolist() == [0.5, 0.125]
    assert empty[:, index].tolist() == [0, 0]
    assert empty[:, product].tolist() == [0.5, 0.25]
    assert tuple(step_features([]).shape) == (0, len(FEATURE_NAMES))


@pytest.mark.parametrize("calibrator", [LogisticCalibrator(), PlattCalibrator()])
def test_quantiles_are_the_calibrators(calibrator: Any) -> None:
    rows = data()
    calibrator.fit(rows, progress=False)
    found = quantiles(calibrator, rows.score.double(), None, rows.features.double(), 5)
    assert torch.equal(found, calibrator.quantile(rows, mid_levels(5)))
    assert tuple(quantiles(calibrator, torch.empty(0), None, step_features([]), 5).shape) == (0, 5)


def test_a_calibrator_belongs_to_a_prm_and_a_policy() -> None:
    mine = LogisticCalibrator().fit(data(prm_id="prm-a", policy_id="policy-a"), progress=False)
    check_calibrator(mine, prm_id="prm-a", policy_id="policy-a", hidden_width=8)
    check_calibrator(mine, prm_id="prm-a")
    with pytest.raises(
        ArtifactError, match="fitted for prm_id 'prm-a', this is 'prm-b'; fit one on traces of this prm"
    ):
        check_calibrator(mine, prm_id="prm-b")
    with pytest.raises(
        ArtifactError, match=r"fitted for policy_id 'policy-a', this is 'b'.* pass policy_id='policy-a'"
    ):
        check_calibrator(mine, prm_id="prm-a", policy_id="b")
    check_calibrator(LogisticCalibrator().fit(data(), progress=False), prm_id="any", policy_id="any")
    with pytest.raises(NotFittedError, match="LogisticCalibrator is not fitted"):
        check_calibrator(LogisticCalibrator(), prm_id="prm-a")
