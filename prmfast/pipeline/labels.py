"""From rollouts to labels of steps: success probabilities, hard labels, the first error.

A rollout of a prefix is a fresh completion of it; k of n of them end in the right answer. k / n is the soft label of
the prefix and whether any of n succeeded its usual hard label [soft and hard estimation of Math-Shepherd, arXiv
2312.08935].

Bisection [OmegaPRM, arXiv 2406.06592] looks for the first step whose hard label is False with about log2 of
the number of steps as many rollouts. It assumes that labels never return to True once they were False. That holds of
true success probabilities of exactly 0; with n rollouts a small probability can look like 0, and then the search and
the exhaustive labels may disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Rule = Literal["any", "all"]
RULES: dict[str, Callable[[int, int], bool]] = {"any": lambda k, n: k >= 1, "all": lambda k, n: k == n}
Count = Callable[[Sequence[tuple[int, int]]], Sequence[int]]
"""Rolls out prefixes: successes k of each (answer, step); prefix ``step`` of an answer ends with that step."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One answer to label: its number of steps, and whether it is right."""

    steps: int
    correct: bool


@dataclass(frozen=True, slots=True)
class StepLabels:
    """Labels of one answer, a value per step. ``trials`` is 0 where nothing was rolled out.

    ``labels`` are hard; ``first_error`` is the first step whose label is False, -1 without one. ``rollouts`` counts
    what was drawn: the whole answer needs no rollout, its own outcome stands for all n.
    """

    successes: tuple[int, ...]
    trials: tuple[int, ...]
    labels: tuple[bool, ...]
    first_error: int
    rollouts: int


def hard_labels(successes: Sequence[int], trials: Sequence[int], rule: Rule = "any") -> list[bool | None]:
    """Hard labels from k of n rollouts: "any" of the n succeeded, or "all" of them; None where n = 0.

    ValueError for another rule, for unequal lengths and for k outside [0, n].
    """
    _check_rule(rule)
    if len(successes) != len(trials):
        raise ValueError(f"trials must have one entry per entry of successes ({len(successes)}), got {len(trials)}")
    for i, (k, n) in enumerate(zip(successes, trials, strict=True)):
        if not 0 <= k <= n:
            raise ValueError(f"successes[{i}] must lie in [0, trials[{i}]] = [0, {n}], got {k}")
    return [RULES[rule](k, n) if n else None for k, n in zip(successes, trials, strict=True)]


def first_error(labels: Sequence[bool | None]) -> int:
    """Index of the first False label, -1 without one; unknown labels (None) are passed over."""
    return next((t for t, label in enumerate(labels) if label is False), -1)


def label_exhaustively(chains: Sequence[Chain], count: Count, n: int, rule: Rule = "any") -> list[StepLabels]:
    """Rolls out every prefix of every chain n times, in one call of ``count``."""
    _check_rule(rule)
    asked = [(i, t) for i, chain in enumerate(chains) for t in range(_open_steps(chain))]
    found = _counted(count, asked, n)
    return [_labelled(i, chain, found, n, rule) for i, chain in enumerate(chains)]


def label_by_bisection(chains: Sequence[Chain], count: Count, n: int, rule: Rule = "any") -> list[StepLabels]:
    """Finds the first error of every chain by bisection; a call of ``count`` per round for all chains together.

    A right answer has no error, without any rollout: its last label is True, so by the assumption all are. The labels
    are True before the first error and False from there on, whether a step was rolled out or not.
    """
    _check_rule(rule)
    # The first error lies in [low, high]: of a wrong answer it is the last step at the latest.
    low = [chain.steps if chain.correct else 0 for chain in chains]
    high = [chain.steps if chain.correct else _open_steps(chain) for chain in chains]
    found: dict[tuple[int, int], int] = {}
    while asked := [(i, (a + b) // 2) for i, (a, b) in enumerate(zip(low, high, strict=True)) if a < b]:
        found |= _counted(count, asked, n)
        for i, t in asked:
            if RULES[rule](found[i, t], n):
                low[i] = t + 1
            else:
                high[i] = t
    return [_bisected(i, chain, found, n, low[i]) for i, chain in enumerate(chains)]


def exhaustive_rollouts(chain: Chain, n: int) -> int:
    """How many rollouts `label_exhaustively` draws for this answer."""
    return n * _open_steps(chain)


def _open_steps(chain: Chain) -> int:
    """Steps that are not the last: their prefix has something left to write."""
    return max(chain.steps - 1, 0)


def _counted(count: Count, asked: list[tuple[int, int]], n: int) -> dict[tuple[int, int], int]:
    if not asked:
        return {}
    found = [int(k) for k in count(asked)]
    if len(found) != len(asked) or not all(0 <= k <= n for k in found):
        raise ValueError(f"count must return {len(asked)} numbers in [0, {n}], got {found}")
    return dict(zip(asked, found, strict=True))


def _counts(
    i: int, chain: Chain, found: dict[tuple[int, int], int], n: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Successes, trials and the number of rollouts drawn."""
    successes = [found.get((i, t), 0) for t in range(chain.steps)]
    trials = [n * ((i, t) in found) for t in range(chain.steps)]
    drawn = sum(trials)
    if chain.steps:
        successes[-1], trials[-1] = n * chain.correct, n
    return tuple(successes), tuple(trials), drawn


def _labelled(i: int, chain: Chain, found: dict[tuple[int, int], int], n: int, rule: Rule) -> StepLabels:
    successes, trials, drawn = _counts(i, chain, found, n)
    labels = tuple(RULES[rule](k, n) for k in successes)
    return StepLabels(successes, trials, labels, first_error(labels), drawn)


def _bisected(i: int, chain: Chain, found: dict[tuple[int, int], int], n: int, first: int) -> StepLabels:
    successes, trials, drawn = _counts(i, chain, found, n)
    labels = tuple(t < first for t in range(chain.steps))
    return StepLabels(successes, trials, labels, first if first < chain.steps else -1, drawn)


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
