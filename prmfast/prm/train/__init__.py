"""Training of process reward models on transformers' Trainer and accelerate: value heads, quantile heads,
implicit models.

Needs the extra ``train``; nothing of it is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prmfast._lazy import lazy_names

if TYPE_CHECKING:
    from prmfast.prm.train.batches import LengthBuckets, StepCollator
    from prmfast.prm.train.checkpoints import last_checkpoint
    from prmfast.prm.train.implicit import ImplicitConfig, ImplicitTrainer
    from prmfast.prm.train.model import StepModel, load_backbone
    from prmfast.prm.train.objective import StepObjective
    from prmfast.prm.train.quantile import QuantileConfig, QuantilePRM, QuantileTrainer, load_quantile_prm
    from prmfast.prm.train.rows import RowLimits, StepRows
    from prmfast.prm.train.trainer import PRMConfig, PRMTrainer

_HOME = {
    "ImplicitConfig": "implicit",
    "ImplicitTrainer": "implicit",
    "LengthBuckets": "batches",
    "PRMConfig": "trainer",
    "PRMTrainer": "trainer",
    "QuantileConfig": "quantile",
    "QuantilePRM": "quantile",
    "QuantileTrainer": "quantile",
    "RowLimits": "rows",
    "StepCollator": "batches",
    "StepModel": "model",
    "StepObjective": "objective",
    "StepRows": "rows",
    "last_checkpoint": "checkpoints",
    "load_backbone": "model",
    "load_quantile_prm": "quantile",
}

__all__ = [
    "ImplicitConfig",
    "ImplicitTrainer",
    "LengthBuckets",
    "PRMConfig",
    "PRMTrainer",
    "QuantileConfig",
    "QuantilePRM",
    "QuantileTrainer",
    "RowLimits",
    "StepCollator",
    "StepModel",
    "StepObjective",
    "StepRows",
    "last_checkpoint",
    "load_backbone",
    "load_quantile_prm",
]

__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
