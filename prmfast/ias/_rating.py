"""What a judge says of the last step of a chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from prmfast.engines.base import Judge
from prmfast.ias._check import at_level


@dataclass(frozen=True, slots=True)
class Rating:
    """The PRM's ``score`` of a chain and its success probability: median, lower bound for budgets, mean.

    All of them are the score where there are no quantiles.
    """

    score: float
    median: float
    lower: float
    expected: float


def rate(judge: Judge, questions: Sequence[str], texts: Sequence[str], lb_idx: int | None) -> list[Rating]:
    """One rating per (question, text), "" being the empty answer; ``lower`` is column ``lb_idx``, or the median.

    ValueError for NaN, for an answer without a score, and for ``lb_idx`` without quantiles or beyond them.
    """
    judged = judge.judge(questions, [text or None for text in texts])
    if len(judged) != len(texts):
        raise RuntimeError(f"judge must return one entry per answer ({len(texts)}), got {len(judged)}")
    ratings = []
    for question, text, row in zip(questions, texts, judged, strict=True):
        if not row.scores:
            raise ValueError(f"judge must return at least one score an answer, got none for {text!r}")
        score, quantiles = row.scores[-1], row.quantiles
        rating = _of_score(score, lb_idx) if quantiles is None else _of_quantiles(score, quantiles[-1], lb_idx)
        if any(math.isnan(value) for value in (rating.score, rating.median, rating.lower)):
            raise ValueError(f"judge must not return NaN, got NaN for {text!r} of question {question!r}")
        ratings.append(rating)
    return ratings


def _of_score(score: float, lb_idx: int | None) -> Rating:
    if lb_idx is not None:
        raise ValueError(f"lb_idx must be None for a judge without quantiles (it has no calibrator), got {lb_idx}")
    return Rating(score, score, score, score)


def _of_quantiles(score: float, quantiles: Tensor, lb_idx: int | None) -> Rating:
    columns = len(quantiles)
    if lb_idx is not None and lb_idx >= columns:
        raise ValueError(f"lb_idx must be < {columns}, the number of quantiles, got {lb_idx}")
    median = float(at_level(quantiles, 0.5))
    lower = median if lb_idx is None else float(quantiles[lb_idx])
    return Rating(score, median, lower, float(quantiles.double().mean()))
