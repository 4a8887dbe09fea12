"""The controller by itself: no order of finishing changes a decision, nothing is lost, aborts hit only what runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prmfast.engines import Completion, StepScores
from prmfast.ias import (
    BestOfNController,
    BudgetPolicy,
    FixedBudget,
    GlobalBudget,
    PointBudget,
    TargetBudget,
    TauStopping,
)
from prmfast.ias._rules import _allocate
from prmfast.ias.controller import Abort, Action, Done, Draw, Finished, Opening, Outcome

from .world import BayesJudge, BernoulliEngine, prior_questions

QUESTIONS = prior_questions(12)
FIRST = BayesJudge.one(QUESTIONS[0], None)
MAKE: dict[str, Callable[..., BestOfNController]] = {
    "target": lambda **o: BestOfNController(TargetBudget(0.85, 9), update="posterior", seed=5, **o),
    "votes": lambda **o: BestOfNController(
        TargetBudget(0.85, 9), update="posterior", seed=5, votes=lambda text: text.split()[0], **o
    ),
    "global": lambda **o: BestOfNController(GlobalBudget(7, total=40, n_min=2), update="posterior", seed=5, **o),
    "eq. 5": lambda **o: BestOfNController(TargetBudget(0.85, 9), seed=5, **o),
    "tau": lambda **o: BestOfNController(TauStopping(0.5, 0.8, 9, step=2), seed=5, **o),
    "allocate": lambda **o: BestOfNController(GlobalBudget(7, total=40), seed=5, **o),
}


def sample(i: int, seed: int) -> tuple[Completion, StepScores]:
    completion = BernoulliEngine.one(QUESTIONS[i], seed)
    return completion, BayesJudge.one(QUESTIONS[i], completion.text)


def run(controller: BestOfNController, order: random.Random | None) -> dict[int, Outcome]:
    """All questions to their end; samples finish one by one in the order drawn, or by chance and some at once."""
    running: list[tuple[int, int]] = []
    done: list[Hashable] = []
    seen: set[tuple[Hashable, int]] = set()
    actions = controller.open_all([Opening(i, BayesJudge.one(q, None)) for i, q in enumerate(QUESTIONS)])
    while True:
        for action in actions:
            if isinstance(action, Done):
                done.append(action.key)
                continue
            job = (int(str(action.key)), action.seed)
            assert action.key not in done
            if isinstance(action, Draw):
                assert job not in seen
                seen.add(job)
                running.append(job)
            else:
                running.remove(job)  # what is given up runs
        for i in range(len(QUESTIONS)):
            assert controller.running(i) == {seed for k, seed in running if k == i}
        if not running:
            break
        count = 1 if order is None else order.randint(1, min(4, len(running)))
        picked = [running.pop(0 if order is None else order.randrange(len(running))) for _ in range(count)]
        actions = controller.finished_all([Finished(i, seed, *sample(i, seed)) for i, seed in picked])
    assert sorted(done, key=str) == sorted(range(len(QUESTIONS)), key=str)
    assert controller.open_keys == ()
    return {i: controller.take(i) for i in range(len(QUESTIONS))}


def decided(outcomes: dict[int, Outcome]) -> list[object]:
    """What must not depend on timing."""
    return [
        ([(e.seed, e.completion, e.scores.scores) for e in o.used], o.pick, o.score, o.decisions, o.expected, o.expired)
        for o in outcomes.values()
    ]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(MAKE)), st.sampled_from([None, 1, 2, 5]), st.integers(0, 10**6))
def test_no_order_of_finishing_changes_a_decision(name: str, ahead: int | None, order: int) -> None:
    in_order, shuffled = run(MAKE[name](ahead=ahead), None), run(MAKE[name](ahead=ahead), random.Random(order))
    assert decided(in_order) == decided(shuffled)
    if name != "global":  # whose rounds are as long as `ahead` says
        assert decided(in_order) == decided(run(MAKE[name](), None))
    for i, outcome in shuffled.items():
        n = len(outcome.used)
        assert [e.seed for e in outcome.used] == list(range(5, 5 + n))  # the first n of a run with a fixed number
        assert [e.completion for e in outcome.used] == [sample(i, e.seed)[0] for e in outcome.used]
        spent = n + len(outcome.surplus) + len(outcome.aborted)
        assert spent <= n + (ahead or 9)
        assert {e.seed for e in outcome.surplus} | set(outcome.aborted) == set(range(5 + n, 5 + spent))


def test_one_ahead_wastes_nothing() -> None:
    for name in ("target", "votes"):
        outcomes = run(MAKE[name](ahead=1), random.Random(1)).values()
        assert all(not o.surplus and not o.aborted for o in outcomes)


def test_it_stops_where_the_posterior_reaches_the_target() -> None:
    outcomes = run(MAKE["target"](), None).values()
    lengths = {len(o.used) for o in outcomes}
    assert len(lengths) > 2
    for outcome in outcomes:
        last = outcome.decisions[-1]
        assert last.solved is not None
        assert last.solved >= 0.85 or len(outcome.used) == 9
        assert [d.drawn for d in outcome.decisions] == list(range(len(outcome.used) + 1))
        assert [d.round for d in outcome.decisions] == list(range(1, len(outcome.used) + 2))
        assert all(d.solved is not None and d.solved < 0.85 for d in outcome.decisions[:-1])
        assert outcome.decisions[0].why == "first estimate: E[p] = 0.337; n_max = 9 gives 0.806"
        if len(outcome.used) == 9 and last.solved < 0.85:
            assert last.why.startswith("n_max reached; one is right with probability")
        assert all(0 <= (d.success or 0) <= 1 for d in outcome.decisions)


def test_a_global_budget_is_spent_and_re_allocated() -> None:
    outcomes = run(MAKE["global"](), None).values()
    assert sum(len(o.used) for o in outcomes) == 40
    assert all(2 <= len(o.used) <= 7 for o in outcomes)
    by_prior = run(MAKE["allocate"](), None).values()
    assert sum(len(o.used) for o in by_prior) == 40
    assert {len(o.used) for o in by_prior} == {3, 4}  # all priors are alike, so only samples tell questions apart
    assert len({len(o.used) for o in outcomes}) > 3
    for outcome in outcomes:
        assert outcome.decisions[-1].budget == len(outcome.used)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.lists(st.floats(0, 1, width=16), min_size=4, max_size=4), st.integers(0, 5)), min_size=1),
    st.integers(0, 25),
)
def test_allocation_with_caps_is_the_best(rows: list[tuple[list[float], int]], total: int) -> None:
    table, caps = torch.tensor([row for row, _ in rows], dtype=torch.float64), [cap for _, cap in rows]
    given_ = _allocate(table, total, caps)
    assert all(0 <= n <= cap for n, cap in zip(given_, caps, strict=True))
    gain = [[float((row * (1 - row) ** k).mean()) for k in range(cap)] for row, cap in zip(table, caps, strict=True)]
    got = sum(sum(g[:n]) for g, n in zip(gain, given_, strict=True))
    best = sorted((value for g in gain for value in g), reverse=True)[:total]  # gains fall along each row
    assert got == pytest.approx(sum(best), abs=1e-9)
    assert sum(given_) <= total
    assert all(n == 0 for n, row in zip(given_, table, strict=True) if not bool((row > 0).any()))


def test_a_deadline_answers_with_what_is_finished() -> None:
    controller = MAKE["eq. 5"]()
    draws = controller.open(0, FIRST, deadline=2.0)
    assert controller.next_deadline == 2.0
    seeds = [action.seed for action in draws if isinstance(action, Draw)]
    assert seeds == list(range(5, 5 + len(seeds)))
    assert len(seeds) > 3
    assert controller.finished(0, 7, *sample(0, 7), now=1.0) == []  # 5 and 6 still run
    assert controller.expire(1.9) == []
    expected = [Abort(0, seed) for seed in seeds if seed != 7]
    assert controller.expire(2.0) == [*expected, Done(0)]
    outcome = controller.take(0)
    assert [e.seed for e in outcome.used] == [7]
    assert (outcome.pick, outcome.expired, outcome.aborted) == (0, True, tuple(a.seed for a in expected))
    last = outcome.decisions[-1]
    assert (last.time, last.drawn, last.budget) == (2.0, 1, 1)
    assert last.why == f"deadline: 1 of {len(seeds)} samples finished"
    assert controller.next_deadline is None
    assert controller.expire(3.0) == []


def test_nothing_finished_by_the_deadline_is_an_answer_too() -> None:
    controller = MAKE["target"]()
    controller.open("q", FIRST, deadline=1.0)
    controller.expire(1.0)
    outcome = controller.take("q")
    assert (outcome.used, outcome.pick, outcome.score) == ((), None, None)


def test_a_cancelled_question_is_forgotten() -> None:
    controller = MAKE["target"]()
    draws = controller.open("q", FIRST)
    assert controller.cancel("q") == [Abort("q", a.seed) for a in draws if isinstance(a, Draw)]
    assert controller.open_keys == ()
    assert controller.cancel("q") == []
    with pytest.raises(KeyError, match="question 'q' is not done"):
        controller.take("q")
    with pytest.raises(ValueError, match="sample must be running, got seed 5 of question 'q'"):
        controller.finished("q", 5, *sample(0, 5))
    assert controller.open("q", FIRST) == draws


@pytest.mark.parametrize("name", ["global", "allocate"])
def test_a_batch_goes_on_without_a_cancelled_question(name: str) -> None:
    controller = MAKE[name]()
    actions = controller.open_all([Opening(i, FIRST) for i in range(3)])
    with pytest.raises(ValueError, match="GlobalBudget decides over one batch"):
        controller.open(3, FIRST)
    for i in (0, 1):
        for seed in sorted(controller.running(i)):
            assert controller.finished(i, seed, *sample(i, seed)) == []  # all wait for question 2
    actions = controller.cancel(2)
    assert [a for a in actions if isinstance(a, Abort)]
    while controller.open_keys:
        for i in (0, 1):
            for seed in sorted(controller.running(i)):
                controller.finished(i, seed, *sample(i, seed))
    spent = [len(controller.take(i).used) for i in (0, 1)]
    assert all(0 < n <= 7 for n in spent)
    assert controller.open(3, FIRST)  # the batch is over, another may begin


def test_targets_of_their_own() -> None:
    for update in ("none", "posterior"):
        controller = BestOfNController(TargetBudget(0.5, 64), update=update)  # type: ignore[arg-type]
        easy, own, hard = (
            len(controller.open(key, FIRST, target=target)) for key, target in (("a", 0.3), ("b", None), ("c", 0.95))
        )
        assert easy < own < hard
        assert BestOfNController(TargetBudget(0.95, 64)).open("c", FIRST)[-1] == Draw("c", hard - 1)


def test_an_answer_without_steps_or_final_answer_is_wrong() -> None:
    made = MAKE["votes"](ahead=1)
    made.open(0, FIRST)
    for i, scores in enumerate([StepScores(()), StepScores(())]):
        made.finished(0, 5 + i, Completion("q", 5 + i, "x", (), 1, True), scores)
    assert made.running(0) == {7}


def never() -> BestOfNController:
    return BestOfNController(FixedBudget(2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BestOfNController(3), TypeError, "policy must be a BudgetPolicy, got int"),  # type: ignore[arg-type]
        (lambda: BestOfNController(FixedBudget(2), ahead=0), ValueError, "ahead must be >= 1, got 0"),
        (
            lambda: BestOfNController(PointBudget(0.5, 9), update="posterior"),
            ValueError,
            "needs TargetBudget or GlobalBudget, got PointBudget",
        ),
        (lambda: BestOfNController(FixedBudget(2), update="often"), ValueError, "update must be 'none' or 'posterior'"),  # type: ignore[arg-type]
        (lambda: BestOfNController(FixedBudget(2), votes=str), ValueError, "votes need update='posterior'"),
        (
            lambda: BestOfNController(TargetBudget(0.5, 9), update="posterior", votes="last"),  # type: ignore[arg-type]
            TypeError,
            "votes must be a function of a completion's text, got str",
        ),
        (lambda: never().open(0, FIRST, target=0.5), ValueError, "target needs a TargetBudget, got FixedBudget"),
        (lambda: never().open(0, StepScores((0.5, 0.5))), ValueError, "first must have one row"),
        (lambda: never().open(0, StepScores((float("nan"),))), ValueError, "first must not hold NaN"),
        (lambda: never().open_all([Opening(0, FIRST)] * 2), ValueError, "key must be new, got 0 again"),
        (
            lambda: BestOfNController(TargetBudget(0.5, 9)).open(0, FIRST, target=1.0),
            ValueError,
            r"target must lie in \(0, 1\), got 1.0",
        ),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_refused_report_changes_nothing() -> None:
    controller = never()
    controller.open(0, FIRST)
    completion, _ = sample(0, 0)
    with pytest.raises(ValueError, match="scorer must not return NaN, got NaN for an answer of question 0"):
        controller.finished_all(
            [Finished(0, 1, *sample(0, 1)), Finished(0, 0, completion, StepScores((float("nan"),)))]
        )
    assert controller.running(0) == {0, 1}


@dataclass
class Known:
    running: set[int] = field(default_factory=set)
    drawn: set[int] = field(default_factory=set)
    deadline: float | None = None
    done: bool = False


class AnyOrder(RuleBasedStateMachine):
    """Questions come, finish, expire and go in any order; a plain model keeps account."""

    policy: BudgetPolicy = TargetBudget(0.85, 9)

    def __init__(self) -> None:
        super().__init__()
        self.controller = BestOfNController(self.policy, update="posterior", ahead=3)
        self.known: dict[int, Known] = {}
        self.keys, self.now = 0, 0.0

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            row = self.known[int(str(action.key))]
            assert not row.done
            if isinstance(action, Draw):
                assert action.seed not in row.drawn
                row.drawn.add(action.seed)
                row.running.add(action.seed)
            elif isinstance(action, Abort):
                row.running.remove(action.seed)
            else:
                assert not row.running
                row.done = True

    @rule(goal=st.sampled_from([None, 0.3, 0.99]), within=st.sampled_from([None, 1.0, 3.0]))
    def open(self, goal: float | None, within: float | None) -> None:
        key, self.keys = self.keys, self.keys + 1
        self.known[key] = Known(deadline=None if within is None else self.now + within)
        first = BayesJudge.one(QUESTIONS[key % 12], None)
        self.carry_out(self.controller.open(key, first, target=goal, deadline=self.known[key].deadline, now=self.now))

    @precondition(lambda self: any(row.running for row in self.known.values()))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        jobs = sorted((key, seed) for key, row in self.known.items() for seed in row.running)
        picked = data.draw(st.lists(st.sampled_from(jobs), min_size=1, max_size=4, unique=True))
        for key, seed in picked:
            self.known[key].running.remove(seed)
        rows = [Finished(key, seed, *sample(key % 12, seed)) for key, seed in picked]
        self.carry_out(self.controller.finished_all(rows, now=self.now))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.known)))
        self.carry_out(self.controller.cancel(key, now=self.now))
        assert not self.known.pop(key).running

    @rule(passed=st.floats(0.1, 2.0))
    def wait(self, passed: float) -> None:
        self.now += passed
        self.carry_out(self.controller.expire(self.now))
        late = [row for row in self.known.values() if row.deadline is not None and row.deadline <= self.now]
        assert all(row.done for row in late)

    @precondition(lambda self: any(row.done for row in self.known.values()))
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, row in self.known.items() if row.done)))
        outcome, row = self.controller.take(key), self.known.pop(key)
        reported = {e.seed for e in outcome.used} | {e.seed for e in outcome.surplus} | set(outcome.aborted)
        assert reported == row.drawn  # nothing is lost
        assert outcome.expired or [e.seed for e in outcome.used] == list(range(len(outcome.used)))

    @invariant()
    def agrees(self) -> None:
        for key, row in self.known.items():
            assert self.controller.running(key) == row.running
            assert row.done == (key not in self.controller.open_keys)
            assert row.done or row.running  # an open question waits for something


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
