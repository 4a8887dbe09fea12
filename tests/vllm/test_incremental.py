"""Incremental scoring gives the numbers of a full pass, whatever the engine's cache and the client's memory hold."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prmfast.vllm import VLLMPRM, StepRequest, prm_engine_args
from tests.vllm import calibrators
from tests.vllm.conftest import QUESTION, STEPS

Checkpoint = Callable[[str], str]


def answer(*steps: int) -> str:
    """Steps by number; there are as many as one likes."""
    return "\n\n".join(f"Step {i}: {STEPS[i % 4].split(': ')[1]}" for i in steps)


@pytest.fixture(scope="module")
def llm(start_llm: Callable[..., Any], checkpoint: Checkpoint, tmp_path_factory: Any) -> Any:
    root: Path = tmp_path_factory.mktemp("calibrators")
    folders = {kind: calibrators.save(root, kind) for kind in ("features", "hidden")}
    return start_llm(**prm_engine_args(checkpoint("qwen"), calibrator=folders))


def full_pass(llm: Any, answers: Sequence[str | None], calibrator: str | None) -> list[torch.Tensor]:
    """[steps, 2 + 1 + 8] of every answer, every token computed."""
    scoring = VLLMPRM(llm, calibrator=calibrator, levels=8)._scoring
    asked = [scoring.ask(scoring.chain(QUESTION, text), whole=True) for text in answers]
    outputs = llm.encode([a for a, _ in asked], [p for _, p in asked], pooling_task="token_classify", use_tqdm=False)
    return [output.outputs.data for output in outputs]


def assert_equal(prm: VLLMPRM, answers: Sequence[str | None], calibrator: str | None) -> None:
    found = prm.rows([QUESTION] * len(answers), answers)
    for rows, expected in zip(found, full_pass(prm.llm, answers, calibrator), strict=True):
        assert rows is not None
        assert rows.positions.tolist() == expected[:, 0].long().tolist()
        torch.testing.assert_close(rows.scores, expected[:, 1], rtol=1e-5, atol=1e-5)
        if calibrator is not None:
            torch.testing.assert_close(rows.expected, expected[:, 2], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(rows.quantiles, expected[:, 3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("calibrator", ["features", "hidden", None])
def test_a_growing_chain_costs_its_new_steps(llm: Any, calibrator: str | None) -> None:
    prm = VLLMPRM(llm, calibrator=calibrator, levels=8)
    prm.forget()
    assert_equal(prm, [None], calibrator)
    for length in range(1, 6):
        assert_equal(prm, [answer(*range(length))], calibrator)
    stats = prm.stats
    assert (stats.requests, stats.repeats) == (6, 0)
    assert (stats.steps_asked, stats.steps_known) == (1 + 15, 10)
    assert stats.cached_tokens > stats.prompt_tokens / 2
    assert_equal(prm, [answer(*range(length)) for length in range(1, 6)], calibrator)
    assert prm.stats.requests == 6  # all known: nothing is asked


@pytest.mark.parametrize("calibrator", ["features", "hidden", None])
def test_siblings_pay_for_what_they_share_once(llm: Any, calibrator: str | None) -> None:
    prm = VLLMPRM(llm, calibrator=calibrator, levels=8)
    prm.forget()
    siblings = [answer(*range(4), 10 + i) for i in range(8)]
    assert_equal(prm, siblings, calibrator)
    assert (prm.stats.requests, prm.stats.repeats) == (8, 0)
    chain = len(prm._scoring.chain(QUESTION, siblings[0]).encoded.token_ids)
    assert prm.stats.prompt_tokens - prm.stats.cached_tokens < 2.5 * chain  # eight whole chains would be 8


@pytest.mark.parametrize("calibrator", ["features", "hidden", None])
def test_a_prefix_cache_that_was_emptied_is_no_loss(llm: Any, calibrator: str | None) -> None:
    prm = VLLMPRM(llm, calibrator=calibrator, levels=8)
    prm.forget()
    assert_equal(prm, [answer(0, 1, 2)], calibrator)
    llm.reset_prefix_cache()
    cached = prm.stats.cached_tokens
    assert_equal(prm, [answer(0, 1, 2, 3)], calibrator)
    assert (prm.stats.requests, prm.stats.repeats, prm.stats.cached_tokens) == (2, 0, cached)


@pytest.mark.parametrize("calibrator", ["features", "hidden", None])
def test_rows_that_the_client_does_not_know_are_computed_again(llm: Any, calibrator: str | None) -> None:
    """Another client has filled the cache: the engine leaves out rows that this one needs."""
    other = VLLMPRM(llm, calibrator=calibrator, levels=8)
    other.forget()
    other.judge([QUESTION], [answer(0, 1, 2, 3)])
    prm = VLLMPRM(llm, calibrator=calibrator, levels=8)
    assert_equal(prm, [answer(0, 1, 2, 3)], calibrator)
    assert (prm.stats.requests, prm.stats.repeats) == (2, 1)


@pytest.mark.parametrize("calibrator", ["features", None])
def test_a_small_memory_changes_the_work_not_the_numbers(llm: Any, calibrator: str | None) -> None:
    prm = VLLMPRM(llm, calibrator=calibrator, levels=8, max_steps=3)
    prm.forget()
    rng = random.Random(5)
    for _ in range(12):
        batch = [answer(*(rng.randrange(3) for _ in range(rng.randint(1, 5)))) for _ in range(3)]
        assert_equal(prm, [*batch, None, batch[0]], calibrator)
        assert len(prm._scoring.store) <= 3
        if rng.random() < 0.3:
            llm.reset_prefix_cache()
    assert prm.stats.repeats > 0
    assert prm.stats.steps_known > 0


def test_without_the_earlier_scores_a_row_is_unknown_not_wrong(llm: Any) -> None:
    """A calibrator that reads all steps so far gets those of cached steps from the client, or says nothing."""
    scoring = VLLMPRM(llm, calibrator="features", levels=8)._scoring
    llm.reset_prefix_cache()
    first, last = (scoring.chain(QUESTION, answer(*range(n))) for n in (4, 5))
    known = full_pass(llm, [answer(*range(4))], "features")[0]
    expected = full_pass(llm, [answer(*range(5))], "features")[0]
    assert len(first.keys) == len(known)
    for history in ([], known[:, 1].tolist()):
        prompt, params = scoring.ask(last, whole=False)
        request = StepRequest.of(params.extra_kwargs).model_copy(update={"history": history})
        params.extra_kwargs = request.extra_kwargs()
        output = llm.encode([prompt], params, pooling_task="token_classify", use_tqdm=False)[0]
        rows = output.outputs.data
        assert 0 < len(rows) < 5
        torch.testing.assert_close(rows[:, :2], expected[-len(rows) :, :2], rtol=1e-5, atol=1e-5)
        if history:
            torch.testing.assert_close(rows[:, 2:], expected[-len(rows) :, 2:], rtol=1e-5, atol=1e-5)
        else:
            assert rows[:, 2:].isnan().all()


def test_an_engine_that_preempts_gives_the_same_rows(start_llm: Callable[..., Any], checkpoint: Checkpoint) -> None:
    """So few cache blocks that requests are thrown out half-way and come again."""
    arguments = prm_engine_args(
        checkpoint("qwen"),
        num_gpu_blocks_override=28,
        max_num_batched_tokens=512,
        long_prefill_token_threshold=64,
        scheduler_reserve_full_isl=False,
    )
    llm = start_llm(**arguments)
    counted = itertools.count()
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (next(counted), preempt(*args, **kwargs))[1]
    prm = VLLMPRM(llm)
    answers = [answer(i, *range(4)) for i in range(10, 18)]
    assert_equal(prm, answers, None)
    assert next(counted) > 0
