"""Step scores of an implicit reward model from the log-ratios of its tokens ([V] eq. 30 and 31)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prmfast.prm._check import option, real

Array = npt.NDArray[np.float64]
Protocol = Literal["prefix", "process"]


def step_rewards(
    log_ratio: Any,
    step_ends: Sequence[int],
    *,
    start: int = 0,
    beta: float = 1.0,
    protocol: Protocol = "prefix",
    average: bool = False,
) -> Array:
    """``beta * sum of log_ratio`` up to each step's end ("prefix") or over its own tokens ("process"): [S] float64.

    log_ratio: [T] log pi - log pi_ref of each token. step_ends: index of the last token of each step, rising; ``start``
    is the first token of the first step. average: divide by the number of tokens summed, so that "prefix" with IPVRM's
    beta is the logit of P(correct | prefix). Their sigmoid is what `first_errors` compares with a threshold.
    """
    option("protocol", protocol, ("prefix", "process"))
    tokens = real("log_ratio", log_ratio, 1)
    ends = np.asarray(step_ends, dtype=np.int64)
    if ends.ndim != 1 or start < 0 or (len(ends) and not (start <= ends[0] and ends[-1] < len(tokens))):
        raise ValueError(f"step_ends must lie in [start={start}, {len(tokens)}), got {list(step_ends)}")
    if (np.diff(ends) < 1).any():
        raise ValueError(f"step_ends must rise, got {list(step_ends)}")
    cumulative = np.concatenate([[0.0], np.cumsum(tokens)])
    begins = (
        np.full_like(ends, start) if protocol == "prefix" else np.concatenate([[start], ends[:-1] + 1])[: len(ends)]
    )
    sums = cumulative[ends + 1] - cumulative[begins]
    return np.asarray(beta * sums / (ends + 1 - begins if average else 1.0))
