"""What a run of the demo found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prmfast.calibration.data import Unit
from prmfast.calibration.metrics import Interval
from prmfast.calibration.study import Study
from prmfast.ias import Frontier
from prmfast.tiny import TinyWorld


@dataclass(frozen=True, slots=True)
class LiveRow:
    """One live run over the test questions: samples and tokens drawn, what came of them.

    ``at_target``: share of questions whose own success probability at the N they got, 1 - (1 - p)^N with the true p,
    reaches
    the target; ``fixed_for_as_many``: the smallest fixed N that brings as many questions there. None without a target.
    """

    method: str
    target: float | None
    mean_drawn: float
    tokens: int
    success: float
    accuracy: float
    seconds: float
    at_target: float | None
    fixed_for_as_many: int | None

    @property
    def saved(self) -> float | None:
        """Share of the samples of ``fixed_for_as_many`` that were not drawn; negative is a loss."""
        return None if self.fixed_for_as_many is None else 1 - self.mean_drawn / self.fixed_for_as_many


@dataclass(frozen=True)
class DemoResult:
    """Everything that the report shows."""

    world: TinyWorld
    study: Study
    metrics: Mapping[Unit, Mapping[str, Mapping[str, Interval]]]
    live: tuple[LiveRow, ...]
    frontier: Frontier
    seconds: dict[str, float]
    directory: Path
