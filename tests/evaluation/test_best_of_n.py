"""Best-of-N, votes and pass@n: recorded choices, and exact expectations against every subset."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prmfast.evaluation import AnswerPool, best_of_n, pass_at_n, selection_table, trajectory_scores, vote_accuracies
from prmfast.ias.voting import weighted_vote
from tests.vectors import Vectors


def test_recorded_choices(shared_vectors: Path) -> None:
    """The first n of N answers: min over steps, first of the best; sigmoid of it summed per distinct answer."""
    vectors = Vectors(shared_vectors / "pqm_bon.npz")
    for case in vectors.cases:
        x, y, n = vectors.inputs(case), vectors.outputs(case), case["params"]["n"]
        for q, values in enumerate(x["step_values"].tolist()):
            steps = [chain[:length] for chain, length in zip(values, x["n_steps"][q].tolist(), strict=True)]
            scores = trajectory_scores(steps)
            np.testing.assert_array_equal(scores, y["reward"][q].numpy())
            assert int(np.argmax(scores[:n])) == y["selected"][q].item()
            answers = x["answers"][q].tolist()
            assert (
                weighted_vote(answers[:n], scores[:n].tolist(), link="sigmoid") == y["weighted_vote_answer"][q].item()
            )
            right = np.arange(len(scores)) == int(np.argmax(scores))
            assert best_of_n(scores, right, len(scores)) == 1.0


def test_aggregations() -> None:
    chains = [[0.5, 0.25, 1.0], [0.75], []]
    expected = {"min": [0.25, 0.75], "prod": [0.125, 0.75], "last": [1.0, 0.75], "mean": [1.75 / 3, 0.75]}
    for how, values in expected.items():
        found = trajectory_scores(chains, how)  # type: ignore[arg-type]
        assert found[:2].tolist() == pytest.approx(values)
        assert found[2] == -math.inf
    with pytest.raises(ValueError, match="how must be 'min' or 'prod' or 'last' or 'mean', got 'max'"):
        trajectory_scores(chains, "max")  # type: ignore[arg-type]


pools = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.2, 0.9]), st.booleans()), min_size=1, max_size=7)


@given(pools, st.data())
@settings(max_examples=60, deadline=None)
def test_expectations_are_exact(pool: list[tuple[float, bool]], data: Any) -> None:
    scores, correct = zip(*pool, strict=True)
    n = data.draw(st.integers(1, len(pool)))
    subsets = list(itertools.combinations(range(len(pool)), n))
    passed = np.mean([any(correct[i] for i in subset) for subset in subsets])
    chosen = np.mean([correct[max(subset, key=lambda i: (scores[i], -i))] for subset in subsets])
    assert pass_at_n(correct, n) == pytest.approx(passed, abs=1e-12)
    assert best_of_n(scores, correct, n) == pytest.approx(chosen, abs=1e-12)
    assert best_of_n(scores, correct, n) <= pass_at_n(correct, n) + 1e-12
    assert best_of_n(np.asarray(correct, dtype=float), correct, n) == pytest.approx(passed, abs=1e-12)  # the oracle


def test_large_pools_stay_exact() -> None:
    correct = np.zeros(10_000)
    correct[17] = 1
    assert pass_at_n(correct, 100) == pytest.approx(0.01, rel=1e-12)
    assert best_of_n(np.arange(10_000)[::-1], correct, 1) == pytest.approx(1e-4, rel=1e-12)


def make_pools() -> list[AnswerPool]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(12):
        correct = rng.random(16) < 0.4
        answers = tuple("right" if ok else f"wrong {rng.integers(2)}" for ok in correct)
        good = np.clip(0.5 + 0.3 * (correct - 0.5) + 0.1 * rng.standard_normal(16), 0, 1)
        made.append(
            AnswerPool(f"q{i}", tuple(correct.tolist()), {"good": good, "blind": rng.standard_normal(16)}, answers)
        )
    return made


def test_selection_table() -> None:
    made = make_pools()
    short = AnswerPool("short", (True,), {"good": np.ones(1), "blind": np.ones(1)}, ("right",))
    table = selection_table([*made, short], [1, 4, 16, 64], trials=20, resamples=50)
    rows = {(row["n"], row["method"]): row for row in table}
    assert {n for n, _ in rows} == {1, 4, 16}  # nobody has 64 answers
    assert {rows[n, "avg"]["questions"] for n in (4, 16)} == {12}
    assert rows[1, "avg"]["questions"] == 13
    for method in ("pass@n", "best of n: good", "best of n: blind", "majority", "vote: good", "vote: blind"):
        assert rows[1, method]["value"] == pytest.approx(rows[1, "avg"]["value"], abs=0.1)
        assert rows[16, method]["low"] <= rows[16, method]["value"] <= rows[16, method]["high"]
    assert rows[16, "best of n: good"]["value"] > rows[16, "best of n: blind"]["value"]
    assert rows[16, "pass@n"]["value"] >= rows[16, "best of n: good"]["value"]


def test_votes_by_hand() -> None:
    pool = AnswerPool(
        "q",
        (False, False, True),
        {"prm": np.array([0.1, 0.1, 0.9]), "logit": np.array([-3.0, -3.0, 5.0])},
        ("a", "a", "b"),
    )
    assert vote_accuracies(pool, 3) == {"majority": 0.0, "vote: prm": 1.0, "vote: logit": 1.0}
    silent = AnswerPool("q", (True, False), {}, (None, "b"))
    assert vote_accuracies(silent, 2) == {"majority": 0.0}  # None is no answer, right or not


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pass_at_n([1, 0], 3), ValueError, r"n must lie in \[1, 2\], the number of stored answers, got 3"),
        (lambda: pass_at_n([1, 0], True), TypeError, "n must be an int, got bool"),
        (lambda: pass_at_n([1, 0.5], 1), ValueError, "correct must be booleans or 0/1, got 0.5"),
        (lambda: best_of_n([0.1], [1, 0], 1), ValueError, "scores must be 2 numbers like correct, got shape"),
        (lambda: trajectory_scores([[0.1], [float("nan")]]), ValueError, r"step_scores\[1\] must be finite"),
        (lambda: AnswerPool("q", (), {}), ValueError, "question 'q' must have an answer, got none"),
        (
            lambda: AnswerPool("q", (True,), {"a": np.ones(2)}),
            ValueError,
            "a of question 'q' must have 1 entries, got 2",
        ),
        (lambda: vote_accuracies(AnswerPool("q", (True,), {}), 1), ValueError, "answers of question 'q' must be known"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_an_answer_without_steps_has_no_weight_in_a_vote() -> None:
    """Its score is -inf, which does not make logits of the probabilities beside it."""
    scores = {"min": np.array([-np.inf, -np.inf, 0.6, 0.5])}
    pool = AnswerPool("q", (False, False, True, False), scores, ("a", "a", "b", "c"))
    assert vote_accuracies(pool, 4) == {"majority": 0.0, "vote: min": 1.0}
    alone = AnswerPool("q", (True, False), {"min": np.array([0.01, -np.inf])}, ("a", "b"))
    assert vote_accuracies(alone, 2)["vote: min"] == 1.0
