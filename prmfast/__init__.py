"""prmfast: set a target instead of an N for inference with process reward models.

The nouns live in subpackages that load on first use, so that ``import prmfast`` needs neither triton, CUDA nor the
compiled extension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prmfast._lazy import lazy_names
from prmfast._version import __version__

if TYPE_CHECKING:
    from prmfast import calibration, distrl, engines, evaluation, ias, ops, pipeline, prm, traces, vllm

__all__ = [
    "__version__",
    "calibration",
    "distrl",
    "engines",
    "evaluation",
    "ias",
    "ops",
    "pipeline",
    "prm",
    "traces",
    "vllm",
]

__getattr__, __dir__ = lazy_names(__name__, {name: name for name in __all__[1:]}, __all__)
