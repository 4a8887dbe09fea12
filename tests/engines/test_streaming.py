"""Streaming on top of batches, and an event loop on top of streaming: the tiny policy gives the same samples."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from prmfast.engines import AsyncEngine, AsyncFromStreaming, Completion, EngineStats, QueuedEngine, StreamingEngine
from prmfast.tiny import TinyWorld

WORLD = TinyWorld.load()
QUESTIONS = WORLD.questions(5, seed=1)


def test_a_queue_gives_the_samples_of_the_engine() -> None:
    engine = QueuedEngine(WORLD.engine, batch_size=4)
    assert isinstance(engine, StreamingEngine)
    assert engine.policy_id == WORLD.engine.policy_id
    jobs = [(question, seed) for question in QUESTIONS for seed in (3, 1)]
    requests = [engine.submit(*job) for job in jobs]
    assert engine.stats() == EngineStats(running=10)
    found: dict[str, Completion] = {}
    while rows := engine.poll():
        assert len(rows) <= 4
        found.update(rows)
    alone = WORLD.engine.sample([question for question, _ in jobs], [seed for _, seed in jobs])
    assert [found[request] for request in requests] == alone
    assert engine.poll() == []
    tokens = sum(completion.n_tokens for completion in alone)
    assert engine.stats() == EngineStats(generated_tokens=tokens, finished=10)
    assert engine.sample(QUESTIONS[:2], [3, 3]) == [alone[0], alone[2]]
    assert engine.stats().finished == 12


def test_a_queue_continues_prefixes_and_forgets_what_is_given_up() -> None:
    engine = QueuedEngine(WORLD.engine)
    (whole,) = WORLD.engine.sample(QUESTIONS[:1], [5])
    begun = " ".join(whole.text.split()[:4])
    kept = engine.submit(QUESTIONS[0], 5, prefix=begun)
    gone = engine.submit(QUESTIONS[1], 5)
    engine.abort([gone, "unknown"])
    ((request, completion),) = engine.poll()
    assert (request, completion.text) == (kept, whole.text)
    engine.abort([kept])  # finished: no error, not counted
    assert engine.stats() == EngineStats(generated_tokens=completion.n_tokens, finished=1, aborted=1)


def test_an_event_loop_gives_the_samples_of_the_engine() -> None:
    engine = AsyncFromStreaming(QueuedEngine(WORLD.engine, batch_size=3))
    assert isinstance(engine, AsyncEngine)

    async def main() -> list[Completion]:
        tasks = [asyncio.create_task(engine.draw(question, 7)) for question in QUESTIONS]
        gone = asyncio.create_task(engine.draw(QUESTIONS[0], 8))
        await asyncio.sleep(0)
        gone.cancel()
        found = await asyncio.gather(*tasks)
        with pytest.raises(asyncio.CancelledError):
            await gone
        again = await engine.draw(QUESTIONS[0], 7)
        assert again == found[0]
        assert await engine.stats() == engine.engine.stats()
        return found

    for _ in range(2):  # on two event loops, one after the other
        assert asyncio.run(main()) == WORLD.engine.sample(QUESTIONS, [7] * 5)
    stats = engine.engine.stats()
    assert (stats.running, stats.finished, stats.aborted) == (0, 12, 2)


def test_an_error_of_the_engine_reaches_every_call() -> None:
    class Broken:
        policy_id = "broken"

        def sample(
            self, prompts: Sequence[str], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None
        ) -> list[Completion]:
            raise RuntimeError("out of memory")

    engine = AsyncFromStreaming(QueuedEngine(Broken(), batch_size=1))

    async def main() -> None:
        found = await asyncio.gather(*(engine.draw("q", seed) for seed in range(3)), return_exceptions=True)
        assert [str(row) for row in found] == ["out of memory"] * 3

    asyncio.run(main())
    assert engine.engine.stats().running == 0


def test_errors() -> None:
    with pytest.raises(TypeError, match="engine must have policy_id and sample"):
        QueuedEngine(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        QueuedEngine(WORLD.engine, batch_size=0)
    with pytest.raises(TypeError, match="engine must have submit"):
        AsyncFromStreaming(WORLD.engine)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seeds\\[0\\] must lie in"):
        QueuedEngine(WORLD.engine).submit("q", -1)
