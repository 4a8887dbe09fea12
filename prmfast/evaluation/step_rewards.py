"""Step scores of an implicit reward model from the log-ratios of its tokens ([V] eq. 30 and 31)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prmfast.evaluation._check import option, real

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


def released_step_rewards(log_ratio: Any, step_positions: Sequence[int], *, coefficient: float) -> tuple[Array, Array]:
    """(reward [S], average [S]) as the released ProcessBench program of [V] stores them.

    log_ratio: [T - 1] of the tokens 1 .. T - 1. step_positions: [S + 1], the prompt's boundary, then each step's end.
    The reward sums from the boundary to the step's end, both counted from the shifted array and cut at its end; the
    average divides by the difference of the two positions, one less than what was summed.
    """
    tokens = real("log_ratio", log_ratio, 1)
    positions = np.asarray(step_positions, dtype=np.int64)
    first, ends = positions[0], np.minimum(positions[1:], len(tokens) - 1)
    reward = step_rewards(tokens, ends.tolist(), start=int(first), beta=coefficient)
    return reward, reward / (positions[1:] - first)


def released_scores(
    reward: Any, average: Any, *, kind: Literal["sum", "sum_diff", "mean", "mean_diff"], coefficient: float
) -> Array:
    """Step scores [S] of the released search from what `released_step_rewards` gives, in (0, 1).

    "sum" and "mean" judge prefixes, "sum_diff" and "mean_diff" single steps. The means are scaled by
    ``coefficient ** -0.5``, and their token counts are those of the averages.
    """
    option("kind", kind, ("sum", "sum_diff", "mean", "mean_diff"))
    total, mean = real("reward", reward, 1), real("average", average, 1)
    if kind == "sum":
        logits = total
    elif kind == "sum_diff":
        logits = np.diff(total, prepend=0.0)
    elif kind == "mean":
        logits = mean * coefficient**-0.5
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            counts = np.where(total == 0, 0.0, total / mean)
        logits = np.diff(total, prepend=0.0) / np.maximum(np.diff(counts, prepend=0.0), 1.0) * coefficient**-0.5
    from scipy.special import expit

    return np.asarray(expit(logits))
