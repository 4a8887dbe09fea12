"""A calibrated, incremental PRM on vLLM: a plugin that vLLM finds by entry point, and the clients of what it serves.

    from vllm import LLM
    from prmfast.vllm import VLLMPRM, prm_engine_args

    prm = VLLMPRM(LLM(**prm_engine_args("Qwen/Qwen2.5-Math-PRM-7B", calibrator="my-calibrator")))
    prm.judge([question], [answer])    # scores and quantiles of every step; what was judged before comes from the cache

Importing this loads no vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prmfast.vllm.arguments import prm_engine_args, prm_server_args
    from prmfast.vllm.scorer import VLLMPRM, AsyncVLLMPRM, ScoringStats
    from prmfast.vllm.settings import PRMSettings, RowFormat, StepRequest, StepRows

_WHERE = {
    "AsyncVLLMPRM": "scorer",
    "PRMSettings": "settings",
    "RowFormat": "settings",
    "ScoringStats": "scorer",
    "StepRequest": "settings",
    "StepRows": "settings",
    "VLLMPRM": "scorer",
    "prm_engine_args": "arguments",
    "prm_server_args": "arguments",
}

__all__ = [
    "VLLMPRM",
    "AsyncVLLMPRM",
    "PRMSettings",
    "RowFormat",
    "ScoringStats",
    "StepRequest",
    "StepRows",
    "prm_engine_args",
    "prm_server_args",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"prmfast.vllm.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'prmfast.vllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
