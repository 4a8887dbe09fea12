"""Best-of-N as a state machine: what to draw, what to give up, when a question is done.

It knows neither engine nor PRM nor clock: whoever owns it carries out its actions and reports what came of them, so the
same decisions serve an offline loop, an event loop and a request handler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from prmfast.engines.base import Completion, StepScores
from prmfast.ias._aggregate import Aggregate, aggregate_score
from prmfast.ias._check import probability, whole
from prmfast.ias._rules import Decision, Evidence, GlobalRule, Plan, PolicyRule, Question, Rule, TargetRule
from prmfast.ias.policies import BudgetPolicy, GlobalBudget, TargetBudget

__all__ = [
    "Abort",
    "Action",
    "BestOfNController",
    "Decision",
    "Done",
    "Draw",
    "Evidence",
    "Finished",
    "Opening",
    "Outcome",
]

Update = Literal["none", "posterior"]


@dataclass(frozen=True, slots=True)
class Draw:
    """Start the sample of question ``key`` with this seed."""

    key: Hashable
    seed: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Give this sample up; it must not be reported any more."""

    key: Hashable
    seed: int


@dataclass(frozen=True, slots=True)
class Done:
    """The question is answered: `BestOfNController.take` hands its outcome out."""

    key: Hashable


Action: TypeAlias = Draw | Abort | Done


@dataclass(frozen=True, slots=True)
class Opening:
    """A question to open: ``first`` is the PRM's word on the empty answer, ``deadline`` a time on the owner's clock."""

    key: Hashable
    first: StepScores
    target: float | None = None
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished and judged sample. Of ``scores.quantiles`` [steps or 1, M] the last row is read."""

    key: Hashable
    seed: int
    completion: Completion
    scores: StepScores


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a question.

    ``used`` in the order of the seeds; ``pick`` is the index of the highest scored of them, the first among equals,
    None without any. ``surplus`` finished before the question was done but came too late to count, ``aborted`` are the
    seeds that were given up. ``expected`` is the first estimate's mean.
    """

    key: Hashable
    used: tuple[Evidence, ...]
    pick: int | None
    score: float | None
    surplus: tuple[Evidence, ...]
    aborted: tuple[int, ...]
    decisions: tuple[Decision, ...]
    expected: float
    expired: bool


class BestOfNController:
    """Decides for any number of questions at once which samples to draw.

    A question's samples have the seeds ``seed``, ``seed + 1``, ... and are taken into account in this order, whenever
    they finish. So decisions do not depend on timing (deadlines apart), and the samples used are the first N of a run
    with a fixed number, N being what the decisions came to.

    Args:
        policy: who decides on N. Policies over the whole batch (`BudgetPolicy.per_question` False) take their questions
            in one `open_all` and are asked once all their samples are in.
        update: "none" asks the policy again when the samples that it asked for are in. "posterior" learns from every
            sample (`prmfast.ias.posterior`): `TargetBudget` stops once one sample is right with the target's
            probability, `GlobalBudget` re-allocates what is left after every round.
        seed: of each question's first sample. n_max: no question gets more.
        ahead: most samples of a question under way or not yet taken into account; None: what the budget says, 1 for a
            `GlobalBudget` with ``update="posterior"``. Without such a budget it changes cost and time, never results.
        votes: final answer of a completion's text, None if it has none; lets agreement count as evidence.
        wrong_agreement: probability that two wrong samples of a question have the same final answer.
        aggregate: an answer's score from its step scores, for the pick.
    """

    def __init__(
        self,
        policy: BudgetPolicy,
        *,
        update: Update = "none",
        seed: int = 0,
        n_max: int = 64,
        ahead: int | None = None,
        votes: Callable[[str], Hashable | None] | None = None,
        wrong_agreement: float = 0.2,
        aggregate: Aggregate = "last",
    ) -> None:
        if not isinstance(policy, BudgetPolicy):
            raise TypeError(f"policy must be a BudgetPolicy, got {type(policy).__name__}")
        whole("seed", seed, low=0)
        whole("n_max", n_max, low=1)
        if ahead is not None:
            whole("ahead", ahead, low=1)
        if votes is not None and not callable(votes):
            raise TypeError(f"votes must be a function of a completion's text, got {type(votes).__name__}")
        if votes is not None and update == "none":
            raise ValueError("votes need update='posterior', got update='none'")
        probability("wrong_agreement", wrong_agreement)
        aggregate_score((), aggregate)
        self.policy = policy
        self.seed = seed
        self.aggregate = aggregate
        self._rule = self._make_rule(policy, update, n_max, ahead, votes, wrong_agreement)
        self._ahead = n_max if ahead is None else ahead
        self._open: dict[Hashable, Question] = {}
        self._batch: list[Question] = []
        self._rounds = 0
        self._done: dict[Hashable, Outcome] = {}

    @staticmethod
    def _make_rule(
        policy: BudgetPolicy,
        update: str,
        n_max: int,
        ahead: int | None,
        votes: Callable[[str], Hashable | None] | None,
        wrong_agreement: float,
    ) -> Rule:
        if update == "none":
            return PolicyRule(policy, n_max)
        if update != "posterior":
            raise ValueError(f"update must be 'none' or 'posterior', got {update!r}")
        if isinstance(policy, TargetBudget):
            return TargetRule(policy, n_max, votes, wrong_agreement)
        if isinstance(policy, GlobalBudget):
            return GlobalRule(policy, n_max, ahead or 1, votes, wrong_agreement)
        raise ValueError(f"update='posterior' needs TargetBudget or GlobalBudget, got {type(policy).__name__}")

    @property
    def reads_quantiles(self) -> bool:
        """Whether the quantiles of finished samples matter; without, their scores do for the pick."""
        return self._rule.reads_quantiles

    @property
    def per_question(self) -> bool:
        """Whether questions are decided apart, so that they may be opened at any time."""
        return self._rule.per_question

    @property
    def open_keys(self) -> tuple[Hashable, ...]:
        """Questions that are not done."""
        return tuple(self._open)

    @property
    def next_deadline(self) -> float | None:
        """When `expire` has something to do."""
        return min((q.deadline for q in self._open.values() if q.deadline is not None), default=None)

    def running(self, key: Hashable) -> frozenset[int]:
        """Seeds of an open question's samples that were started and neither reported nor given up."""
        return frozenset(self._open[key].running) if key in self._open else frozenset()

    def open(
        self,
        key: Hashable,
        first: StepScores,
        *,
        target: float | None = None,
        deadline: float | None = None,
        now: float = 0.0,
    ) -> list[Action]:
        """Takes up one question; see `open_all`."""
        return self.open_all([Opening(key, first, target, deadline)], now=now)

    def open_all(self, openings: Sequence[Opening], *, now: float = 0.0) -> list[Action]:
        """Takes up questions and says what to draw first.

        ValueError for a key in use, a first estimate that is not one row, a ``target`` without a `TargetBudget`, and
        for further questions while a policy over the whole batch has open ones.
        """
        if not self.per_question and self._batch:
            raise ValueError(
                f"{type(self.policy).__name__} decides over one batch: open its questions in one call of open_all"
            )
        fresh: dict[Hashable, Question] = {}
        for opening in openings:
            if opening.key in self._open or opening.key in self._done or opening.key in fresh:
                raise ValueError(f"key must be new, got {opening.key!r} again")
            fresh[opening.key] = self._question(opening)
        for question in fresh.values():
            self._rule.begin(question)
        self._open.update(fresh)
        if not self.per_question:
            self._batch = list(fresh.values())
        return self._go_on(fresh.values(), now)

    def finished(
        self, key: Hashable, seed: int, completion: Completion, scores: StepScores, *, now: float = 0.0
    ) -> list[Action]:
        """Takes one finished sample; see `finished_all`."""
        return self.finished_all([Finished(key, seed, completion, scores)], now=now)

    def finished_all(self, finished: Sequence[Finished], *, now: float = 0.0) -> list[Action]:
        """Takes finished samples and says what to do next. ValueError for one that was not running, or has a NaN."""
        for row in finished:
            if row.key not in self._open or row.seed not in self._open[row.key].running:
                raise ValueError(f"sample must be running, got seed {row.seed} of question {row.key!r}")
            if any(math.isnan(score) for score in row.scores.scores):
                raise ValueError(f"scorer must not return NaN, got NaN for an answer of question {row.key!r}")
        touched: dict[Hashable, Question] = {}
        for row in finished:
            question = touched[row.key] = self._open[row.key]
            question.running.discard(row.seed)  # one reported twice in a call counts once
            question.waiting[row.seed] = Evidence(row.seed, row.completion, row.scores)
        return self._go_on(touched.values(), now)

    def expire(self, now: float) -> list[Action]:
        """Answers the questions whose deadline has come with what is finished, and gives up what still runs."""
        late = [q for q in self._open.values() if q.deadline is not None and q.deadline <= now]
        actions: list[Action] = []
        for question in late:
            for seed in sorted(question.waiting):
                self._take_in(question, question.waiting.pop(seed))
            drawn, asked = len(question.used), max(question.check_at, question.draw_to)
            expected, solved = self._rule.known(question)
            why = f"deadline: {drawn} of {asked} samples finished"
            self._record(question, Plan(drawn, drawn, drawn, expected, solved, solved, why), now)
            actions += self._close(question, expired=True)
        return actions + (self._go_on((), now) if late else [])

    def cancel(self, key: Hashable, *, now: float = 0.0) -> list[Action]:
        """Forgets a question and gives up what runs of it; one that is not known is no error."""
        self._done.pop(key, None)
        question = self._open.pop(key, None)
        if question is None:
            return []
        question.closed, question.active = True, False
        actions: list[Action] = [Abort(key, seed) for seed in sorted(question.running)]
        return actions + self._go_on((), now)

    def take(self, key: Hashable) -> Outcome:
        """Hands out the outcome of a question that is done, once; KeyError for another."""
        if key not in self._done:
            raise KeyError(f"question {key!r} is not done")
        return self._done.pop(key)

    def _question(self, opening: Opening) -> Question:
        first = opening.first
        if len(first.scores) != 1 or (first.quantiles is not None and len(first.quantiles) != 1):
            raise ValueError(f"first must have one row, that of the empty answer, got {len(first.scores)}")
        if opening.target is not None:
            probability("target", opening.target)
            if not isinstance(self.policy, TargetBudget):
                raise ValueError(f"target needs a TargetBudget, got {type(self.policy).__name__}")
        prior = torch.tensor(first.scores) if first.quantiles is None else first.quantiles[0].detach().cpu()
        if bool(prior.isnan().any()):
            raise ValueError(f"first must not hold NaN, got NaN for question {opening.key!r}")
        return Question(opening.key, prior, opening.target, opening.deadline, float(prior.double().mean()))

    def _go_on(self, touched: Iterable[Question], now: float) -> list[Action]:
        if not self.per_question:
            return self._go_on_together(touched, now)
        actions: list[Action] = []
        left = list(touched)
        while left:
            due = []
            for question in left:
                if self._absorb(question):
                    due.append(question)
                else:
                    actions += self._fill(question)
            left = []
            for question, plan in zip(due, self._rule.plans(due) if due else (), strict=True):
                if self._follow(question, plan, now):
                    left.append(question)
                else:
                    actions += self._close(question)
        return actions

    def _go_on_together(self, touched: Iterable[Question], now: float) -> list[Action]:
        reported = list(touched)
        for question in reported:
            self._absorb(question)
        open_ = [question for question in self._batch if not question.closed]
        if any(len(question.used) < question.check_at for question in open_):
            return [action for question in reported for action in self._fill(question)]
        actions: list[Action] = []
        if open_:
            self._rounds += 1
            for question, plan in zip(self._batch, self._rule.plans(self._batch), strict=True):
                wants = plan.check_at > len(question.used)
                if not question.closed and (question.active or wants):
                    question.round = self._rounds - 1
                    question.active = self._follow(question, plan, now)
            for question in open_:
                actions += self._fill(question)
        if not any(question.active for question in open_):
            for question in open_:
                actions += self._close(question)
            self._batch, self._rounds = [], 0
        return actions

    def _absorb(self, question: Question) -> bool:
        """Takes in what has finished, up to the next decision; whether that is due."""
        while len(question.used) < question.check_at:
            evidence = question.waiting.pop(self.seed + len(question.used), None)
            if evidence is None:
                return False
            self._take_in(question, evidence)
        return True

    def _take_in(self, question: Question, evidence: Evidence) -> None:
        question.used.append(evidence)
        self._rule.observe(question, evidence)

    def _follow(self, question: Question, plan: Plan, now: float) -> bool:
        """Records a plan; whether it wants more samples."""
        self._record(question, plan, now)
        question.check_at, question.draw_to = plan.check_at, plan.draw_to
        return question.check_at > len(question.used)

    def _record(self, question: Question, plan: Plan, now: float) -> None:
        question.round += 1
        drawn, said = len(question.used), (plan.expected, plan.why, plan.success, plan.solved)
        question.decisions.append(Decision(question.key, question.round, drawn, plan.budget, *said, now))

    def _fill(self, question: Question) -> list[Action]:
        until = min(question.draw_to, len(question.used) + self._ahead)
        seeds = range(self.seed + question.started, self.seed + until)
        question.started = max(question.started, until)
        question.running.update(seeds)
        return [Draw(question.key, seed) for seed in seeds]

    def _close(self, question: Question, *, expired: bool = False) -> list[Action]:
        del self._open[question.key]
        question.closed, question.active = True, False
        aborted = tuple(sorted(question.running))
        scores = [aggregate_score(evidence.scores.scores, self.aggregate) for evidence in question.used]
        pick = max(range(len(scores)), key=scores.__getitem__) if scores else None
        self._done[question.key] = Outcome(
            key=question.key,
            used=tuple(question.used),
            pick=pick,
            score=None if pick is None else scores[pick],
            surplus=tuple(question.waiting[seed] for seed in sorted(question.waiting)),
            aborted=aborted,
            decisions=tuple(question.decisions),
            expected=question.expected,
            expired=expired,
        )
        return [*(Abort(question.key, seed) for seed in aborted), Done(question.key)]
