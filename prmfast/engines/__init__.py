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
from prmfast.engines.event_loop import AsyncFromStreaming
from prmfast.engines.queued import QueuedEngine

if TYPE_CHECKING:
    from prmfast.engines.transformers import TransformersEngine
    from prmfast.engines.vllm import VLLMEngine
    from prmfast.engines.vllm_async import AsyncVLLMEngine

__all__ = [
    "AsyncEngine",
    "AsyncFromStreaming",
    "AsyncJudge",
    "AsyncVLLMEngine",
    "Completion",
    "Engine",
    "EngineStats",
    "Judge",
    "QueuedEngine",
    "Scorer",
    "StepScores",
    "StreamingEngine",
    "TransformersEngine",
    "VLLMEngine",
    "Verifier",
]

_HOME = {"AsyncVLLMEngine": "vllm_async", "TransformersEngine": "transformers", "VLLMEngine": "vllm"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"prmfast.engines.{_HOME[name]}"), name)
    raise AttributeError(f"module 'prmfast.engines' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
