from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prmfast.engines.random import sample_keys, text_key, uniform
from prmfast.tiny import TinyWorld, task
from prmfast.tiny.decoder import MAX_LENGTH, Decoder, distribution
from prmfast.tiny.policy import Policy, PolicyConfig, forward


def prompts_of(n: int, seed: int, *, prefixes: bool = True) -> torch.Tensor:
    """Questions, some with answers begun: rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    questions = task.make_questions(n, generator=generator)
    traces = task.noisy_traces(questions, task.fact_noise(generator=generator), generator=generator)
    begun = 2 * (torch.arange(n) % 4).clamp(max=task.number_of_steps(questions)) if prefixes else torch.zeros(n)
    return torch.where(torch.arange(MAX_LENGTH) < task.QUESTION_LENGTH + begun[:, None], traces, task.PAD_ID)


def sample_without_cache(policy: Policy, prompt: torch.Tensor, key: int, temperature: float) -> list[int]:
    exact = policy.to(torch.float64)
    ids = prompt[prompt != task.PAD_ID].tolist()
    while len(ids) < MAX_LENGTH and task.EOS_ID not in ids:
        _, logits = forward(exact, torch.tensor([ids]))
        cumulative = distribution(logits[:, -1], temperature)[0]
        u = uniform(torch.tensor(key), torch.tensor(len(ids)))
        ids.append(int((cumulative <= u).sum()))
    return ids


def test_logits_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    policy = Policy.random(PolicyConfig(), generator=torch.Generator().manual_seed(0))
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**policy.config.to_hf()))
    model.load_state_dict(policy.state_dict(), strict=False)
    ids = prompts_of(16, 0).clamp(min=0)
    with torch.no_grad():
        output = model.eval()(ids, output_hidden_states=True)
        hidden, logits = forward(policy, ids)
    torch.testing.assert_close(logits, output.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(hidden, output.hidden_states[-1], atol=1e-4, rtol=0)


def test_shipped_policy_loads_in_transformers_with_the_same_logits(world: TinyWorld) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(TinyWorld.policy_directory(), dtype=torch.float32)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    ids = prompts_of(16, 1)
    with torch.no_grad():
        torch.testing.assert_close(forward(world.policy, ids)[1], model.eval()(ids).logits, atol=1e-4, rtol=0)


def test_forward_from_a_start_equals_the_full_pass(world: TinyWorld) -> None:
    ids = prompts_of(8, 2)
    full, part = forward(world.policy, ids), forward(world.policy, ids, start=17)
    for a, b in zip(full, part, strict=True):
        torch.testing.assert_close(a[:, 17:], b, atol=1e-5, rtol=1e-5)


def test_state_dict_round_trip(world: TinyWorld) -> None:
    again = Policy.from_state_dict(world.policy.config, world.policy.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(world.policy.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_cached_decoding_equals_uncached(world: TinyWorld, temperature: float) -> None:
    prompts = prompts_of(12, 3)
    keys = sample_keys(torch.arange(12), torch.arange(12) + 5)
    drawn = Decoder(world.policy).sample(prompts, torch.arange(12), keys, temperature=temperature)
    for i in range(12):
        expected = sample_without_cache(world.policy, prompts[i], int(keys[i]), temperature)
        assert drawn.ids[i, : drawn.length[i]].tolist() == expected
        assert drawn.finished[i] == (expected[-1] == task.EOS_ID)


def test_a_sample_does_not_depend_on_its_batch(world: TinyWorld) -> None:
    prompts, rollouts = prompts_of(60, 4), 8
    index = torch.arange(60).repeat_interleave(rollouts)
    keys = sample_keys(index, torch.arange(len(index)) % rollouts)
    whole = Decoder(world.policy).sample(prompts, index, keys)
    small = Decoder(world.policy, batch_size=7).sample(prompts, index, keys)
    shuffle = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    mixed = Decoder(world.policy).sample(prompts, index[shuffle], keys[shuffle])
    assert torch.equal(whole.ids, small.ids)
    assert torch.equal(whole.ids[shuffle], mixed.ids)
    assert torch.equal(whole.length, (whole.ids != task.PAD_ID).sum(1))


def test_a_draw_at_the_edge_between_two_tokens_is_decided_exactly(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(32, 5, prefixes=False)
    decoder = Decoder(world.policy)
    lengths = torch.full((32,), task.QUESTION_LENGTH)
    exact = decoder.exact_distribution(prompts, lengths, 1.0)
    # Random numbers on the very boundaries: float32 logits alone would fall on either side.
    first = torch.searchsorted(exact, torch.full((32, 1), 0.5, dtype=torch.float64))
    edge = exact.gather(1, first)[:, 0]
    monkeypatch.setattr("prmfast.tiny.decoder.uniform", lambda keys, counters: edge[keys])
    for batch_size in (1, 5, 32):
        decoder = Decoder(world.policy, batch_size=batch_size)
        drawn = decoder.sample(prompts, torch.arange(32), torch.arange(32))
        single = torch.stack([decoder.exact_distribution(prompts[i : i + 1], lengths[:1], 1.0)[0] for i in range(32)])
        expected = torch.searchsorted(single, edge[:, None], right=True)[:, 0]
        assert torch.equal(drawn.ids[:, task.QUESTION_LENGTH], expected)


def test_frequencies_follow_the_distribution(world: TinyWorld) -> None:
    prompt, n = prompts_of(1, 6, prefixes=False), 20_000
    drawn = Decoder(world.policy).sample(
        prompt, torch.zeros(n, dtype=torch.int64), sample_keys(torch.full((n,), text_key("f")), torch.arange(n))
    )
    counts = torch.bincount(drawn.ids[:, task.QUESTION_LENGTH], minlength=task.VOCAB_SIZE).double()
    with torch.no_grad():
        expected = n * F.softmax(forward(world.policy, prompt[:, :18])[1][0, -1].double(), -1)
    assert ((counts - expected).abs() <= 5 * expected.sqrt() + 5).all()


def test_uniform_numbers_are_uniform_and_do_not_repeat() -> None:
    keys = sample_keys(torch.full((4000,), text_key("a question")), torch.arange(4000))
    u = uniform(keys[:, None].expand(-1, 20), torch.arange(20).expand(4000, -1)).flatten()
    assert len(u.unique()) == len(u)
    assert (u >= 0).all()
    assert (u < 1).all()
    assert torch.histc(u, 20, 0, 1).sub(4000).abs().max() < 5 * 4000**0.5
    lagged = torch.stack([u.view(4000, 20)[:, :-1].flatten(), u.view(4000, 20)[:, 1:].flatten()])
    assert torch.corrcoef(lagged)[0, 1].abs() < 0.02


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(world: TinyWorld, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        Decoder(world.policy).sample(prompts_of(1, 0), torch.tensor([0]), torch.tensor([0]), temperature=temperature)


def test_batch_size_must_be_positive(world: TinyWorld) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Decoder(world.policy, batch_size=0)


def test_a_foreign_config_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type must be 'qwen2', got 'llama'"):
        PolicyConfig.from_hf({"model_type": "llama"})
