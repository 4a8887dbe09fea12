"""prmfast: set a target instead of an N for inference with process reward models.

The nouns live in subpackages that load on first use, so that ``import prmfast`` needs neither triton, CUDA nor the
compiled extension.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prmfast._version import __version__

if TYPE_CHECKING:
    from prmfast import calibration, distrl, engines, ias, ops, traces

__all__ = ["__version__", "calibration", "distrl", "engines", "ias", "ops", "traces"]

_SUBPACKAGES = frozenset(__all__) - {"__version__"}


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"prmfast.{name}")
    raise AttributeError(f"module 'prmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
