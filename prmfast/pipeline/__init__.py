"""Labels and features for process reward models: a first pass, Monte-Carlo rollouts of prefixes, one trace table.

``label_questions(questions, directory, Labeller(engine, verifier, scorer))`` works in chunks, each an atomic parquet
part: killed at any moment and started again, nothing is lost, and nothing that was finished is done twice.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prmfast.pipeline.labeller import Labeller, LabelSettings
    from prmfast.pipeline.labels import StepLabels, first_error, hard_labels, label_by_bisection, label_exhaustively
    from prmfast.pipeline.run import LabelRun, label_questions
    from prmfast.pipeline.steps import SplitAfter
    from prmfast.pipeline.store import ManifestError
    from prmfast.pipeline.verify import MathVerifier

_HOME = {
    "LabelRun": "run",
    "LabelSettings": "labeller",
    "Labeller": "labeller",
    "ManifestError": "store",
    "MathVerifier": "verify",
    "SplitAfter": "steps",
    "StepLabels": "labels",
    "first_error": "labels",
    "hard_labels": "labels",
    "label_by_bisection": "labels",
    "label_exhaustively": "labels",
    "label_questions": "run",
}
__all__ = [
    "LabelRun",
    "LabelSettings",
    "Labeller",
    "ManifestError",
    "MathVerifier",
    "SplitAfter",
    "StepLabels",
    "first_error",
    "hard_labels",
    "label_by_bisection",
    "label_exhaustively",
    "label_questions",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"prmfast.pipeline.{_HOME[name]}"), name)
    raise AttributeError(f"module 'prmfast.pipeline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
