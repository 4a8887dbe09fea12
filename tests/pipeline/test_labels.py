"""Labels from counts alone, without any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prmfast.pipeline import first_error, hard_labels, label_by_bisection, label_exhaustively
from prmfast.pipeline.labels import Chain, exhaustive_rollouts


@st.composite
def monotone(draw: st.DrawFn) -> tuple[list[Chain], dict[tuple[int, int], int], int]:
    """Chains with counts whose any-of-n label never returns to True, and n."""
    n = draw(st.integers(1, 5))
    chains, counts = [], {}
    for i in range(draw(st.integers(0, 4))):
        steps = draw(st.integers(0, 12))
        bad_from = draw(st.integers(0, steps))
        correct = bad_from == steps
        chains.append(Chain(steps, correct))
        for t in range(steps):
            counts[i, t] = draw(st.integers(1, n)) if t < bad_from else 0
    return chains, counts, n


@given(monotone())
def test_bisection_equals_exhaustive_labels_where_success_is_monotone(
    case: tuple[list[Chain], dict[tuple[int, int], int], int],
) -> None:
    chains, counts, n = case
    asked: list[list[tuple[int, int]]] = []

    def count(rows: Sequence[tuple[int, int]]) -> list[int]:
        asked.append(list(rows))
        return [counts[row] for row in rows]

    every = label_exhaustively(chains, count, n)
    assert len(asked) <= 1
    asked.clear()
    found = label_by_bisection(chains, count, n)
    for chain, ours, wanted in zip(chains, found, every, strict=True):
        assert (ours.labels, ours.first_error) == (wanted.labels, wanted.first_error)
        assert wanted.rollouts == exhaustive_rollouts(chain, n) == n * max(chain.steps - 1, 0)
        # ceil(log2(number of places for the first error)) rounds of n
        places = 1 if chain.correct else max(chain.steps, 1)
        assert ours.rollouts <= n * math.ceil(math.log2(places))
        for t in range(chain.steps):
            assert ours.trials[t] in (0, n)
            assert ours.successes[t] == (wanted.successes[t] if ours.trials[t] else 0)
    assert sum(labels.rollouts for labels in found) == n * sum(map(len, asked))
    assert len(asked) <= 4  # one call a round, for all chains together
    flat = [row for rows in asked for row in rows]
    assert len(flat) == len(set(flat))


def test_where_success_is_not_monotone_the_two_may_differ() -> None:
    counts = [2, 0, 3, 0]

    def count(rows: Sequence[tuple[int, int]]) -> list[int]:
        return [counts[t] for _, t in rows]

    chain = [Chain(4, False)]
    assert label_exhaustively(chain, count, 4)[0].first_error == 1
    assert label_by_bisection(chain, count, 4)[0].first_error == 1  # its first question is about step 1
    counts[:] = [0, 1, 0, 0]
    assert label_exhaustively(chain, count, 4)[0].first_error == 0
    assert label_by_bisection(chain, count, 4)[0].first_error == 2


def test_the_end_of_an_answer_is_known_without_rollouts() -> None:
    def count(rows: Sequence[tuple[int, int]]) -> list[int]:
        assert (0, 1) not in rows
        return [1] * len(rows)

    for search in (label_exhaustively, label_by_bisection):
        right, wrong = (search([Chain(2, correct)], count, 3)[0] for correct in (True, False))
        assert (right.successes[1], right.trials[1], wrong.successes[1], wrong.trials[1]) == (3, 3, 0, 3)
        assert (right.first_error, wrong.first_error) == (-1, 1)
        nothing = search([Chain(0, False)], count, 3)[0]
        assert (nothing.labels, nothing.first_error, nothing.rollouts) == ((), -1, 0)
        assert search([], count, 3) == []


def test_all_of_k_is_stricter_than_any_of_k() -> None:
    def count(rows: Sequence[tuple[int, int]]) -> list[int]:
        return [[4, 3, 0][t] for _, t in rows]

    assert label_exhaustively([Chain(4, False)], count, 4, "any")[0].labels == (True, True, False, False)
    assert label_exhaustively([Chain(4, False)], count, 4, "all")[0].labels == (True, False, False, False)
    assert label_by_bisection([Chain(4, False)], count, 4, "all")[0].first_error == 1


def test_hard_labels() -> None:
    assert hard_labels([0, 1, 4, 0], [4, 4, 4, 0]) == [False, True, True, None]
    assert hard_labels([0, 1, 4, 0], [4, 4, 4, 0], "all") == [False, False, True, None]
    assert first_error([True, None, False, True]) == 2
    assert first_error([True, None]) == first_error([]) == -1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hard_labels([1], [1], "most"), "rule must be one of any, all, got 'most'"),
        (lambda: hard_labels([1], []), r"trials must have one entry per entry of successes \(1\), got 0"),
        (lambda: hard_labels([1, 3], [1, 2]), r"successes\[1\] must lie in \[0, trials\[1\]\] = \[0, 2\], got 3"),
        (lambda: label_exhaustively([Chain(2, True)], lambda rows: [5], 4), r"count must return 1 numbers in \[0, 4\]"),
        (lambda: label_by_bisection([Chain(2, False)], lambda rows: [], 4), r"count must return 1 numbers"),
        (lambda: label_by_bisection([], lambda rows: [], 4, "most"), "rule must be one of any, all"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
