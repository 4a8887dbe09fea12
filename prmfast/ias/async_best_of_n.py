"""Adaptive best-of-N on an event loop: many questions at once, each with its own target and deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, field

from prmfast.engines.base import AsyncEngine, AsyncJudge, Completion, StepScores, Verifier
from prmfast.ias._aggregate import Aggregate
from prmfast.ias._check import positive_number, whole
from prmfast.ias._results import BestOfNResult, collect
from prmfast.ias.controller import BestOfNController, Draw, Finished, Opening, Outcome, Update
from prmfast.ias.policies import BudgetPolicy

_KEY = 0  # a controller of its own for each question


@dataclass(frozen=True)
class AsyncBestOfN:
    """`BestOfN` for an `AsyncEngine` and an `AsyncJudge`: the same decisions, samples and picks.

    Args:
        engine, judge, verifier: draw, judge and check samples.
        policy: decides question by question (`BudgetPolicy.per_question`).
        concurrency: most questions at work at once; further ones wait.
        seed, n_max, ahead, update, votes, wrong_agreement, aggregate: as in `BestOfNController`.
    """

    engine: AsyncEngine
    judge: AsyncJudge
    policy: BudgetPolicy
    verifier: Verifier | None = None
    _: KW_ONLY
    update: Update = "posterior"
    ahead: int | None = None
    votes: Callable[[str], Hashable | None] | None = None
    wrong_agreement: float = 0.2
    seed: int = 0
    n_max: int = 64
    aggregate: Aggregate = "last"
    concurrency: int = 256
    _room: asyncio.Semaphore = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.engine, AsyncEngine):
            raise TypeError(f"engine must have policy_id, draw() and stats(), got {type(self.engine).__name__}")
        if not isinstance(self.judge, AsyncJudge):
            raise TypeError(f"judge must have prm_id and judge(), got {type(self.judge).__name__}")
        whole("concurrency", self.concurrency, low=1)
        if not self.controller().per_question:
            raise ValueError(f"policy must decide question by question, got {type(self.policy).__name__}")
        object.__setattr__(self, "_room", asyncio.Semaphore(self.concurrency))

    def controller(self) -> BestOfNController:
        """A fresh controller with these settings."""
        return BestOfNController(
            self.policy,
            update=self.update,
            seed=self.seed,
            n_max=self.n_max,
            ahead=self.ahead,
            votes=self.votes,
            wrong_agreement=self.wrong_agreement,
            aggregate=self.aggregate,
        )

    async def run_one(
        self, question: str, *, target: float | None = None, deadline: float | None = None
    ) -> BestOfNResult:
        """Answers one question; the result has one answer.

        ``deadline`` seconds after the call, what is finished by then is the answer (nothing, where it had no room to
        begin before). Cancelling the call, or an error in it, aborts its requests inside the engine; when it returns
        or raises, none of them runs.
        """
        outcome = await self._outcome(question, target, deadline)
        return collect([question], [outcome], self.verifier, (self.engine.policy_id, self.judge.prm_id))

    async def run(
        self, questions: Sequence[str], *, targets: Sequence[float] | None = None, deadline: float | None = None
    ) -> BestOfNResult:
        """Answers all questions at once, at most ``concurrency`` of them at work; an error ends all of them."""
        if isinstance(questions, str) or len(questions) == 0:
            raise ValueError(f"questions must be a sequence with at least one string, got {questions!r}")
        if targets is not None and len(targets) != len(questions):
            raise ValueError(f"targets must have one entry per question ({len(questions)}), got {len(targets)}")
        wanted: Sequence[float | None] = [None] * len(questions) if targets is None else targets
        pairs = zip(questions, wanted, strict=True)
        tasks = [asyncio.create_task(self._outcome(question, target, deadline)) for question, target in pairs]
        try:
            outcomes = await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)
        return collect(questions, outcomes, self.verifier, (self.engine.policy_id, self.judge.prm_id))

    async def _outcome(self, question: str, target: float | None, deadline: float | None) -> Outcome:
        if deadline is not None:
            positive_number("deadline", deadline)
        start = time.monotonic()
        async with self._room:
            first = await self.judge.judge(question, None)
            call = _Call(self, question, start)
            try:
                return await call.go(Opening(_KEY, first, target, deadline))
            finally:
                await _cancel(list(call.seeds))


class _Call:
    """One question under way: a task for each sample that runs."""

    def __init__(self, best: AsyncBestOfN, question: str, start: float) -> None:
        self.best, self.question, self.start = best, question, start
        self.controller = best.controller()
        self.seeds: dict[asyncio.Task[tuple[Completion, StepScores]], int] = {}

    async def go(self, opening: Opening) -> Outcome:
        """Draws what the controller asks for until the question is done; the caller ends what still runs then."""
        actions = self.controller.open_all([opening], now=self._now())
        actions += self.controller.expire(self._now())
        while self.controller.open_keys:
            for action in actions:
                if isinstance(action, Draw):
                    self.seeds[asyncio.create_task(self._sample(action.seed))] = action.seed
            done, _ = await asyncio.wait(self.seeds, timeout=self._time_left(), return_when=asyncio.FIRST_COMPLETED)
            finished = [Finished(_KEY, self.seeds.pop(task), *task.result()) for task in done]
            now = self._now()
            actions = self.controller.finished_all(finished, now=now) + self.controller.expire(now)
        return self.controller.take(_KEY)

    async def _sample(self, seed: int) -> tuple[Completion, StepScores]:
        completion = await self.best.engine.draw(self.question, seed)
        return completion, await self.best.judge.judge(self.question, completion.text)

    def _now(self) -> float:
        return time.monotonic() - self.start

    def _time_left(self) -> float | None:
        deadline = self.controller.next_deadline
        return None if deadline is None else max(0.0, deadline - self._now())


async def _cancel(tasks: Sequence[asyncio.Task[object]]) -> None:
    """Cancels what still runs and waits until it has ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
