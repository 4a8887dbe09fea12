"""Checks of stored scores and rewards: argument name, rule, actual value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor


def option(name: str, value: str, allowed: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(repr(one) for one in allowed)}, got {value!r}")


def real(name: str, value: Any, ndim: int) -> npt.NDArray[np.float64]:
    """``value`` (torch, numpy or a sequence) as finite float64 of ``ndim`` dimensions."""
    array = np.asarray(value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value, dtype=np.float64)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity at {tuple(np.argwhere(~np.isfinite(array))[0])}")
    return array
