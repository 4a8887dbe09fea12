from __future__ import annotations

import subprocess
import sys

import pytest

import prmfast.engines as engines


def test_public_names() -> None:
    protocols = {"Engine", "StreamingEngine", "AsyncEngine", "Scorer", "StepScorer", "Judge", "AsyncJudge", "Verifier"}
    values = {"Completion", "EngineStats", "StepScores"}
    adapters = {"TransformersEngine", "VLLMEngine", "AsyncVLLMEngine", "QueuedEngine", "AsyncFromStreaming"}
    assert set(engines.__all__) == protocols | values | adapters
    assert all(hasattr(engines, name) for name in engines.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = engines.Nothing


def test_importing_engines_and_the_tiny_world_needs_no_optional_library() -> None:
    code = (
        "import sys, prmfast.engines, prmfast.tiny; prmfast.tiny.TinyWorld.load();"
        "bad = {'vllm', 'transformers', 'pyarrow', 'sklearn', 'matplotlib', 'triton'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_completion_is_frozen() -> None:
    completion = engines.Completion("q", 1, "a", (1,), 1, True)
    with pytest.raises(AttributeError):
        completion.text = "b"  # type: ignore[misc]
