"""The compiled extension, or an ImportError that says what to do."""

from __future__ import annotations

try:
    from prmfast import _C
except ImportError as error:
    raise ImportError(
        f"the compiled extension prmfast._C does not load ({error}); build it with `pip install -e .`"
    ) from error

__all__ = ["_C"]
