"""The door to TRL, an optional dependency that is never imported before somebody asks for it."""

from __future__ import annotations

import importlib
from types import ModuleType

from prmfast._versions import check_range, spelled

OLDEST, FIRST_TOO_NEW = (1, 16), (1, 17)
SUPPORTED = spelled(OLDEST, FIRST_TOO_NEW)
"""Versions of TRL whose GRPOTrainer has the hooks that prmfast.distrl.trl overrides, as CI runs them."""


def require_trl(what: str) -> ModuleType:
    """TRL, imported. ``what`` names the caller in the messages.

    ImportError where it is absent or does not load, RuntimeError for a version outside `SUPPORTED`.
    """
    try:
        module = importlib.import_module("trl")
    except ImportError as error:
        raise ImportError(
            f"{what} needs TRL {SUPPORTED}, and importing it failed ({error}); "
            "install it with `pip install prmfast[trl]`"
        ) from error
    check_version(str(module.__version__), what)
    return module


def check_version(version: str, what: str) -> None:
    """RuntimeError unless ``version`` lies in `SUPPORTED`."""
    check_range("TRL", version, what, OLDEST, FIRST_TOO_NEW)
