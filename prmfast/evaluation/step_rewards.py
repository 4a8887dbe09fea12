"""Step scores of an implicit reward model as the released ProcessBench program of [V] computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prmfast.prm._check import option, real
from prmfast.prm.step_rewards import step_rewards

Array = npt.NDArray[np.float64]


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
