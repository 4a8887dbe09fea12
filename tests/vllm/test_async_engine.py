"""The asynchronous engine: 200 adaptive questions at once with cancellations; nothing is lost, nothing left running."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from prmfast.engines import AsyncEngine, AsyncVLLMEngine
from prmfast.ias import AsyncBestOfN, BatchingJudge, BestOfNResult, ScorerJudge, TargetBudget
from prmfast.tiny import TinyWorld

from .conftest import ENGINE

WORLD = TinyWorld.load()
QUESTIONS = WORLD.questions(200, seed=5)
T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]


@pytest.fixture(scope="module")
def run() -> Iterator[Run[Any]]:
    """One event loop for the module: vLLM's engine belongs to it."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def engine(run: Run[AsyncVLLMEngine]) -> Iterator[AsyncVLLMEngine]:
    async def start() -> AsyncVLLMEngine:
        return AsyncVLLMEngine.from_pretrained(
            WORLD.policy_directory(),
            tokenizer=str(WORLD.tokenizer_directory()),
            max_new_tokens=19,
            policy_id=WORLD.engine.policy_id,
            **{**ENGINE, "max_model_len": 64},
        )

    found = run(start())
    yield found
    found.shutdown()


def running_inside() -> float:
    """Requests that the engine's own process says it has, running or waiting."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(metric.value for metric in get_metrics_snapshot() if metric.name in names)


async def nothing_runs(engine: AsyncVLLMEngine) -> None:
    assert (await engine.stats()).running == 0
    assert engine.llm.output_processor.get_num_unfinished_requests() == 0
    await engine.draw(QUESTIONS[0], 9999)  # its last step reports what the scheduler still has
    for _ in range(100):
        if running_inside() == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{running_inside()} requests still run")


def test_200_questions_with_cancellations(run: Run[None], engine: AsyncVLLMEngine) -> None:
    assert isinstance(engine, AsyncEngine)
    chance = random.Random(7)
    runner = AsyncBestOfN(
        engine,
        BatchingJudge(ScorerJudge(WORLD.prm, None)),
        TargetBudget(0.9, 12),
        WORLD.verify,
        n_max=12,
        ahead=4,
        seed=50,
        concurrency=120,
    )

    async def leave(task: asyncio.Task[BestOfNResult], after: float) -> None:
        await asyncio.sleep(after)
        task.cancel()

    async def main() -> None:
        targets = [chance.choice((0.5, 0.9, 0.99)) for _ in QUESTIONS]
        tasks = [
            asyncio.create_task(runner.run_one(question, target=target))
            for question, target in zip(QUESTIONS, targets, strict=True)
        ]
        picked = chance.sample(range(200), 80)
        leaving = [asyncio.create_task(leave(tasks[i], chance.choice((0.0, 1.5)) * chance.random())) for i in picked]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*leaving)
        cancelled = [i for i, row in enumerate(found) if isinstance(row, asyncio.CancelledError)]
        assert set(cancelled) <= set(picked)
        assert len(cancelled) > 20
        await nothing_runs(engine)
        answered = [row for row in found if isinstance(row, BestOfNResult)]
        assert [row for row in found if not isinstance(row, (BestOfNResult, asyncio.CancelledError))] == []
        assert len(answered) + len(cancelled) == 200  # none is lost
        stats = await engine.stats()
        assert stats.aborted > 0
        assert stats.generated_tokens > sum(row.n_tokens for row in answered)
        # Whatever was going on around them, samples are those of their seeds.
        for i, row in list(enumerate(found))[:40]:
            if isinstance(row, BestOfNResult):
                assert [s.seed for s in row.samples] == list(range(50, 50 + row.answers[0].drawn))
                last = row.decisions[-1]
                assert last.solved is not None
                assert last.drawn == 12 or last.solved >= targets[i]
                again = await asyncio.gather(*(engine.draw(QUESTIONS[i], s.seed) for s in row.samples))
                assert [c.text for c in again] == [s.completion for s in row.samples]
        # Draws and decisions without cancellations around them are the same too.
        calm = await runner.run(QUESTIONS[:40], targets=targets[:40])
        for i, answer in enumerate(calm.answers):
            row = found[i]
            if isinstance(row, BestOfNResult):
                assert (row.answers[0].completion, row.answers[0].drawn) == (answer.completion, answer.drawn)
        await nothing_runs(engine)

    run(main())


def test_cancelling_at_any_moment_ends_the_request(run: Run[None], engine: AsyncVLLMEngine) -> None:
    async def main() -> None:
        before = await engine.stats()
        tasks = []
        for turns in range(40):  # from before the request is made until it generates
            task = asyncio.create_task(engine.draw(QUESTIONS[turns], 1))
            for _ in range(turns // 2):
                await asyncio.sleep(0)
            if turns % 10 == 9:
                await asyncio.sleep(0.003 * turns / 10)
            task.cancel()
            tasks.append(task)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(row, asyncio.CancelledError) for row in found) > 30
        after = await engine.stats()
        assert after.finished + after.aborted - before.finished - before.aborted == sum(
            not isinstance(row, asyncio.CancelledError) or turns > 1 for turns, row in enumerate(found)
        )
        await nothing_runs(engine)

    run(main())


def test_a_deadline_aborts_what_runs(run: Run[None], engine: AsyncVLLMEngine) -> None:
    async def main() -> None:
        runner = AsyncBestOfN(
            engine, BatchingJudge(ScorerJudge(WORLD.prm, None)), TargetBudget(0.999999, 64), n_max=64, concurrency=8
        )
        result = await runner.run(QUESTIONS[:8], deadline=0.05)
        assert any(answer.expired for answer in result.answers)
        assert all(answer.expired or answer.drawn for answer in result.answers)
        await nothing_runs(engine)

    run(main())


def test_errors(run: Run[None], engine: AsyncVLLMEngine) -> None:
    with pytest.raises(TypeError, match="llm must be a vllm AsyncLLM, got str"):
        AsyncVLLMEngine("tiny")

    async def main() -> None:
        with pytest.raises(ValueError, match="prompt must have at least one token, got none"):
            await engine.draw("", 1)
        with pytest.raises(ValueError, match="must fit into max_model_len = 64"):
            await engine.draw(QUESTIONS[0], 1, prefix=" ;" * 40)
        completion = await engine.draw(QUESTIONS[0], 1)
        begun = " ".join(completion.text.split()[:3])
        assert (await engine.draw(QUESTIONS[0], 2, prefix=begun)).text.startswith(begun)
        await nothing_runs(engine)

    run(main())
