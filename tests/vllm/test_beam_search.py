"""Beam search with policy and PRM on real vLLM engines: the search of transformers' PRM, at the price of new steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prmfast.calibration import load_calibrator
from prmfast.engines import VLLMEngine
from prmfast.ias import BeamSearch, BeamSearchResult, BeamSettings, ScorerJudge
from prmfast.prm import AutoPRM
from prmfast.tiny import TinyWorld, task
from prmfast.vllm import VLLMPRM, prm_engine_args
from tests.vllm import calibrators
from tests.vllm.conftest import QUESTION

QUESTIONS = [QUESTION, "What is 1+1?"]
SHAPE = BeamSettings(n_generations=6, beam_width=3, max_steps=4)
LETTERS = "abcdefgh +="


@pytest.fixture(scope="module")
def engine(policy_llm: Any) -> VLLMEngine:
    """Random weights that write letters, breaks and ends: a step is a line, an empty line ends it."""
    tokenizer = policy_llm.get_tokenizer()
    ids = [tokenizer.encode(letter)[0] for letter in LETTERS]
    line, end = tokenizer.encode("\n")[0], tokenizer.eos_token_id
    sampling = {"allowed_token_ids": [*ids, line, end], "logit_bias": {line: 3.0, end: -4.0}}
    return VLLMEngine(policy_llm, max_new_tokens=48, temperature=2.0, stop=("\n\n",), sampling=sampling)


@pytest.fixture(scope="module")
def calibrator(tmp_path_factory: pytest.TempPathFactory) -> str:
    return calibrators.save(tmp_path_factory.mktemp("calibrators"), "features")


@pytest.fixture(scope="module")
def judge(start_llm: Callable[..., Any], checkpoint: Callable[..., str], calibrator: str) -> VLLMPRM:
    return VLLMPRM(start_llm(**prm_engine_args(checkpoint("qwen"), calibrator=calibrator)), levels=20)


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[..., str], calibrator: str) -> ScorerJudge:
    prm = AutoPRM.from_pretrained(checkpoint("qwen"), dtype=torch.float32)
    return ScorerJudge(prm, load_calibrator(calibrator), levels=20)


def same(found: BeamSearchResult, expected: BeamSearchResult) -> None:
    """The same chains with the same fates, the same K and M, and scores to 1e-5."""
    chains = [(c.text, c.seed, c.parent, c.end, c.fate, c.until) for c in found.candidates]
    assert chains == [(c.text, c.seed, c.parent, c.end, c.fate, c.until) for c in expected.candidates]
    assert [(s.k, s.m, s.beams, s.scored) for s in found.steps] == [
        (s.k, s.m, s.beams, s.scored) for s in expected.steps
    ]
    for name in ("score", "median", "lower", "expected"):
        values = [
            (getattr(a, name), getattr(b, name)) for a, b in zip(found.candidates, expected.candidates, strict=True)
        ]
        mine, theirs = zip(*[(a, b) for a, b in values if a is not None], strict=True)
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert [a.completion for a in found.answers] == [a.completion for a in expected.answers]


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        BeamSettings(6, 3, max_steps=4, freq=2),
        BeamSettings(9, 3, max_steps=4, ias="KM", lb_idx=5, target=0.8),
        BeamSettings(6, 3, max_steps=4, subtrees=2),
    ],
    ids=["fixed", "freq", "ias", "dvts"],
)
def test_the_search_is_that_of_the_transformers_prm(
    engine: VLLMEngine, judge: VLLMPRM, reference: ScorerJudge, shape: BeamSettings
) -> None:
    judge.forget()
    found, expected = (
        BeamSearch(engine, one, shape, seed=5).run(QUESTIONS, progress=False) for one in (judge, reference)
    )
    same(found, expected)
    fates = {c.fate for c in found.candidates}
    assert {"pruned", "grown", "beam"} <= fates  # there was something to decide
    assert len({c.text.count("\n\n") for c in found.candidates}) >= 3  # and chains grew
    if shape.ias == "KM":
        assert len({(s.k, s.m) for s in found.steps}) > 1


def test_only_new_steps_are_scored(engine: VLLMEngine, judge: VLLMPRM) -> None:
    """One request a chain; of its steps all but the last are known, and their tokens come from vLLM's prefix cache."""
    judge.forget()
    before, drawn = judge.stats, engine.stats()
    result = BeamSearch(engine, judge, BeamSettings(6, 3, max_steps=5), seed=9).run(QUESTIONS, progress=False)
    after = judge.stats
    assert after.requests - before.requests == result.scored
    assert after.repeats == before.repeats
    asked, known = after.steps_asked - before.steps_asked, after.steps_known - before.steps_known
    assert asked - known == result.scored
    tokens, cached = after.prompt_tokens - before.prompt_tokens, after.cached_tokens - before.cached_tokens
    assert known > result.scored
    assert cached > tokens / 2
    # A second search of the same chains asks the engine for nothing.
    again = BeamSearch(engine, judge, BeamSettings(6, 3, max_steps=5), seed=9).run(QUESTIONS, progress=False)
    assert again == result
    assert judge.stats.requests == after.requests
    # The policy's engine finds every prefix it has written in its own cache.
    stats = engine.stats()
    assert stats.cached_tokens - drawn.cached_tokens > (stats.prompt_tokens - drawn.prompt_tokens) / 2
    assert stats.generated_tokens - drawn.generated_tokens == 2 * result.n_tokens
    assert stats.running == 0


def test_the_tiny_world_on_vllm(start_llm: Callable[..., Any]) -> None:
    """A trained policy, step by step: most answers of the search are right, far more than single samples."""
    world = TinyWorld.load()
    folders = {"model": str(world.policy_directory()), "tokenizer": str(world.tokenizer_directory())}
    llm = start_llm(**folders, max_model_len=64, enable_prefix_caching=True, enable_chunked_prefill=False)
    engine = VLLMEngine(llm, max_new_tokens=4, stop=(";",))
    questions = world.questions(16, 5, (6, 8))
    shape = BeamSettings(8, 4, max_steps=10)
    result = BeamSearch(engine, world.prm, shape, world.verify).run(questions, progress=False)
    single = VLLMEngine(llm, max_new_tokens=20).sample(questions * 8, [i // 16 for i in range(128)])
    alone = sum(world.verify(c.prompt, c.text) for c in single) / 128
    assert result.accuracy is not None
    assert result.accuracy > alone + 0.2
    assert all(answer.finished and task.final_answer(answer.completion) is not None for answer in result.answers)


def test_an_engine_without_stop_strings_is_refused(policy_llm: Any, judge: VLLMPRM) -> None:
    with pytest.raises(
        ValueError, match="engine must be made with stop strings, so that a sample is one step, got none"
    ):
        BeamSearch(VLLMEngine(policy_llm), judge)
