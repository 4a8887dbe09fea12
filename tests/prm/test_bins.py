"""Bin tokens, and the losses of the six released quantile and point trainers that read them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prmfast.prm.bins import bin_rates, rate_bins, step_rows
from prmfast.prm.losses import weighted_quantile_loss
from tests.prm.loss_checks import SUFFIX, assert_recorded
from tests.vectors import Vectors


def test_recorded_bins(shared_vectors: Path) -> None:
    vectors = Vectors(shared_vectors / "calprm_bins.npz")
    for case in vectors.cases:
        x, y, n_bins = vectors.inputs(case), vectors.outputs(case), case["params"]["n_bins"]
        bins = rate_bins(x["accuracy"], n_bins)
        assert torch.equal(bins, y["bin"])
        torch.testing.assert_close(bin_rates(bins + 50, pivot=50, n_bins=n_bins), y["target"], rtol=1e-12, atol=0)


def trainer_loss(kind: str, logits: Tensor, labels: Tensor, params: dict[str, Any]) -> Tensor:
    rows, tokens = step_rows(logits, labels, offset=2 if kind.startswith("reasoneval") else 1)
    targets = bin_rates(tokens, pivot=params["pivot"], n_bins=params["n_bin_tokens"])
    if kind.endswith("_wql"):
        return weighted_quantile_loss(torch.sigmoid(rows), targets, params["quantiles"])
    share = rows[:, params["candidate_token_ids"]].softmax(1)
    right = share[:, 1:].sum(1) if kind.startswith("reasoneval") else share[:, 0]
    return ((right - targets.to(right.dtype)) ** 2).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_recorded_trainers(dtype: torch.dtype, shared_vectors: Path) -> None:
    vectors, size = Vectors(shared_vectors / "calprm_compute_loss.npz"), SUFFIX[dtype]
    for case in vectors.cases:
        x, y = vectors.inputs(case), vectors.outputs(case)
        loss = partial(trainer_loss, case["case"].rsplit("_", 1)[0], labels=x["labels"], params=case["params"])
        assert_recorded(loss, x["logits"], y[f"loss_{size}"], y[f"grad_{size}"], dtype)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"rates must lie in \[0, 1\], got 1.5 at row 1"):
        rate_bins(torch.tensor([0.5, 1.5]), 9)
    with pytest.raises(ValueError, match="n_bins must be >= 2, got 1"):
        rate_bins(torch.tensor([0.5]), 1)
    with pytest.raises(ValueError, match=r"labels must lie in \[50, 59\) or be -100, got 59"):
        bin_rates(torch.tensor([50, -100, 59]), pivot=50, n_bins=9)
    with pytest.raises(ValueError, match="labels must stand at column 2 or later, got one at 1"):
        step_rows(torch.zeros(1, 4, 3), torch.tensor([[-100, 50, -100, -100]]), offset=2)
