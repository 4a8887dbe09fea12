"""How many samples a question should have, as the controller asks: by policy alone, or with what samples have shown."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from prmfast.engines.base import Completion, StepScores
from prmfast.ias.policies import BudgetPolicy, BudgetState, GlobalBudget, TargetBudget
from prmfast.ias.posterior import SuccessPosterior
from prmfast.ops import ias_allocate, ias_budget

# Equally weighted values that stand for a posterior in `ias_allocate`: no probability moves by more than 1 / 256.
ALLOCATION_LEVELS = 256


@dataclass(frozen=True, slots=True)
class Evidence:
    """One finished and judged sample."""

    seed: int
    completion: Completion
    scores: StepScores


@dataclass(frozen=True, slots=True)
class Decision:
    """What was said of a question in a round: ``budget`` samples in total, of which ``drawn`` were in by then.

    ``expected`` is the mean success probability of one sample, ``success`` the probability that one of ``budget``
    samples is right, ``solved`` that one of ``drawn`` is already; ``time`` is the driver's clock and compares as equal.
    """

    question: Hashable
    round: int
    drawn: int
    budget: int
    expected: float
    why: str
    success: float | None = None
    solved: float | None = None
    time: float = field(default=0.0, compare=False)


@dataclass(slots=True, eq=False)
class Question:
    """The controller's record of one open question. The next decision is due when ``check_at`` samples are in."""

    key: Hashable
    prior: Tensor
    target: float | None
    deadline: float | None
    expected: float
    posterior: SuccessPosterior | None = None
    round: int = 0
    check_at: int = 0
    draw_to: int = 0
    started: int = 0
    active: bool = True
    closed: bool = False
    used: list[Evidence] = field(default_factory=list)
    running: set[int] = field(default_factory=set)
    waiting: dict[int, Evidence] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """``budget`` samples in total; ask again once ``check_at`` are in; start none beyond ``draw_to`` before that."""

    budget: int
    check_at: int
    draw_to: int
    expected: float
    success: float
    solved: float
    why: str


class Rule(Protocol):
    """Decides for questions whose evidence is in."""

    per_question: bool
    reads_quantiles: bool

    def begin(self, question: Question) -> None:
        """A question is opened."""
        ...

    def observe(self, question: Question, evidence: Evidence) -> None:
        """The next sample of a question, in the order of the seeds."""
        ...

    def plans(self, questions: Sequence[Question]) -> list[Plan]:
        """One per question; those of closed ones are not read."""
        ...

    def known(self, question: Question) -> tuple[float, float]:
        """Mean success probability of one sample, and the probability that one of those drawn is right."""
        ...


def probability_right(scores: StepScores) -> float:
    """The PRM's word on a finished answer: mean quantile of the last step, else its score; 0 without steps."""
    if not scores.scores:
        return 0.0
    if scores.quantiles is None:
        return min(max(float(scores.scores[-1]), 0.0), 1.0)
    return min(max(float(scores.quantiles[-1].mean(dtype=torch.float64)), 0.0), 1.0)


class PolicyRule:
    """The policy's word, asked again when the samples that it asked for are in."""

    def __init__(self, policy: BudgetPolicy, n_max: int) -> None:
        self.policy, self.n_max = policy, n_max
        self.per_question = policy.per_question
        self.reads_quantiles = policy.uses_candidates

    def begin(self, question: Question) -> None:
        """Nothing to prepare."""

    def observe(self, question: Question, evidence: Evidence) -> None:
        """Nothing to learn: the policy reads the finished samples itself."""

    def known(self, question: Question) -> tuple[float, float]:
        """By the first estimate."""
        return question.expected, float(_success(question.prior[None], torch.tensor([len(question.used)])))

    def plans(self, questions: Sequence[Question]) -> list[Plan]:
        """One call of the policy."""
        quantiles = torch.stack([question.prior for question in questions])
        drawn = torch.tensor([len(question.used) for question in questions])
        asked = self._ask(questions, quantiles, drawn)
        budgets = [min(n, self.n_max) for n in asked]
        success = _success(quantiles, torch.tensor(budgets).maximum(drawn)).tolist()
        solved = _success(quantiles, drawn).tolist()
        rows = zip(questions, asked, budgets, success, solved, strict=True)
        return [self._plan(question, n, budget, s, done) for question, n, budget, s, done in rows]

    def _ask(self, questions: Sequence[Question], quantiles: Tensor, drawn: Tensor) -> list[int]:
        if isinstance(self.policy, TargetBudget) and any(question.target is not None for question in questions):
            default = self.policy.target
            targets = [default if question.target is None else question.target for question in questions]
            budget = ias_budget(quantiles, torch.tensor(targets, dtype=torch.float64), self.policy.n_max)
        elif self.policy.uses_candidates and int(drawn.max()):
            budget = self.policy.budget(BudgetState(quantiles, drawn, *_candidates(questions)))
        else:
            budget = self.policy.budget(BudgetState(quantiles, drawn))
        if tuple(budget.shape) != tuple(drawn.shape) or budget.is_floating_point():
            raise ValueError(
                f"{type(self.policy).__name__}.budget must return integers [{len(questions)}], "
                f"got {budget.dtype} {tuple(budget.shape)}"
            )
        return [int(n) for n in budget.tolist()]

    def _plan(self, question: Question, asked: int, budget: int, success: float, solved: float) -> Plan:
        drawn = len(question.used)
        if budget > drawn:
            why = _first(question) if question.round == 0 else "not enough yet"
        else:
            limit = min(self.n_max, getattr(self.policy, "n_max", self.n_max))
            why = "n_max reached" if drawn >= limit else "enough"
        if asked > self.n_max:
            why += f"; {asked} asked for, n_max = {self.n_max}"
        until = max(budget, drawn)
        return Plan(budget, until, until, question.expected, success, solved, why)


class _PosteriorRule:
    """Shared by the rules that learn from every sample."""

    reads_quantiles = True

    def __init__(self, n_max: int, votes: Callable[[str], Hashable | None] | None, wrong_agreement: float) -> None:
        self.n_max, self.votes = n_max, votes
        self.wrong_agreement = None if votes is None else wrong_agreement

    def begin(self, question: Question) -> None:
        """The prior is the first estimate."""
        question.posterior = SuccessPosterior(question.prior, wrong_agreement=self.wrong_agreement)

    def observe(self, question: Question, evidence: Evidence) -> None:
        """Takes the PRM's word and the vote."""
        answer = None if self.votes is None else self.votes(evidence.completion.text)
        _posterior(question).observe(probability_right(evidence.scores), answer)

    def known(self, question: Question) -> tuple[float, float]:
        """By the posterior."""
        return _posterior(question).mean, _posterior(question).solved


class TargetRule(_PosteriorRule):
    """Stops as soon as one sample is right with the target's probability; asked again after every sample."""

    per_question = True

    def __init__(self, policy: TargetBudget, n_max: int, *votes: Any) -> None:
        super().__init__(min(n_max, policy.n_max), *votes)
        self.policy = policy

    def plans(self, questions: Sequence[Question]) -> list[Plan]:
        """The exact smallest number of further samples."""
        return [self._plan(question) for question in questions]

    def _plan(self, question: Question) -> Plan:
        posterior, drawn = _posterior(question), len(question.used)
        target = self.policy.target if question.target is None else question.target
        left = self.n_max - drawn
        more = posterior.samples_needed(target, left)
        success, solved = posterior.expected_success(more), posterior.solved
        reached = f"one is right with probability {solved:.3f}, target {target:g}"
        if more == 0:
            why = "n_max reached; " + reached if left == 0 and solved < target else reached
        else:
            why = _first(question) if drawn == 0 else f"{reached}: {more} more"
            if more == left and success < target:
                why += f"; n_max = {self.n_max} gives {success:.3f}"
        budget = drawn + more
        return Plan(budget, drawn + (more > 0), budget, posterior.mean, success, solved, why)


class GlobalRule(_PosteriorRule):
    """Re-allocates what is left of a global budget after every round, by `prmfast.ops.ias_allocate`."""

    per_question = False

    def __init__(self, policy: GlobalBudget, n_max: int, ahead: int, *votes: Any) -> None:
        super().__init__(min(n_max, policy.n_max), *votes)
        self.policy, self.ahead = policy, ahead

    def plans(self, questions: Sequence[Question]) -> list[Plan]:
        """What is left goes where it solves the most; nothing goes where a sample gains nothing."""
        total = self.policy.total
        if total is None:
            assert self.policy.mean_per_question is not None
            total = round(self.policy.mean_per_question * len(questions))
        left = total - sum(len(question.used) for question in questions)
        rows = torch.stack([_posterior(q).resampled(ALLOCATION_LEVELS, solved_as=0.0) for q in questions])
        if all(question.round == 0 for question in questions):
            more = [int(n) for n in ias_allocate(rows, left, self.n_max, n_min=self.policy.n_min).tolist()]
        else:
            caps = [0 if q.closed else self.n_max - len(q.used) for q in questions]
            more = _allocate(rows, left, caps)
        return [self._plan(question, n) for question, n in zip(questions, more, strict=True)]

    def _plan(self, question: Question, more: int) -> Plan:
        posterior, drawn = _posterior(question), len(question.used)
        until = drawn + min(more, self.ahead)
        if question.round == 0:
            until = max(until, self.policy.n_min)
        success, solved = posterior.expected_success(more), posterior.solved
        if more:
            why = _first(question) if drawn == 0 else f"one is right with probability {solved:.3f}: {more} more"
        elif drawn >= self.n_max:
            why = "n_max reached"
        else:
            why = f"one is right with probability {solved:.3f}: others gain more"
        return Plan(drawn + more, until, until, posterior.mean, success, solved, why)


def _allocate(rows: Tensor, total: int, caps: Sequence[int]) -> list[int]:
    """`ias_allocate` with a cap for each row; rows that gain nothing get nothing.

    Gains fall with every sample, so a row that would get more than its cap has all of it in the best allocation too:
    it is served, and the rest is allocated again.
    """
    given = [0] * len(caps)
    open_ = [i for i, cap in enumerate(caps) if cap > 0 and bool((rows[i] > 0).any())]
    while open_ and total > 0:
        share = ias_allocate(rows[open_], total, max(caps[i] for i in open_)).tolist()
        over = {i for i, n in zip(open_, share, strict=True) if n > caps[i]}
        for i, n in zip(open_, share, strict=True):
            if i in over or not over:
                given[i] = min(int(n), caps[i])
                total -= given[i]
        open_ = [i for i in open_ if i not in over] if over else []
    return given


def _posterior(question: Question) -> SuccessPosterior:
    assert question.posterior is not None
    return question.posterior


def _first(question: Question) -> str:
    return f"first estimate: E[p] = {question.expected:.3f}"


def _success(quantiles: Tensor, n: Tensor) -> Tensor:
    """Probability that one of n samples is right, by the first estimate; [B, M], [B] -> [B]."""
    fail: Tensor = (1 - quantiles.double().clamp(0, 1)) ** n[:, None]
    return 1 - fail.mean(1)


def _candidates(questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """Quantiles of the finished answers [B, D, M] and which slots hold one [B, D]."""
    width = len(questions[0].prior)
    table = torch.zeros(len(questions), max(len(question.used) for question in questions), width)
    filled = torch.zeros(table.shape[:2], dtype=torch.bool)
    for i, question in enumerate(questions):
        for j, evidence in enumerate(question.used):
            filled[i, j] = True
            scores = evidence.scores
            if scores.scores:
                row = torch.tensor(scores.scores[-1:]) if scores.quantiles is None else scores.quantiles[-1]
                if len(row) != width:
                    raise ValueError(f"scores must hold {width} quantiles like the first estimate, got {len(row)}")
                table[i, j] = row
    return table, filled
