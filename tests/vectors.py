"""Reads the vector files: arrays <case>/in/<name>, <case>/out/<name> and a JSON manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Vectors:
    def __init__(self, path: Path) -> None:
        self.arrays = np.load(path)
        self.manifest: dict[str, Any] = json.loads(str(self.arrays["manifest"]))

    @property
    def cases(self) -> list[dict[str, Any]]:
        return list(self.manifest["cases"])

    def inputs(self, case: dict[str, Any]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(self.arrays[f"{case['case']}/in/{name}"]) for name in case["in"]}

    def outputs(self, case: dict[str, Any]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(self.arrays[f"{case['case']}/out/{name}"]) for name in case["out"]}


def assert_relative(found: Tensor, expected: Tensor, rtol: float) -> None:
    """Every entry within ``rtol`` of the larger of its own magnitude and a hundredth of the tensor's largest."""
    assert found.shape == expected.shape
    scale = torch.maximum(expected.abs(), 0.01 * expected.abs().max()).clamp_min(1e-300)
    worst = float(((found - expected).abs() / scale).max()) if expected.numel() else 0.0
    assert worst <= rtol, f"relative error {worst:.2e} > {rtol:.0e}"
