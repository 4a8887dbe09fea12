"""The offline engine: seeds, prefixes, stop strings, aborts, and best-of-N that learns, on real vLLM."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from prmfast.engines import StepScores, StreamingEngine, VLLMEngine
from prmfast.ias import BestOfN, FixedBudget, GlobalBudget, Sample, TargetBudget
from prmfast.tiny import TinyWorld

from .conftest import QUESTION

WORLD = TinyWorld.load()
QUESTIONS = WORLD.questions(12, seed=4)


@pytest.fixture(scope="module")
def tiny_llm(start_llm: Callable[..., Any]) -> Any:
    return start_llm(
        model=str(WORLD.policy_directory()),
        tokenizer=str(WORLD.tokenizer_directory()),
        max_model_len=64,
        max_num_batched_tokens=100,
        enable_chunked_prefill=False,
    )


@pytest.fixture
def engine(tiny_llm: Any) -> VLLMEngine:
    return VLLMEngine(tiny_llm, max_new_tokens=19, policy_id=WORLD.engine.policy_id)


@pytest.fixture
def long_engine(policy_llm: Any) -> VLLMEngine:
    """A random policy whose answers seldom end by themselves."""
    return VLLMEngine(policy_llm, max_new_tokens=60, temperature=0.8)


def unfinished(engine: VLLMEngine) -> int:
    return int(engine.llm.llm_engine.get_num_unfinished_requests())


def test_separate_requests_equal_one_request_of_n(long_engine: VLLMEngine) -> None:
    from vllm import SamplingParams

    assert isinstance(long_engine, StreamingEngine)
    params = SamplingParams(n=5, seed=11, temperature=0.8, max_tokens=60)
    (whole,) = long_engine.llm.generate([QUESTION], params, use_tqdm=False)
    own = long_engine.sample([QUESTION] * 5, list(range(11, 16)))
    assert [c.token_ids for c in own] == [tuple(o.token_ids) for o in whole.outputs]
    assert [c.text for c in own] == [o.text for o in whole.outputs]
    assert [c.n_tokens for c in own] == [len(o.token_ids) for o in whole.outputs]
    assert [c.finished for c in own] == [o.finish_reason == "stop" for o in whole.outputs]
    assert len({c.text for c in own}) == 5


def test_a_sample_does_not_depend_on_its_company(long_engine: VLLMEngine) -> None:
    alone = [long_engine.sample([QUESTION], [seed])[0] for seed in (3, 4)]
    requests = {long_engine.submit(QUESTION[i:], seed): (i, seed) for i in range(3) for seed in (3, 4)}
    found: dict[tuple[int, int], Any] = {}
    late = None
    while len(found) < len(requests):
        found.update({requests[request]: completion for request, completion in long_engine.poll() if request != late})
        if late is None:
            late = long_engine.submit(QUESTION, 99)  # joins while the others run
    assert [found[0, seed].token_ids for seed in (3, 4)] == [c.token_ids for c in alone]
    assert [found[0, seed].text for seed in (3, 4)] == [c.text for c in alone]
    long_engine.abort([late or ""])
    assert unfinished(long_engine) == long_engine.stats().running == 0


def test_sample_keeps_what_others_submitted(long_engine: VLLMEngine) -> None:
    waiting = long_engine.submit(QUESTION, 1)
    long_engine.sample([QUESTION[5:]] * 2, [1, 2])
    rows: list[tuple[str, Any]] = []
    while not rows:
        rows = long_engine.poll()
    assert [(request, c.prompt, c.seed) for request, c in rows] == [(waiting, QUESTION, 1)]


def test_prefixes_are_token_ids_behind_the_prompt(long_engine: VLLMEngine) -> None:
    from vllm import SamplingParams

    begun = "Step 1: 3 boxes of 4 pens"
    (got,) = long_engine.sample([QUESTION], [2], prefixes=[begun])
    tokenizer = long_engine.llm.get_tokenizer()
    prompt = tokenizer(QUESTION)["input_ids"]
    prefix = tokenizer(begun, add_special_tokens=False)["input_ids"]
    params = SamplingParams(seed=2, temperature=0.8, max_tokens=60)
    (wanted,) = long_engine.llm.generate([{"prompt_token_ids": prompt + prefix}], params, use_tqdm=False)
    assert got.token_ids == (*prefix, *wanted.outputs[0].token_ids)
    assert got.text == begun + wanted.outputs[0].text
    assert got.n_tokens == len(wanted.outputs[0].token_ids)


def test_the_prefix_cache_is_reported(long_engine: VLLMEngine) -> None:
    prompt = "cached? " + QUESTION
    length = len(long_engine.llm.get_tokenizer()(prompt)["input_ids"])
    assert length > 64
    first = long_engine.sample([prompt], [0])[0]
    again = long_engine.sample([prompt], [1])[0]
    assert first.cached_tokens < 32 <= again.cached_tokens < length
    assert again.cached_tokens % 32 == 0
    stats = long_engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (2 * length, first.cached_tokens + again.cached_tokens)
    assert stats.generated_tokens == first.n_tokens + again.n_tokens
    assert (stats.finished, stats.aborted, stats.running) == (2, 0, 0)


def test_a_stop_string_is_kept_and_reported(policy_llm: Any, long_engine: VLLMEngine) -> None:
    (whole,) = long_engine.sample([QUESTION], [5])
    stop = whole.text[10:12]
    (got,) = VLLMEngine(policy_llm, max_new_tokens=60, temperature=0.8, stop=[stop]).sample([QUESTION], [5])
    assert got.text == whole.text[: whole.text.index(stop) + len(stop)]
    assert (got.stop, got.finished) == (stop, True)
    assert got.n_tokens < whole.n_tokens
    assert whole.stop is None


def test_sampling_options_reach_the_engine(policy_llm: Any) -> None:
    greedy = VLLMEngine(policy_llm, max_new_tokens=8, sampling={"top_k": 1})
    one, two = greedy.sample([QUESTION] * 2, [1, 2])
    assert one.token_ids == two.token_ids
    assert (one.n_tokens, one.finished) == (8, False)


def test_an_abort_frees_the_engine(long_engine: VLLMEngine) -> None:
    free = long_engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    before = free()
    requests = [long_engine.submit(QUESTION, seed) for seed in range(8)]
    assert long_engine.stats().running == unfinished(long_engine) == 8
    for _ in range(6):
        assert long_engine.poll() == []
    assert free() < before
    gone = requests[2:7]
    long_engine.abort([*gone, "unknown"])
    assert long_engine.stats().running == unfinished(long_engine) == 3
    drawn = long_engine.stats().generated_tokens
    assert drawn in (5 * 5, 5 * 6)  # the first step may only have read the prompts
    done: list[str] = []
    while long_engine.stats().running:
        done += [request for request, _ in long_engine.poll()]
    assert sorted(done) == sorted([*requests[:2], requests[7]])
    long_engine.abort(requests)
    stats = long_engine.stats()
    assert (stats.finished, stats.aborted, stats.running, unfinished(long_engine)) == (3, 5, 0, 0)
    assert stats.generated_tokens > drawn
    assert free() == before
    assert long_engine.poll() == []


def test_an_error_in_sample_leaves_nothing_running(long_engine: VLLMEngine) -> None:
    with pytest.raises(ValueError, match="prompt must have at least one token, got none"):
        long_engine.sample([QUESTION, ""], [1, 1])
    assert unfinished(long_engine) == 0


class Says:
    """A judge whose word depends on the text alone."""

    prm_id = "says"

    def judge(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[StepScores]:
        return [StepScores((0.4 if answer is None else zlib.crc32(answer.encode()) / 2**32,)) for answer in answers]


def text(sample: Sample) -> tuple[int, str, int, bool]:
    """Without the scores, whose last digit depends on the PRM's batch."""
    return sample.seed, sample.completion, sample.n_tokens, sample.finished


def best(engine: VLLMEngine, policy: Any = None, **options: Any) -> BestOfN:
    options = {"n_max": 12, "update": "posterior", **options}
    return BestOfN(engine, WORLD.prm, None, policy or TargetBudget(0.9, 12), WORLD.verify, **options)


def test_adaptive_runs_are_prefixes_of_fixed_ones(engine: VLLMEngine) -> None:
    fixed = best(engine, FixedBudget(12), update="none", seed=100).run(QUESTIONS, progress=False)
    own = {(s.question, s.seed): s for s in fixed.samples}
    policies: list[tuple[Any, dict[str, Any]]] = [
        (TargetBudget(0.9, 12), {}),
        (TargetBudget(0.9, 12), {"ahead": 1}),
        (TargetBudget(0.99, 12), {"update": "none"}),
        (GlobalBudget(12, total=50), {}),
    ]
    for policy, options in policies:
        adaptive = best(engine, policy, seed=100, **options).run(QUESTIONS, progress=False)
        assert len({a.drawn for a in adaptive.answers}) > 1
        for i, answer in enumerate(adaptive.answers):
            mine = [text(s) for s in adaptive.samples if s.question == i]
            assert mine == [text(own[i, 100 + k]) for k in range(answer.drawn)]
        assert engine.stats().running == unfinished(engine) == 0
    again = engine.sample([QUESTIONS[0]] * 3, [100, 101, 102])
    together = [engine.submit(QUESTIONS[0], seed) for seed in (102, 100, 101, 103)]
    engine.abort(together[3:])
    found: dict[str, Any] = {}
    while len(found) < 3:
        found.update(engine.poll())
    assert [found[together[i]].token_ids for i in (1, 2, 0)] == [c.token_ids for c in again]


def test_what_is_no_longer_needed_is_aborted_and_counted(policy_llm: Any) -> None:
    # Answers of many lengths, so that seeds finish out of order.
    engine = VLLMEngine(policy_llm, max_new_tokens=60, stop=list("aeiou"))
    asked = [QUESTION[i:] for i in range(12)]
    runner = BestOfN(engine, None, None, TargetBudget(0.9, 12), judge=Says(), update="posterior", n_max=12)
    result = runner.run(asked, progress=False)
    after = engine.stats()
    assert len({s.n_tokens for s in result.samples}) > 5
    assert sum(a.aborted for a in result.answers) == after.aborted > 0
    assert sum(a.drawn + a.surplus for a in result.answers) == after.finished
    assert result.aborted_tokens > 0
    assert result.n_tokens == after.generated_tokens
    one_by_one = replace(runner, ahead=1).run(asked, progress=False)
    assert one_by_one == result  # samples, decisions, picks
    assert one_by_one.n_tokens < result.n_tokens
    assert sum(a.surplus + a.aborted for a in one_by_one.answers) == 0
    assert engine.stats().running == unfinished(engine) == 0


def test_a_deadline_frees_the_engine(engine: VLLMEngine) -> None:
    result = best(engine, FixedBudget(12), update="none").run(QUESTIONS, progress=False, deadline=1e-4)
    assert all(a.expired and a.drawn < 12 for a in result.answers)
    assert engine.stats().running == unfinished(engine) == 0


def test_targets_of_their_own(engine: VLLMEngine) -> None:
    targets = [0.6 if i % 2 else 0.95 for i in range(12)]
    result = best(engine).run(QUESTIONS, progress=False, targets=targets)
    for i, answer in enumerate(result.answers):
        last = [d for d in result.decisions if d.question == i][-1]
        assert last.solved is not None
        assert answer.drawn == 12 or last.solved >= targets[i]


def test_policy_and_prm_in_one_process(long_engine: VLLMEngine, prm_llm: Any) -> None:
    from prmfast.vllm import VLLMPRM

    asked = [QUESTION, QUESTION[4:], QUESTION[8:]]
    runner = BestOfN(
        long_engine, None, None, TargetBudget(0.9, 6), judge=VLLMPRM(prm_llm), update="posterior", n_max=6, ahead=2
    )
    judged = runner.run(asked, progress=False)
    scored = replace(runner, judge=None, scorer=VLLMPRM(prm_llm)).run(asked, progress=False)
    assert [a.completion for a in judged.answers] == [a.completion for a in scored.answers]
    assert [a.drawn for a in judged.answers] == [a.drawn for a in scored.answers]
    assert [a.score for a in judged.answers] == pytest.approx([a.score for a in scored.answers], abs=1e-5)
    assert unfinished(long_engine) == 0


def test_more_prompts_than_a_step_takes(engine: VLLMEngine) -> None:
    """With chunked prefill vLLM would cut the sixth prompt in two, and end with an error on a CPU."""
    assert engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens % 18
    done = engine.sample(QUESTIONS * 5, [seed for seed in range(5) for _ in QUESTIONS])
    assert done[-2:] == engine.sample(QUESTIONS[-2:], [4, 4])


def test_errors(tiny_llm: Any, prm_llm: Any, engine: VLLMEngine) -> None:
    tiny_llm.llm_engine.vllm_config.scheduler_config.enable_chunked_prefill = True
    with pytest.raises(ValueError, match=r"llm must not chunk prompts: .* start it with enable_chunked_prefill=False"):
        VLLMEngine(tiny_llm)
    tiny_llm.llm_engine.vllm_config.scheduler_config.enable_chunked_prefill = False
    with pytest.raises(TypeError, match=r"llm must be a vllm\.LLM, got str"):
        VLLMEngine("tiny")
    with pytest.raises(ValueError, match="llm must generate text, got runner='pooling'"):
        VLLMEngine(prm_llm)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        VLLMEngine(tiny_llm, temperature=0.0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        VLLMEngine(tiny_llm, max_new_tokens=0)
    with pytest.raises(ValueError, match="stop must be a sequence of non-empty strings, got ';'"):
        VLLMEngine(tiny_llm, stop=";")
    with pytest.raises(ValueError, match="sampling must not hold n, seed: the engine sets them"):
        VLLMEngine(tiny_llm, sampling={"seed": 1, "n": 2})
    with pytest.raises(TypeError, match="top_q"):
        VLLMEngine(tiny_llm, sampling={"top_q": 1})
    with pytest.raises(ValueError, match=r"must fit into max_model_len = 64, got 18 \+ 30 \+ 19"):
        engine.submit(QUESTIONS[0], 0, prefix=" ;" * 30)
    with pytest.raises(ValueError, match=r"seeds\[0\] must lie in"):
        engine.submit(QUESTIONS[0], -1)
    assert unfinished(engine) == 0
