"""The PRM on an event loop, its engine in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prmfast.engines import AsyncJudge, Judge, Scorer
from prmfast.vllm import VLLMPRM, AsyncVLLMPRM, prm_engine_args
from tests.vllm import calibrators
from tests.vllm.conftest import ANSWER, ENGINE, QUESTION, STEPS


async def judge_all(arguments: dict[str, Any], answers: list[str | None]) -> tuple[Any, ...]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**ENGINE, **arguments))
    try:
        prm = AsyncVLLMPRM(engine, levels=8)
        assert isinstance(prm, AsyncJudge)
        together = await asyncio.gather(*(prm.judge(QUESTION, text) for text in answers))
        between = prm.stats
        task = asyncio.create_task(prm.judge(QUESTION, "\n\n".join(STEPS[::-1])))
        while not engine.output_processor.has_unfinished_requests():
            assert not task.done()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        longer = await prm.judge(QUESTION, ANSWER + "\n\nOne more step.")
        assert not engine.output_processor.has_unfinished_requests()
        return together, longer, between, prm.stats
    finally:
        engine.shutdown()


def test_judging_many_at_once_and_one_step_more(
    start_llm: Callable[..., Any], checkpoint: Callable[[str], str], tmp_path: Any
) -> None:
    arguments = prm_engine_args(checkpoint("qwen"), calibrator=calibrators.save(tmp_path, "features"))
    answers = [ANSWER, None, "", *("\n\n".join(STEPS[:n]) for n in (1, 2, 3))]
    offline = VLLMPRM(start_llm(**arguments), levels=8)
    assert isinstance(offline, Judge)
    assert isinstance(offline, Scorer)
    expected = offline.judge([QUESTION] * 7, [*answers, ANSWER + "\n\nOne more step."])
    together, longer, between, after = asyncio.run(judge_all(arguments, answers))
    for found, known in zip([*together, longer], expected, strict=True):
        assert found.scores == pytest.approx(known.scores, abs=1e-5)
        torch.testing.assert_close(found.quantiles, known.quantiles, rtol=1e-5, atol=1e-5)
    assert after.requests - between.requests == 1  # the cancelled one is not counted
    assert after.cached_tokens > between.cached_tokens
