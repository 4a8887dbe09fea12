"""Choosing among stored answers: best-of-N by step scores, votes, pass@n ([Q] arXiv 2410.11287 sec. 4)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prmfast.calibration.metrics import bootstrap
from prmfast.ias.voting import majority_vote, weighted_vote
from prmfast.prm._check import option, real

Array = npt.NDArray[np.float64]
Aggregation = Literal["min", "prod", "last", "mean"]
AGGREGATIONS: tuple[Aggregation, ...] = ("min", "prod", "last", "mean")


def trajectory_scores(step_scores: Sequence[Sequence[float]], how: Aggregation = "min") -> Array:
    """One score per answer from the scores of its steps: their "min", product, "last" or "mean"; [N] float64.

    "prod" is for probabilities; the others take logits as well. An answer without steps has -inf: it is never chosen
    before one with steps.
    """
    option("how", how, AGGREGATIONS)
    result = np.full(len(step_scores), -np.inf)
    for i, chain in enumerate(step_scores):
        scores = real(f"step_scores[{i}]", chain, 1)
        if len(scores):
            result[i] = {"min": scores.min(), "prod": scores.prod(), "last": scores[-1], "mean": scores.mean()}[how]
    return result


def pass_at_n(correct: Any, n: int) -> float:
    """``1 - C(N - c, n) / C(N, n)``: the chance that n of N stored answers, c of them right, hold a right one.

    correct: [N] booleans or 0/1. Unbiased for fresh samples, unlike ``1 - (1 - c/N)^n``. ValueError for n > N.
    """
    right = _outcomes(correct)
    _count("n", n, len(right))
    wrong = len(right) - int(right.sum())
    if n > wrong:
        return 1.0
    return float(1.0 - np.prod((wrong - np.arange(n)) / (len(right) - np.arange(n))))


def best_of_n(scores: Any, correct: Any, n: int) -> float:
    """The chance that the best-scored of n answers, drawn without replacement from N stored ones, is right.

    scores: [N] trajectory scores, higher is better, -inf allowed; of equal scores the first stored one is chosen.
    correct: [N] booleans or 0/1. Exact: the answer at rank r is the best of C(N - 1 - r, n - 1) of C(N, n) draws.
    """
    right = _outcomes(correct)
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != right.shape or np.isnan(values).any():
        raise ValueError(f"scores must be {len(right)} numbers like correct, got shape {values.shape} or NaN")
    size = len(right)
    _count("n", n, size)
    rank = np.arange(size)[:, None]
    place = np.arange(n - 1)
    chance = n / size * np.prod(np.maximum(size - 1 - rank - place, 0) / (size - 1 - place), axis=1)
    return float(chance @ right[np.argsort(-values, kind="stable")])


@dataclass(frozen=True, slots=True)
class AnswerPool:
    """The stored answers to one question: right or wrong [N], scores by name ([N] each), final answers if known."""

    question: str
    correct: tuple[bool, ...]
    scores: dict[str, Array]
    answers: tuple[Hashable | None, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.correct) == 0:
            raise ValueError(f"question {self.question!r} must have an answer, got none")
        for name, values in (*self.scores.items(), ("answers", self.answers)):
            if values is not None and len(values) != len(self.correct):
                raise ValueError(
                    f"{name} of question {self.question!r} must have {len(self.correct)} entries, got {len(values)}"
                )


def selection_table(
    pools: Sequence[AnswerPool],
    ns: Sequence[int],
    *,
    trials: int = 100,
    seed: int = 0,
    resamples: int = 1000,
) -> list[dict[str, Any]]:
    """One row per n and method: the share of questions answered rightly, with its 95 % interval by question.

    Methods: "pass@n", "avg" (one answer, chosen at random), "best of n: <score>" for every score, and where answers
    are known "majority" and "vote: <score>" (the sum of scores per answer; sigmoid(score) where one is negative).
    Everything but the votes is an exact expectation over the draws of n stored answers; votes average ``trials``
    random draws. Only questions with at least n answers count; a row says how many they are. "over_avg" is the paired
    difference to "avg" with its interval: questions differ far more than methods do.
    """
    rows: list[dict[str, Any]] = []
    for n in ns:
        chosen = [pool for pool in pools if len(pool.correct) >= n]
        if not chosen:
            continue
        values: dict[str, list[float]] = {"pass@n": [pass_at_n(pool.correct, n) for pool in chosen]}
        values["avg"] = [float(np.mean(pool.correct)) for pool in chosen]
        for name in chosen[0].scores:
            values[f"best of n: {name}"] = [best_of_n(pool.scores[name], pool.correct, n) for pool in chosen]
        if all(pool.answers is not None for pool in chosen):
            votes = [vote_accuracies(pool, n, trials=trials, seed=seed + i) for i, pool in enumerate(chosen)]
            values |= {name: [vote[name] for vote in votes] for name in votes[0]}
        names = [pool.question for pool in chosen]
        for method, accuracies in values.items():
            share = np.asarray(accuracies)
            interval = bootstrap(share, names, n=resamples, seed=seed)._asdict()
            over = tuple(bootstrap(share - np.asarray(values["avg"]), names, n=resamples, seed=seed))
            rows.append({"n": n, "method": method, "questions": len(set(names)), **interval, "over_avg": over})
    return rows


def vote_accuracies(pool: AnswerPool, n: int, *, trials: int = 100, seed: int = 0) -> dict[str, float]:
    """Share of ``trials`` random draws of n answers in which a vote ends on a right one: majority and per score."""
    _count("n", n, len(pool.correct))
    if pool.answers is None:
        raise ValueError(f"answers of question {pool.question!r} must be known for a vote, got None")
    right = {answer for answer, ok in zip(pool.answers, pool.correct, strict=True) if ok}
    links: dict[str, Literal["sigmoid", "identity"]] = {
        name: "sigmoid" if (values[np.isfinite(values)] < 0).any() else "identity"
        for name, values in ((name, np.asarray(values, dtype=np.float64)) for name, values in pool.scores.items())
    }
    draws = 1 if n == len(pool.correct) else trials
    rng = np.random.default_rng(seed)
    hits = {"majority": 0, **{f"vote: {name}": 0 for name in pool.scores}}
    for _ in range(draws):
        rows = np.sort(rng.permutation(len(pool.correct))[:n])
        answers = [pool.answers[i] for i in rows]
        hits["majority"] += _is_right(majority_vote(answers), right)
        for name, values in pool.scores.items():
            floor = 0.0 if links[name] == "identity" else -np.inf  # -inf, an answer without steps, has no weight
            picked = weighted_vote(answers, [max(float(values[i]), floor) for i in rows], link=links[name])
            hits[f"vote: {name}"] += _is_right(picked, right)
    return {name: count / draws for name, count in hits.items()}


def _is_right(answer: Hashable | None, right: set[Hashable | None]) -> bool:
    return answer is not None and answer in right


def _outcomes(correct: Any) -> Array:
    right = real("correct", correct, 1)
    if not np.isin(right, (0.0, 1.0)).all():
        raise ValueError(f"correct must be booleans or 0/1, got {right[~np.isin(right, (0.0, 1.0))][0]:g}")
    return right


def _count(name: str, value: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 1 <= value <= high:
        raise ValueError(f"{name} must lie in [1, {high}], the number of stored answers, got {value}")
