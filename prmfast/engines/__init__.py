"""Generation: the engine and scorer protocols, and adapters that load their libraries on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prmfast.engines.base import (
    AsyncEngine,
    AsyncJudge,
    Completion,
    Engine,
    EngineStats,
    Judge,
    Scorer,
    StepScores,
    StreamingEngine,
    Verifier,
)

if TYPE_CHECKING:
    from prmfast.engines.transformers import TransformersEngine

__all__ = [
    "AsyncEngine",
    "AsyncJudge",
    "Completion",
    "Engine",
    "EngineStats",
    "Judge",
    "Scorer",
    "StepScores",
    "StreamingEngine",
    "TransformersEngine",
    "Verifier",
]


def __getattr__(name: str) -> Any:
    if name == "TransformersEngine":
        return importlib.import_module("prmfast.engines.transformers").TransformersEngine
    raise AttributeError(f"module 'prmfast.engines' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
