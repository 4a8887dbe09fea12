"""Checks that the nouns of prmfast.ias make at construction: name + rule + actual value."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor


def probability(name: str, value: object, *, closed: bool = False) -> float:
    """A number in (0, 1), or in [0, 1] with ``closed``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not (0 < number < 1 or (closed and 0 <= number <= 1)):
        raise ValueError(f"{name} must lie in {'[0, 1]' if closed else '(0, 1)'}, got {number}")
    return number


def positive_number(name: str, value: object) -> float:
    """A finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not (0 < number < math.inf):
        raise ValueError(f"{name} must be finite and > 0, got {number}")
    return number


def whole(name: str, value: object, *, low: int, high: int | None = None) -> int:
    """An int in [low, high]; bool is not one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be >= {low}{'' if high is None else f' and <= {high}'}, got {value}")
    return value


def quantile_matrix(name: str, value: object, ndim: int = 2) -> Tensor:
    """A floating tensor with ``ndim`` dimensions and at least one quantile in the last."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {str(value.dtype).removeprefix('torch.')}")
    if value.ndim != ndim or value.shape[-1] == 0:
        raise ValueError(
            f"{name} must have {ndim} dimensions and at least one quantile, got shape {tuple(value.shape)}"
        )
    return value


def at_level(quantiles: Tensor, level: float) -> Tensor:
    """Q(level) from quantiles [..., M] at levels (m + 1/2) / M: linear between them, constant beyond the outer two."""
    columns = quantiles.shape[-1]
    place = min(max(level * columns - 0.5, 0.0), columns - 1.0)
    below = int(place)
    above = min(below + 1, columns - 1)
    return torch.lerp(quantiles[..., below].double(), quantiles[..., above].double(), place - below)


def question_list(questions: object) -> None:
    """At least one string in a sequence."""
    if isinstance(questions, str) or not isinstance(questions, Sequence) or not _strings(questions):
        raise TypeError("questions must be a sequence of strings")
    if len(questions) == 0:
        raise ValueError("questions must have at least one entry, got 0")


def _strings(values: Sequence[object]) -> bool:
    return all(isinstance(value, str) for value in values)
