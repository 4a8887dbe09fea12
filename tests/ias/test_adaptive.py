"""Best-of-N that learns from its samples: the same results from every kind of engine, and what it promises."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prmfast.calibration import BetaBinomialCalibrator, CalibrationData
from prmfast.calibration.features import FEATURE_NAMES, question_features
from prmfast.engines import AsyncFromStreaming, Completion, QueuedEngine, StepScores, StreamingEngine
from prmfast.ias import (
    AsyncBestOfN,
    BatchingJudge,
    BestOfN,
    BestOfNResult,
    FixedBudget,
    GlobalBudget,
    ScorerJudge,
    TargetBudget,
)
from prmfast.tiny import TinyWorld, task

from .world import BayesJudge, BernoulliEngine, KnowsP, NoisyPRM, prior_questions, verify

QUESTIONS = prior_questions(60)


class Slow(QueuedEngine):
    """Finishes requests in an order of its own, longest waiting last, so that seeds come out of order."""

    def poll(self) -> list[tuple[str, Completion]]:
        self._queue = dict(reversed(self._queue.items()))
        rows = super().poll()
        self._queue = dict(reversed(self._queue.items()))
        return rows


def best(policy: Any = None, engine: Any = None, **options: Any) -> BestOfN:
    options = {"judge": BayesJudge(), "update": "posterior", "n_max": 24, **options}
    return BestOfN(engine or BernoulliEngine(), None, None, policy or TargetBudget(0.8, 24), verify, **options)


def run(*arguments: Any, **options: Any) -> BestOfNResult:
    return best(*arguments, **options).run(QUESTIONS, progress=False)


def say(text: str) -> str | None:
    """Final answer: right ones agree, wrong ones have one of five mistakes."""
    word, seed = text.split()[:2]
    return word if word == "right" else f"mistake {int(seed) % 5}"


@pytest.mark.parametrize(
    "options",
    [{}, {"ahead": 3}, {"votes": say}, {"update": "none"}, {"policy": GlobalBudget(24, mean_per_question=4.0)}],
    ids=["posterior", "ahead", "votes", "policy", "global"],
)
def test_every_kind_of_engine_gives_the_same(options: dict[str, Any]) -> None:
    whole = run(**options)
    assert run(**options, batch_size=7) == whole
    assert run(**options, engine=QueuedEngine(BernoulliEngine(), batch_size=5)) == whole
    assert run(**options, engine=Slow(BernoulliEngine(), batch_size=5)) == whole
    fixed = {(s.question, s.seed): s for s in run(FixedBudget(24), update="none").samples}
    assert all(fixed[s.question, s.seed] == s for s in whole.samples)
    for i, answer in enumerate(whole.answers):
        assert [s.seed for s in whole.samples if s.question == i] == list(range(answer.drawn))


@pytest.mark.parametrize("options", [{}, {"ahead": 2, "votes": say}, {"update": "none"}], ids=["", "votes", "policy"])
def test_asyncio_gives_the_same(options: dict[str, Any]) -> None:
    whole = run(**options)

    async def main() -> BestOfNResult:
        engine = AsyncFromStreaming(Slow(BernoulliEngine(), batch_size=5))
        judge = BatchingJudge(BayesJudge(), batch_size=16)
        runner = AsyncBestOfN(
            engine, judge, TargetBudget(0.8, 24), verify, n_max=24, concurrency=20, **{"update": "posterior", **options}
        )
        found = await runner.run(QUESTIONS)
        one = await runner.run_one(QUESTIONS[3])
        assert one.answers == found.answers[3:4]
        assert (await engine.stats()).running == 0
        return found

    assert asyncio.run(main()) == whole


def test_a_target_is_kept_and_a_fixed_number_needs_more_for_it() -> None:
    many = prior_questions(1000)
    runner = best(TargetBudget(0.8, 64), n_max=64, ahead=1)
    adaptive = runner.run(many, progress=False)
    assert adaptive.success is not None
    error = (0.8 * 0.2 / 1000) ** 0.5
    assert adaptive.success > 0.8 - 3 * error
    predicted = sum(d.solved or 0.0 for d in adaptive.decisions if d.budget == d.drawn) / 1000
    assert abs(adaptive.success - predicted) < 3 * error  # optional stopping does not bend the probabilities
    more = FixedBudget(round(1.25 * adaptive.mean_drawn))
    fixed = replace(runner, policy=more, update="none").run(many, progress=False)
    assert fixed.success is not None
    assert fixed.success < adaptive.success - 0.02
    assert adaptive.n_tokens == sum(s.n_tokens for s in adaptive.samples)


def test_votes_save_samples_where_answers_agree() -> None:
    assert run(votes=say, ahead=1).mean_drawn < run(ahead=1).mean_drawn


def test_a_global_budget_solves_more_with_evidence() -> None:
    many = prior_questions(400)
    runner = best(GlobalBudget(24, mean_per_question=4.0))
    learned = runner.run(many, progress=False)
    blind = replace(runner, update="none").run(many, progress=False)
    assert learned.success is not None
    assert blind.success is not None
    assert sum(a.drawn for a in learned.answers) <= sum(a.drawn for a in blind.answers) == 1600
    assert learned.success > blind.success + 0.05


def test_targets_of_their_own() -> None:
    targets = [0.3 if i % 2 else 0.95 for i in range(60)]
    for update in ("none", "posterior"):
        runner = best(update=update, ahead=1)
        mixed = runner.run(QUESTIONS, progress=False, targets=targets)
        for i, target in enumerate(targets):
            alone = replace(runner, policy=TargetBudget(target, 24)).run([QUESTIONS[i]], progress=False)
            assert mixed.answers[i] == alone.answers[0]
    with pytest.raises(ValueError, match="targets must have one entry per question \\(60\\), got 1"):
        runner.run(QUESTIONS, targets=[0.5])


def test_what_came_too_late_is_counted() -> None:
    result = run(ahead=8, engine=QueuedEngine(BernoulliEngine(), batch_size=9))
    assert sum(a.surplus for a in result.answers) > 0
    assert sum(a.aborted for a in result.answers) > 0
    used = sum(s.n_tokens for s in result.samples)
    assert result.n_tokens == used + sum(a.surplus_tokens for a in result.answers) > used
    table = result.to_table("decisions")
    assert table.column("solved").to_pylist() == [d.solved for d in result.decisions]
    assert table.column("question").to_pylist()[0] == QUESTIONS[0]


def test_a_deadline_ends_a_run() -> None:
    for engine in (BernoulliEngine(), QueuedEngine(BernoulliEngine(), batch_size=4)):
        result = best(FixedBudget(24), engine, update="none", batch_size=4).run(
            QUESTIONS, progress=False, deadline=1e-6
        )
        assert all(a.expired for a in result.answers)
        assert sum(a.drawn for a in result.answers) <= 64
        assert all(d.why.startswith("deadline") for d in result.decisions[60:])
        assert not isinstance(engine, QueuedEngine) or engine.stats().running == 0


def test_a_journal_serves_a_run_that_learns(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    whole = run()
    for scorer in (False, True):
        options: dict[str, Any] = {"journal": path} if not scorer else {"journal": tmp_path / "scorer.jsonl"}
        runner = best(ahead=2, batch_size=8)
        if scorer:
            runner = replace(runner, judge=None, scorer=NoisyPRM(), calibrator=KnowsP())
            whole = runner.run(QUESTIONS, progress=False)
        with pytest.raises(KeyboardInterrupt):
            replace(runner, engine=BernoulliEngine(fail_after=90)).run(QUESTIONS, progress=False, **options)
        engine = BernoulliEngine()
        assert replace(runner, engine=engine).run(QUESTIONS, progress=False, **options) == whole
        assert len(engine.calls) < len(whole.samples) + sum(a.surplus for a in whole.answers)
        idle = replace(runner, engine=BernoulliEngine(fail_after=0))
        assert idle.run(QUESTIONS, progress=False, **options) == whole


def test_an_error_leaves_nothing_running() -> None:
    class Fails(BayesJudge):
        def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
            if any(answers):
                raise RuntimeError("no more")
            return super().judge(questions, answers)

    engine = QueuedEngine(BernoulliEngine(), batch_size=3)
    with pytest.raises(RuntimeError, match="no more"):
        best(engine=engine, judge=Fails()).run(QUESTIONS, progress=False)
    assert engine.stats().running == 0

    async def main() -> None:
        runner = AsyncBestOfN(AsyncFromStreaming(engine), BatchingJudge(Fails()), TargetBudget(0.8, 24))
        with pytest.raises(RuntimeError, match="no more"):
            await runner.run(QUESTIONS)
        assert engine.stats().running == 0
        assert len(asyncio.all_tasks()) <= 3  # this one, and workers that find nothing to do

    asyncio.run(main())


# --- the tiny world, its real policy and PRM


@pytest.fixture(scope="module")
def world() -> TinyWorld:
    return TinyWorld.load()


def final(text: str) -> str | None:
    words = text.split()
    return words[-1] if task.FINAL in words[:-1] else None


def test_the_tiny_world_with_a_fitted_calibrator(world: TinyWorld) -> None:
    asked = world.questions(200, seed=1, split="calibration")
    score, hidden = world.prm.question_state(asked)
    data = CalibrationData.from_arrays(
        score=score,
        hidden=hidden,
        features=question_features(score.double().numpy()),
        feature_names=FEATURE_NAMES,
        successes=world.true_success(asked, rollouts=8),
        trials=torch.full((200,), 8),
    )
    calibrator = BetaBinomialCalibrator(context="mlp").fit(data, progress=False)
    questions = world.questions(20, seed=2)
    runner = BestOfN(
        world.engine, world.prm, calibrator, TargetBudget(0.8, 16), world.verify, update="posterior", votes=final
    )
    whole = runner.run(questions, progress=False)
    assert replace(runner, engine=QueuedEngine(world.engine)).run(questions, progress=False) == whole
    judge = ScorerJudge(world.prm, calibrator)

    async def main() -> BestOfNResult:
        engine = AsyncFromStreaming(QueuedEngine(world.engine))
        policy = TargetBudget(0.8, 16)
        return await AsyncBestOfN(engine, BatchingJudge(judge), policy, world.verify, votes=final).run(questions)

    again = asyncio.run(main())
    assert [a.completion for a in again.answers] == [a.completion for a in whole.answers]
    assert [a.drawn for a in again.answers] == [a.drawn for a in whole.answers]
    text = whole.samples[0].completion
    full, none = judge.judge([questions[0]] * 2, [text, None])
    (last,) = judge.last([questions[0]], [text], [full.scores])
    assert full.quantiles is not None
    assert last.quantiles is not None
    assert full.quantiles.shape == (len(full.scores), 100)
    assert torch.allclose(full.quantiles[-1:], last.quantiles, atol=1e-6)
    assert judge.first(questions[:1])[0].scores == none.scores


# --- cancelling


class Counting(QueuedEngine):
    """Remembers what was submitted, finished and given up."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gone: set[str] = set()

    def abort(self, request_ids: Collection[str]) -> None:
        self.gone |= set(request_ids)
        super().abort(request_ids)


def test_cancelled_calls_take_their_requests_with_them() -> None:
    engine = Counting(BernoulliEngine(), batch_size=4)
    assert isinstance(engine, StreamingEngine)

    async def main() -> None:
        drawn_from, judge = AsyncFromStreaming(engine), BatchingJudge(BayesJudge())
        runner = AsyncBestOfN(drawn_from, judge, TargetBudget(0.9, 24), verify, n_max=24, concurrency=30)
        tasks = [asyncio.create_task(runner.run_one(q, target=0.5 + 0.4 * (i % 2))) for i, q in enumerate(QUESTIONS)]
        for i, task_ in enumerate(tasks):
            if i % 3 == 0:
                for _ in range(i % 7):
                    await asyncio.sleep(0)
                task_.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for i, row in enumerate(found):
            if i % 3 == 0 and isinstance(row, asyncio.CancelledError):
                continue
            assert isinstance(row, BestOfNResult)
            alone = best(TargetBudget(0.5 + 0.4 * (i % 2), 24)).run([QUESTIONS[i]], progress=False)
            assert row.answers == alone.answers
        assert sum(isinstance(row, asyncio.CancelledError) for row in found) > 10

    asyncio.run(main())
    stats = engine.stats()
    assert stats.running == 0
    assert stats.finished + stats.aborted == engine._requests
    assert stats.aborted == len(engine.gone) > 0


def test_an_async_deadline() -> None:
    class Never(QueuedEngine):
        def poll(self) -> list[tuple[str, Completion]]:
            return []

    engine = Never(BernoulliEngine())

    async def main() -> BestOfNResult:
        runner = AsyncBestOfN(AsyncFromStreaming(engine), BatchingJudge(BayesJudge()), TargetBudget(0.9, 24))
        return await runner.run_one(QUESTIONS[0], deadline=0.05)

    (answer,) = asyncio.run(main()).answers
    assert (answer.expired, answer.drawn, answer.completion) == (True, 0, None)
    assert answer.aborted == engine.stats().aborted > 0
    assert engine.stats().running == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: best(judge=object()), TypeError, "judge must have prm_id and judge\\(\\), got object"),
        (lambda: replace(best(), scorer=NoisyPRM()), ValueError, "judge stands in place of scorer and calibrator"),
        (lambda: best(judge=None), TypeError, "scorer must have prm_id.*got NoneType"),
        (lambda: best().run(QUESTIONS, deadline=0), ValueError, "deadline must be finite and > 0, got 0"),
        (
            lambda: AsyncBestOfN(object(), BayesJudge(), FixedBudget(2)),  # type: ignore[arg-type]
            TypeError,
            "engine must have policy_id, draw\\(\\) and stats\\(\\), got object",
        ),
        (
            lambda: AsyncBestOfN(
                AsyncFromStreaming(QueuedEngine(BernoulliEngine())),
                BatchingJudge(BayesJudge()),
                GlobalBudget(9, total=9),
            ),
            ValueError,
            "policy must decide question by question, got GlobalBudget",
        ),
        (
            lambda: ScorerJudge(NoisyPRM(), None).judge(["q"], []),
            ValueError,
            "answers must have one entry per question",
        ),
        (lambda: BatchingJudge(object()), TypeError, "judge must have prm_id and judge"),  # type: ignore[arg-type]
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
