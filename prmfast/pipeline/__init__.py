"""Labels and features for process reward models: a first pass, Monte-Carlo rollouts of prefixes, one trace table.

``label_questions(questions, directory, Labeller(engine, verifier, scorer))`` works in chunks, each an atomic parquet
part: killed at any moment and started again, nothing is lost, and nothing that was finished is done twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prmfast._lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
