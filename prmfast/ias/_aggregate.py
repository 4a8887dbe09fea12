"""An answer's score from the scores of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

Aggregate = Literal["last", "min", "product", "mean"]
_AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda scores: scores[-1],
    "min": min,
    "product": math.prod,
    "mean": lambda scores: math.fsum(scores) / len(scores),
}


def aggregate_score(step_scores: Sequence[float], aggregate: str = "last") -> float:
    """An answer's score from its step scores: "last" | "min" | "product" | "mean"; 0 for an answer without steps."""
    if aggregate not in _AGGREGATES:
        raise ValueError(f"aggregate must be one of {', '.join(_AGGREGATES)}, got {aggregate!r}")
    return _AGGREGATES[aggregate](step_scores) if step_scores else 0.0
