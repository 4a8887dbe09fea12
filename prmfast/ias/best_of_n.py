"""Best-of-N with a budget per question, drawn live from an engine."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, cast

from prmfast._progress import Bar
from prmfast._progress import progress as progress_bar
from prmfast._ranges import stage
from prmfast.engines.base import Completion, Engine, Judge, Scorer, StepScores, StreamingEngine, Verifier
from prmfast.ias._aggregate import Aggregate, aggregate_score
from prmfast.ias._check import positive_number, question_list, whole
from prmfast.ias._journal import Journal, Sample
from prmfast.ias._results import Answer, BestOfNResult, collect, sample_of
from prmfast.ias._rules import Decision, Evidence
from prmfast.ias.controller import Action, BestOfNController, Done, Draw, Finished, Opening, Outcome, Update
from prmfast.ias.judges import ScorerJudge
from prmfast.ias.policies import BudgetPolicy

if TYPE_CHECKING:
    from prmfast.calibration.base import Calibrator

__all__ = ["Aggregate", "Answer", "BestOfN", "BestOfNResult", "Decision", "aggregate_score"]

Job = tuple[int, int]  # question, seed


@dataclass(frozen=True)
class BestOfN:
    """Draws as many answers of each question as ``policy`` asks for and picks the one that the PRM scores highest.

    The first estimate is the PRM's word on the empty answer, made a distribution by ``calibrator``; the pick goes by
    the UNCALIBRATED score of the finished answer ([D] arXiv 2605.06785), the first drawn among equals. A question's
    samples have the seeds ``seed``, ``seed + 1``, ...: whatever the policy, the first N of a question are the same.

    Args:
        engine: draws samples; a `StreamingEngine` while others run, and gives up what is no longer needed.
        scorer: the PRM; None with ``judge``.
        calibrator: a fitted calibrator; None takes the PRM's raw score for the success probability.
        policy: who decides on N; asked again whenever what it asked for is drawn, until it wants no more.
        verifier: ``verify(question, completion)``, to report accuracy; decides nothing.
        levels: M, quantiles at (m + 1/2) / M.
        batch_size: samples per call of an engine that does not stream, questions per call of the scorer.
        seed: of each question's first sample.
        n_max: no question gets more, whatever the policy says.
        aggregate: final score of an answer from its step scores: "last" | "min" | "product" | "mean".
        update: "posterior" learns from every finished sample and stops, goes on or re-allocates by what it has shown;
            "none" leaves all to the policy. ahead, votes, wrong_agreement: as in `BestOfNController`.
        judge: a PRM that has its calibrator with it, in place of ``scorer`` and ``calibrator``.
    """

    engine: Engine
    scorer: Scorer | None
    calibrator: Calibrator | None
    policy: BudgetPolicy
    verifier: Verifier | None = None
    levels: int = 100
    batch_size: int = 64
    seed: int = 0
    n_max: int = 64
    aggregate: Aggregate = "last"
    _: KW_ONLY
    update: Update = "none"
    ahead: int | None = None
    votes: Callable[[str], Hashable | None] | None = None
    wrong_agreement: float = 0.2
    judge: Judge | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.engine, Engine):
            raise TypeError(f"engine must have policy_id and sample(), got {type(self.engine).__name__}")
        for name, low in (("levels", 1), ("batch_size", 1), ("seed", 0), ("n_max", 1)):
            whole(name, getattr(self, name), low=low)
        self._judge()
        self._controller()

    def run(
        self,
        questions: Sequence[str],
        *,
        progress: bool = True,
        journal: str | os.PathLike[str] | None = None,
        targets: Sequence[float] | None = None,
        deadline: float | None = None,
    ) -> BestOfNResult:
        """Answers ``questions``.

        With ``journal``, every sample is appended to that file as soon as it is scored; a later run with the same
        file goes through the same decisions and draws only what is missing. ``targets``: one in (0, 1) per question in
        place of the `TargetBudget`'s own. After ``deadline`` seconds, what is finished by then is the answer.
        """
        question_list(questions)
        if targets is not None and len(targets) != len(questions):
            raise ValueError(f"targets must have one entry per question ({len(questions)}), got {len(targets)}")
        if deadline is not None:
            positive_number("deadline", deadline)
        judge = self._judge()
        book = Journal(journal, questions, {"policy_id": self.engine.policy_id, "prm_id": judge.prm_id})
        run = _Run(self, questions, judge, self._controller(), book)
        first = self._first_estimates(questions, judge, progress)
        wanted: Sequence[float | None] = [None] * len(questions) if targets is None else targets
        with progress_bar(len(questions), "best of n", progress) as bar:
            rows = zip(first, wanted, strict=True)
            run.go([Opening(i, scores, target, deadline) for i, (scores, target) in enumerate(rows)], bar)
        with stage("best_of_n.pick"):
            outcomes = [run.outcomes[i] for i in range(len(questions))]
            ids = (self.engine.policy_id, judge.prm_id)
            return collect(questions, outcomes, self.verifier, ids, run.source.aborted_tokens())

    def _judge(self) -> Judge:
        if self.judge is None:
            return ScorerJudge(cast(Scorer, self.scorer), self.calibrator, levels=self.levels)
        if self.scorer is not None or self.calibrator is not None:
            raise ValueError("judge stands in place of scorer and calibrator: give None for both")
        if not isinstance(self.judge, Judge):
            raise TypeError(f"judge must have prm_id and judge(), got {type(self.judge).__name__}")
        return self.judge

    def _controller(self) -> BestOfNController:
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

    def _first_estimates(self, questions: Sequence[str], judge: Judge, progress: bool) -> list[StepScores]:
        found: list[StepScores] = []
        with stage("best_of_n.first_estimate"), progress_bar(len(questions), "first estimates", progress) as bar:
            for start in range(0, len(questions), self.batch_size):
                part = questions[start : start + self.batch_size]
                found += judge.judge(part, [None] * len(part))
                bar.advance(len(part))
        return found


class _Run:
    """One run: carries out what the controller says and reports what came of it."""

    def __init__(
        self, best: BestOfN, questions: Sequence[str], judge: Judge, controller: BestOfNController, book: Journal
    ) -> None:
        self.questions, self.judge, self.controller, self.book = questions, judge, controller, book
        self.batch_size = best.batch_size
        self.source: _Rounds | _Stream
        if isinstance(best.engine, StreamingEngine):
            self.source = _Stream(best.engine, questions)
        else:
            self.source = _Rounds(best.engine, questions, best.batch_size)
        self.drawn_before: deque[Sample] = deque()
        self.outcomes: dict[int, Outcome] = {}

    def go(self, openings: list[Opening], bar: Bar) -> None:
        """Until every question is done; nothing is left running, whatever happens."""
        start, timed = time.monotonic(), any(opening.deadline is not None for opening in openings)
        try:
            with stage("best_of_n.budget"):
                actions = self.controller.open_all(openings)
            while True:
                self._carry_out(actions, bar)
                if len(self.outcomes) == len(openings):
                    return
                finished = self._advance()
                now = time.monotonic() - start
                with stage("best_of_n.budget"):
                    actions = self.controller.finished_all(finished, now=now) if finished else []
                    if timed:
                        actions += self.controller.expire(now)
                self._keep(finished)
        finally:
            self.source.abort(self.source.jobs())

    def _carry_out(self, actions: Sequence[Action], bar: Bar) -> None:
        draws: list[Job] = []
        aborts: set[Job] = set()
        for action in actions:
            if isinstance(action, Done):
                key = cast(int, action.key)
                self.outcomes[key] = self.controller.take(key)
                bar.advance()
                continue
            job = (cast(int, action.key), action.seed)
            if not isinstance(action, Draw):
                aborts.add(job)
            elif (sample := self.book.get(*job)) is not None:
                self.drawn_before.append(sample)
            else:
                draws.append(job)
        if aborts:
            self.source.abort(aborts)
            self.drawn_before = deque(s for s in self.drawn_before if (s.question, s.seed) not in aborts)
        self.source.draw([job for job in draws if job not in aborts])

    def _advance(self) -> list[Finished]:
        if self.drawn_before:
            count = min(self.batch_size, len(self.drawn_before))
            return self._judged_before([self.drawn_before.popleft() for _ in range(count)])
        with stage("best_of_n.sample"):
            done = self.source.advance()
        if not done:
            return []
        asked, texts = [self.questions[i] for (i, _), _ in done], [completion.text for _, completion in done]
        with stage("best_of_n.score"):
            if isinstance(self.judge, ScorerJudge):
                steps = self.judge.scores(asked, texts)
            else:
                scores = self.judge.judge(asked, texts)
        if isinstance(self.judge, ScorerJudge):
            scores = self._last(asked, texts, steps)
        return [
            Finished(i, seed, completion, judged) for ((i, seed), completion), judged in zip(done, scores, strict=True)
        ]

    def _judged_before(self, samples: list[Sample]) -> list[Finished]:
        asked, texts = [self.questions[s.question] for s in samples], [s.completion for s in samples]
        steps = [s.step_scores for s in samples]
        if isinstance(self.judge, ScorerJudge) or not self.controller.reads_quantiles:
            scores = self._last(asked, texts, steps)
        else:
            with stage("best_of_n.quantiles"):
                scores = self.judge.judge(asked, texts)
        return [
            Finished(s.question, s.seed, Completion(question, s.seed, text, (), s.n_tokens, s.finished), judged)
            for s, question, text, judged in zip(samples, asked, texts, scores, strict=True)
        ]

    def _last(self, asked: list[str], texts: list[str], steps: list[tuple[float, ...]]) -> list[StepScores]:
        """Scores with the quantiles of the last step, where the controller reads them."""
        if not isinstance(self.judge, ScorerJudge) or not self.controller.reads_quantiles:
            return [StepScores(row) for row in steps]
        with stage("best_of_n.quantiles"):
            return self.judge.last(asked, texts, steps)

    def _keep(self, finished: list[Finished]) -> None:
        rows = [cast(int, row.key) for row in finished]
        fresh = [row for row, i in zip(finished, rows, strict=True) if self.book.get(i, row.seed) is None]
        if fresh:
            self.book.add(
                sample_of(cast(int, row.key), Evidence(row.seed, row.completion, row.scores)) for row in fresh
            )


class _Rounds:
    """Samples from an engine that works in batches, in the order in which they were asked for."""

    def __init__(self, engine: Engine, questions: Sequence[str], batch_size: int) -> None:
        self.engine, self.questions, self.batch_size = engine, questions, batch_size
        self.queue: deque[Job] = deque()

    def jobs(self) -> set[Job]:
        """What is not finished."""
        return set(self.queue)

    def draw(self, jobs: Sequence[Job]) -> None:
        """For one of the next calls of `advance`."""
        self.queue.extend(jobs)

    def abort(self, jobs: Collection[Job]) -> None:
        """Before it was drawn."""
        self.queue = deque(job for job in self.queue if job not in jobs)

    def advance(self) -> list[tuple[Job, Completion]]:
        """One call of the engine."""
        chunk = [self.queue.popleft() for _ in range(min(self.batch_size, len(self.queue)))]
        done = self.engine.sample([self.questions[i] for i, _ in chunk], [seed for _, seed in chunk])
        if len(done) != len(chunk):
            raise RuntimeError(f"engine must return one completion per prompt ({len(chunk)}), got {len(done)}")
        return list(zip(chunk, done, strict=True))

    def aborted_tokens(self) -> int:
        """None: nothing is given up half way."""
        return 0


class _Stream:
    """Samples from an engine that takes them up one by one."""

    def __init__(self, engine: StreamingEngine, questions: Sequence[str]) -> None:
        self.engine, self.questions = engine, questions
        self.running: dict[str, Job] = {}
        self.request: dict[Job, str] = {}
        self.before = engine.stats().generated_tokens
        self.finished_tokens = 0

    def jobs(self) -> set[Job]:
        """What is not finished."""
        return set(self.request)

    def draw(self, jobs: Sequence[Job]) -> None:
        """Hands the jobs to the engine."""
        for job in jobs:
            request = self.engine.submit(self.questions[job[0]], job[1])
            self.running[request], self.request[job] = job, request

    def abort(self, jobs: Collection[Job]) -> None:
        """Inside the engine."""
        requests = [self.request.pop(job) for job in jobs if job in self.request]
        for request in requests:
            del self.running[request]
        if requests:
            self.engine.abort(requests)

    def advance(self) -> list[tuple[Job, Completion]]:
        """One step of the engine; what other users of the engine asked for is not taken from it."""
        done = []
        for request, completion in self.engine.poll():
            job = self.running.pop(request)
            del self.request[job]
            self.finished_tokens += completion.n_tokens
            done.append((job, completion))
        return done

    def aborted_tokens(self) -> int:
        """Generated by requests that were given up."""
        return max(0, self.engine.stats().generated_tokens - self.before - self.finished_tokens)
