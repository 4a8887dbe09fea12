"""A calibrated, incremental PRM on vLLM: a plugin that vLLM finds by entry point, and the clients of what it serves.

    from vllm import LLM
    from prmfast.vllm import VLLMPRM, prm_engine_args

    prm = VLLMPRM(LLM(**prm_engine_args("Qwen/Qwen2.5-Math-PRM-7B", calibrator="my-calibrator")))
    prm.judge([question], [answer])    # scores and quantiles of every step; what was judged before comes from the cache

Importing this loads no vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prmfast._lazy import lazy_names

if TYPE_CHECKING:
    from prmfast.vllm.arguments import prm_engine_args, prm_server_args
    from prmfast.vllm.scorer import VLLMPRM, AsyncVLLMPRM, ScoringStats
    from prmfast.vllm.settings import PRMSettings, RowFormat, StepRequest, StepRows

_HOME = {
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

__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
