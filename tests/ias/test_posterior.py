"""The posterior of a question against enumeration of what its samples may be, against simulation, and at its edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prmfast.ias import SuccessPosterior
from prmfast.ops import ias_budget, ias_curve

Prior = list[float]
probabilities = st.floats(0.0, 1.0)
inner = st.floats(0.02, 0.98)
priors = st.lists(inner, min_size=1, max_size=6)


def restaurant(answers: Sequence[Hashable], rho: float) -> float:
    """Probability of the wrong samples' answers one after the other: theta for a new one, its count for an old one."""
    theta, seen, value = (1 - rho) / rho, dict[Hashable, int](), 1.0
    for n, answer in enumerate(answers):
        value *= (seen.get(answer, 0) or theta) / (theta + n)
        seen[answer] = seen.get(answer, 0) + 1
    return value


def enumerated(
    prior: Prior, q: Sequence[float], answers: Sequence[Hashable | None] | None, rho: float, more: int
) -> tuple[float, float, float, dict[Hashable, float]]:
    """(solved, success after ``more``, mean of p, probability by answer) from every pattern of right and wrong."""
    base = sum(prior) / len(prior)
    total = solved = success = mean = 0.0
    by_answer: dict[Hashable, float] = {}
    for pattern in itertools.product([False, True], repeat=len(q)):
        words = 1.0
        right: set[Hashable] = set()
        if answers is not None:
            right = {a for a, good in zip(answers, pattern, strict=True) if good}
            wrong = [a for a, good in zip(answers, pattern, strict=True) if not good and a is not None]
            if len(right) > 1 or None in right or right & set(wrong):
                continue
            words = restaurant(wrong, rho)
        for p in prior:
            weight = words
            for i, good in enumerate(pattern):
                says = q[i] if answers is None or answers[i] is not None else 0.0
                weight *= p * says / base if good else (1 - p) * (1 - says) / (1 - base)
            total += weight
            mean += weight * p
            solved += weight * any(pattern)
            success += weight * (1 if any(pattern) else 1 - (1 - p) ** more)
            for answer in right:
                by_answer[answer] = by_answer.get(answer, 0.0) + weight
    return solved / total, success / total, mean / total, {a: w / total for a, w in by_answer.items()}


def posterior(
    prior: Prior, q: Sequence[float], answers: Sequence[Hashable | None] | None = None, rho: float | None = None
) -> SuccessPosterior:
    found = SuccessPosterior(torch.tensor(prior, dtype=torch.float64), wrong_agreement=rho)
    for i, value in enumerate(q):
        found.observe(value, None if answers is None else answers[i])
    return found


@given(priors, st.lists(inner, max_size=6), st.integers(0, 40))
def test_equals_enumeration(prior: Prior, q: list[float], more: int) -> None:
    got = posterior(prior, q)
    solved, success, mean, _ = enumerated(prior, q, None, 0.5, more)
    assert got.solved == pytest.approx(solved, abs=1e-10)
    assert got.expected_success(more) == pytest.approx(success, abs=1e-10)
    assert got.mean == pytest.approx(mean, rel=1e-9)
    assert got.answers == {}


@given(
    priors,
    st.lists(st.tuples(inner, st.sampled_from(["7", "8", "9", None])), max_size=7),
    st.floats(0.05, 0.95),
    st.integers(0, 40),
)
def test_votes_equal_enumeration(prior: Prior, samples: list[tuple[float, str | None]], rho: float, more: int) -> None:
    q, answers = [value for value, _ in samples], [answer for _, answer in samples]
    got = posterior(prior, q, answers, rho)
    solved, success, mean, by_answer = enumerated(prior, q, answers, rho, more)
    assert got.solved == pytest.approx(solved, abs=1e-10)
    assert got.expected_success(more) == pytest.approx(success, abs=1e-10)
    assert got.mean == pytest.approx(mean, rel=1e-9)
    assert got.answers == pytest.approx(by_answer, abs=1e-10)
    assert sum(got.answers.values()) == pytest.approx(got.solved, abs=1e-10)


@given(st.lists(probabilities, min_size=1, max_size=30), st.floats(0.01, 0.999), st.integers(1, 200))
def test_without_samples_it_is_the_budget_of_the_quantiles(prior: Prior, target: float, limit: int) -> None:
    got, quantiles = posterior(prior, []), torch.tensor([prior], dtype=torch.float64)
    assert got.solved == 0.0
    curve = ias_curve(quantiles, limit)[0]
    assert [got.expected_success(k) for k in range(1, limit + 1)] == pytest.approx(curve.tolist(), abs=1e-12)
    if not bool(((curve - target).abs() < 1e-10).any()):  # where it touches, the order of summation decides
        assert got.samples_needed(target, limit) == int(ias_budget(quantiles, target, limit))


@given(
    st.lists(probabilities, min_size=1, max_size=20),
    st.lists(st.tuples(probabilities, st.sampled_from([None, 1, 2])), max_size=40),
    st.sampled_from([None, 0.01, 0.5, 0.99]),
    st.floats(0.01, 0.999),
)
def test_laws_hold_at_the_edges_too(
    prior: Prior, samples: list[tuple[float, int | None]], rho: float | None, target: float
) -> None:
    got = posterior(prior, [q for q, _ in samples], [a for _, a in samples], rho)
    assert 0.0 <= got.solved <= 1.0
    assert min(prior) - 1e-9 <= got.mean <= max(prior) + 1e-9
    curve = [got.expected_success(k) for k in range(30)]
    assert all(math.isfinite(value) for value in curve)
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(curve))
    needed = got.samples_needed(target, 20)
    assert 0 <= needed <= 20
    assert needed == 20 or got.expected_success(needed) >= target - 1e-12
    assert needed == 0 or got.expected_success(needed - 1) < target


def test_certain_and_long_evidence() -> None:
    assert posterior([0.2, 0.6], [1.0]).solved == pytest.approx(1.0, abs=1e-9)
    assert posterior([0.2, 0.6], [0.0]).solved == pytest.approx(0.0, abs=1e-9)
    assert posterior([0.0], [0.7]).solved == pytest.approx(0.7)  # the prior knows no p: the PRM's word stands alone
    assert posterior([1.0], [0.7]).solved == pytest.approx(0.7)
    both = posterior([0.0, 1.0], [1.0, 0.0])  # each certainty excludes the other: an answer all the same
    assert both.mean == pytest.approx(0.5)
    assert 0.5 < both.solved < 1.0
    long = posterior([0.001, 0.01, 0.3], [0.001] * 5000)
    assert long.mean == pytest.approx(0.001, rel=1e-3)
    assert 0.0 < long.solved < 1.0


def test_a_prm_that_knows_nothing_changes_nothing() -> None:
    prior = [0.1, 0.4, 0.7]
    got = posterior(prior, [0.4] * 3)  # the base rate
    assert got.mean == pytest.approx(0.4)
    assert got.solved == pytest.approx(posterior(prior, []).expected_success(3))
    assert got.samples_needed(0.9, 64) == posterior(prior, []).samples_needed(0.9, 64) - 3


def test_agreement_is_evidence_where_mistakes_differ() -> None:
    prior = [0.3, 0.5]
    apart, together = (posterior(prior, [0.4] * 4, answers, 0.05) for answers in ("abcd", "abaa"))
    assert together.solved > 0.9 > apart.solved
    assert together.answers["a"] > 0.9
    careless = posterior(prior, [0.4] * 4, "abaa", 0.95)
    assert careless.solved < together.solved


def draw_question(generator: np.random.Generator, prior: Prior, n: int) -> tuple[list[bool], list[float]]:
    """Right and wrong samples of one question, and a calibrated PRM's word on them: a score N(+-1, 1) read by Bayes."""
    base, p = float(np.mean(prior)), generator.choice(prior)
    right = (generator.random(n) < p).tolist()
    ratio = [math.exp(2 * (generator.normal() + (1 if good else -1))) for good in right]
    return right, [base * r / (base * r + 1 - base) for r in ratio]


def say(generator: np.random.Generator, right: list[bool], rho: float) -> list[int]:
    """Final answers: 0 is right, mistakes agree as in the restaurant."""
    theta, seen, said = (1 - rho) / rho, list[int](), list[int]()
    for good in right:
        if good:
            said.append(0)
            continue
        new = generator.random() < theta / (theta + len(seen))
        seen.append(max(seen, default=0) + 1 if new else int(generator.choice(seen)))
        said.append(seen[-1])
    return said


def check_calibrated(pairs: list[tuple[float, bool]]) -> None:
    """In every fifth of the predictions, as many happened as were predicted."""
    pairs.sort()
    for part in np.array_split(np.array(pairs, dtype=float), 5):
        said, happened = part[:, 0].mean(), part[:, 1].mean()
        error = math.sqrt((part[:, 0] * (1 - part[:, 0])).sum()) / len(part)
        assert abs(happened - said) < 3.5 * error + 1e-9


@pytest.mark.parametrize("rho", [None, 0.3])
def test_what_it_says_happens(rho: float | None) -> None:
    generator = np.random.default_rng(5)
    prior = [0.02, 0.1, 0.3, 0.5, 0.8]
    solved, later, named = [], [], []
    for _ in range(3000):
        right, q = draw_question(generator, prior, 6)
        said = say(generator, right, rho) if rho else None
        got = posterior(prior, q[:4], said, rho)
        solved.append((got.solved, any(right[:4])))
        later.append((got.expected_success(2), any(right)))
        named.append((got.answers.get(0, 0.0), bool(said) and any(right[:4])))
    check_calibrated(solved)
    check_calibrated(later)
    if rho is not None:
        # Which answer is right: the probabilities of all answers named, not only of the right one.
        assert np.mean([value for value, _ in named]) < np.mean([value for value, _ in solved])


def test_stopping_at_a_target_keeps_it() -> None:
    """Optional stopping: where drawing stops at a probability, that share is solved."""
    generator = np.random.default_rng(6)
    prior, reached = [0.1, 0.3, 0.5, 0.8], []
    for _ in range(2000):
        right, q = draw_question(generator, prior, 60)
        got, n = posterior(prior, []), 0
        while n < 60 and got.samples_needed(0.8, 60 - n):
            got.observe(q[n])
            n += 1
        reached.append((got.solved, any(right[:n])))
    check_calibrated(reached)
    assert np.mean([good for _, good in reached]) > 0.8


@settings(deadline=None)
@given(priors, st.lists(inner, max_size=5), st.integers(50, 400))
def test_resampled_for_the_batch_ops(prior: Prior, q: list[float], levels: int) -> None:
    got = posterior(prior, q)
    for solved_as in (0.0, 1.0):
        rows = got.resampled(levels, solved_as=solved_as)
        assert (len(rows), rows.dtype) == (levels, torch.float64)
        assert bool((rows.diff() >= 0).all())
    # Each of the M + 1 weights may be rounded by 1 / levels.
    room = (len(prior) + 1) / levels
    curve = ias_curve(got.resampled(levels, solved_as=1.0)[None], 10)[0].tolist()
    assert curve == pytest.approx([got.expected_success(k) for k in range(1, 11)], abs=room)
    gain = ias_curve(got.resampled(levels, solved_as=0.0)[None], 10)[0].tolist()
    wanted = [got.expected_success(k) - got.solved for k in range(1, 11)]
    assert gain == pytest.approx(wanted, abs=room)


def test_resampled_gives_the_prior_back() -> None:
    prior = [0.1, 0.2, 0.7]
    for solved_as in (0.0, 1.0):
        assert posterior(prior, []).resampled(3, solved_as=solved_as).tolist() == prior


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SuccessPosterior([0.1]), TypeError, "quantiles must be a floating torch.Tensor, got list"),  # type: ignore[arg-type]
        (lambda: SuccessPosterior(torch.ones(2, 2)), ValueError, r"shape \[M\] with M >= 1, got \(2, 2\)"),
        (lambda: SuccessPosterior(torch.tensor([float("nan")])), ValueError, "must not hold NaN"),
        (lambda: posterior([0.5], [1.5]), ValueError, r"probability_right must lie in \[0, 1\], got 1.5"),
        (lambda: posterior([0.5], [], rho=1.0), ValueError, r"wrong_agreement must lie in \(0, 1\), got 1.0"),
        (lambda: posterior([0.5], []).resampled(0, solved_as=0.0), ValueError, "levels must be >= 1, got 0"),
        (lambda: posterior([0.5], []).resampled(9, solved_as=0.5), ValueError, "solved_as must be 0 or 1, got 0.5"),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
