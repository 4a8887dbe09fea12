"""Training of process reward models on transformers' Trainer and accelerate: value heads, quantile heads,
implicit models.

Needs the extra ``train``; nothing of it is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prmfast.prm.train.batches import LengthBuckets, StepCollator
    from prmfast.prm.train.checkpoints import last_checkpoint
    from prmfast.prm.train.implicit import ImplicitConfig, ImplicitTrainer
    from prmfast.prm.train.model import StepModel, load_backbone
    from prmfast.prm.train.objective import StepObjective
    from prmfast.prm.train.quantile import QuantileConfig, QuantilePRM, QuantileTrainer, load_quantile_prm
    from prmfast.prm.train.rows import StepRows
    from prmfast.prm.train.trainer import PRMConfig, PRMTrainer

_WHERE = {
    "ImplicitConfig": "implicit",
    "ImplicitTrainer": "implicit",
    "LengthBuckets": "batches",
    "PRMConfig": "trainer",
    "PRMTrainer": "trainer",
    "QuantileConfig": "quantile",
    "QuantilePRM": "quantile",
    "QuantileTrainer": "quantile",
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
    "StepCollator",
    "StepModel",
    "StepObjective",
    "StepRows",
    "last_checkpoint",
    "load_backbone",
    "load_quantile_prm",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"prmfast.prm.train.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'prmfast.prm.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
