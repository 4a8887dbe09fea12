"""Votes over final answers: majority, and self-consistency weighted by a PRM ([Q] arXiv 2410.11287 sec. 4)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal, TypeVar

Answer = TypeVar("Answer", bound=Hashable)


def majority_vote(answers: Sequence[Answer | None]) -> Answer | None:
    """The most frequent answer, the first seen among equals. None is no answer and has no vote."""
    return _winner(answers, [1.0] * len(answers))


def weighted_vote(
    answers: Sequence[Answer | None], scores: Sequence[float], *, link: Literal["sigmoid", "identity"] = "identity"
) -> Answer | None:
    """The answer with the largest sum of scores, the first seen among equals. None is no answer and has no vote.

    ``link="sigmoid"`` sums sigmoid(score), for PRMs whose scores are logits; "identity" sums the scores, which must
    be >= 0.
    """
    if len(scores) != len(answers):
        raise ValueError(f"scores must have one entry per answer ({len(answers)}), got {len(scores)}")
    if link not in ("sigmoid", "identity"):
        raise ValueError(f"link must be 'sigmoid' or 'identity', got {link!r}")
    for i, score in enumerate(scores):
        if math.isnan(score) or (link == "identity" and score < 0):
            raise ValueError(f"scores must be {'numbers' if link == 'sigmoid' else '>= 0'}, got {score} at {i}")
    return _winner(answers, [_sigmoid(float(s)) if link == "sigmoid" else float(s) for s in scores])


def _winner(answers: Sequence[Answer | None], weights: Sequence[float]) -> Answer | None:
    votes: dict[Answer, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    return max(votes, key=votes.__getitem__) if votes else None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
