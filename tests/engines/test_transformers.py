from __future__ import annotations

from typing import Any

import pytest
import torch

from prmfast.engines import Engine, TransformersEngine
from prmfast.tiny import TinyWorld, task

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def world() -> TinyWorld:
    return TinyWorld.load()


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return (
        transformers.AutoModelForCausalLM.from_pretrained(TinyWorld.policy_directory(), dtype=torch.float32),
        transformers.AutoTokenizer.from_pretrained(TinyWorld.tokenizer_directory()),
    )


@pytest.fixture(scope="module")
def engine(parts: tuple[Any, Any]) -> TransformersEngine:
    return TransformersEngine(*parts, max_new_tokens=20)


def begun(world: TinyWorld, n: int) -> tuple[list[str], list[int], list[str]]:
    """Questions with answers begun to different lengths."""
    questions = world.questions(n, seed=12)
    drawn = world.engine.sample(questions, [5] * n)
    prefixes = [" ".join(task.split_steps(c.text)[: i % 4]) for i, c in enumerate(drawn)]
    return questions, list(range(n)), prefixes


def test_samples_are_those_of_the_tiny_engine(world: TinyWorld, engine: TransformersEngine) -> None:
    questions, seeds, _ = begun(world, 24)
    assert isinstance(engine, Engine)
    assert engine.sample(questions, seeds) == world.engine.sample(questions, seeds)


def test_prefixes_of_different_lengths(world: TinyWorld, engine: TransformersEngine) -> None:
    questions, seeds, prefixes = begun(world, 24)
    drawn = engine.sample(questions, seeds, prefixes=prefixes)
    assert drawn == world.engine.sample(questions, seeds, prefixes=prefixes)
    assert all(c.text.startswith(prefix) for c, prefix in zip(drawn, prefixes, strict=True))


def test_batch_composition_does_not_matter(
    world: TinyWorld, parts: tuple[Any, Any], engine: TransformersEngine
) -> None:
    questions, seeds, prefixes = begun(world, 10)
    whole = engine.sample(questions, seeds, prefixes=prefixes)
    assert (
        TransformersEngine(*parts, max_new_tokens=20, batch_size=3).sample(questions, seeds, prefixes=prefixes) == whole
    )
    backwards = engine.sample(questions[::-1], seeds[::-1], prefixes=prefixes[::-1])
    assert backwards[::-1] == whole
    assert [
        engine.sample([q], [s], prefixes=[p])[0] for q, s, p in zip(questions, seeds, prefixes, strict=True)
    ] == whole


def test_seeds_matter(world: TinyWorld, engine: TransformersEngine) -> None:
    question = world.questions(1, seed=1, k_range=(8, 8))[0]
    assert len({c.text for c in engine.sample([question] * 16, list(range(16)))}) > 4


def test_a_low_temperature_gives_the_likeliest_answer(world: TinyWorld, parts: tuple[Any, Any]) -> None:
    cold = TransformersEngine(*parts, max_new_tokens=20, temperature=1e-4)
    question = world.questions(1, seed=1)[0]
    drawn = cold.sample([question] * 4, [0, 1, 2, 3])
    assert len({c.text for c in drawn}) == 1


def test_length_limit_and_stop_strings(world: TinyWorld, parts: tuple[Any, Any]) -> None:
    question = world.questions(1, seed=1, k_range=(6, 6))[0]
    full = world.engine.sample([question] * 3, [1, 2, 3])
    short = TransformersEngine(*parts, max_new_tokens=5).sample([question] * 3, [1, 2, 3])
    for cut, whole in zip(short, full, strict=True):
        assert (cut.finished, cut.n_tokens) == (False, 5)
        assert whole.text.startswith(cut.text)
    one_step = TransformersEngine(*parts, max_new_tokens=20, stop=[";"]).sample([question] * 3, [1, 2, 3])
    for cut, whole in zip(one_step, full, strict=True):
        assert cut.finished
        assert cut.text == task.split_steps(whole.text)[0]
        assert (cut.stop, whole.stop) == (";", None)
    # A stop string in the prefix does not count.
    prefix = one_step[0].text
    two_steps = TransformersEngine(*parts, max_new_tokens=20, stop=[";"]).sample([question], [1], prefixes=[prefix])
    assert two_steps[0].text == " ".join(task.split_steps(full[0].text)[:2])


def test_sampling_options_of_the_generation_config_are_not_used(world: TinyWorld, parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    questions, seeds, _ = begun(world, 8)
    before = TransformersEngine(model, tokenizer, max_new_tokens=20).sample(questions, seeds)
    kept = model.generation_config
    try:
        model.generation_config = transformers.GenerationConfig(
            do_sample=True, top_k=1, repetition_penalty=5.0, eos_token_id=task.EOS_ID, pad_token_id=task.PAD_ID
        )
        assert TransformersEngine(model, tokenizer, max_new_tokens=20).sample(questions, seeds) == before
    finally:
        model.generation_config = kept


def test_errors(world: TinyWorld, parts: tuple[Any, Any], engine: TransformersEngine) -> None:
    question = world.questions(1)[0]
    assert engine.sample([], []) == []
    with pytest.raises(ValueError, match=r"seeds must have one entry per prompt \(1\), got 0"):
        engine.sample([question], [])
    with pytest.raises(ValueError, match=r"prompts\[0\] must have at least one token"):
        engine.sample([""], [1])
    with pytest.raises(ValueError, match=r"prompts\[1\] .* must fit into 64 positions, got 18 \+ 30 \+ 20"):
        engine.sample([question] * 2, [1, 2], prefixes=["", "1 ; " * 15])
    with pytest.raises(TypeError, match="model must be a transformers causal LM"):
        TransformersEngine(object(), parts[1])
    with pytest.raises(TypeError, match="tokenizer must be"):
        TransformersEngine(parts[0], None)
    for bad in ({"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": 0.0}, {"stop": ";"}, {"stop": [""]}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            TransformersEngine(*parts, **bad)


def test_log_probabilities_are_those_of_the_tiny_engine(world: TinyWorld, engine: TransformersEngine) -> None:
    questions = world.questions(8, seed=12)
    answers = [completion.token_ids for completion in world.engine.sample(questions, list(range(8)))]
    ours, wanted = engine.logprobs(questions, answers), world.engine.logprobs(questions, answers)
    for row, other in zip(ours, wanted, strict=True):
        # The tiny engine never draws padding and unknown tokens; the model gives them next to nothing.
        assert row == pytest.approx(other, abs=2e-3)
        assert len(row) > 3
    with pytest.raises(ValueError, match=r"token_ids must have one entry per prompt \(8\), got 7"):
        world.engine.logprobs(questions, answers[1:])
