"""Generation: the engine and scorer protocols, and adapters that load their libraries on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prmfast._lazy import lazy_names
from prmfast.engines.base import (
    AsyncEngine,
    AsyncJudge,
    Completion,
    Engine,
    EngineStats,
    Judge,
    Scorer,
    StepScorer,
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
    "StepScorer",
    "StepScores",
    "StreamingEngine",
    "TransformersEngine",
    "VLLMEngine",
    "Verifier",
]

_HOME = {"AsyncVLLMEngine": "vllm_async", "TransformersEngine": "transformers", "VLLMEngine": "vllm"}

__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
