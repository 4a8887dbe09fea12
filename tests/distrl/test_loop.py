"""The loop on the tiny world: every configuration, a float64 transcription of a step, resuming, degenerate batches."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prmfast._threads import one_thread
from prmfast.distrl import HuggingFaceModel, LanguageModel, Loop, LoopConfig, LossRule
from prmfast.distrl.models import Outputs
from prmfast.distrl.phases import Phases
from prmfast.distrl.rollouts import Rollouts, choose, draw
from prmfast.engines import TransformersEngine
from prmfast.tiny import TinyLearner, TinyWorld
from tests.distrl.transcription import transcribed

METHODS = ["grpo", "reinforce", "grpo_ipvrm", "prime", "distrl_implicit", "distrl_ipvrm", "distrl_released"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def world() -> TinyWorld:
    return TinyWorld.load()


@pytest.fixture(scope="module")
def questions(world: TinyWorld) -> list[str]:
    return world.questions(40, seed=3, split="train", k_range=(2, 4))


def small(method: str = "distrl_ipvrm", **changes: Any) -> LoopConfig:
    config: LoopConfig = getattr(LoopConfig, method)(prompts=6, samples=4, policy_rate=1e-3, reward_rate=1e-3)
    return replace(config, **changes)


def make(world: TinyWorld, questions: Sequence[str], config: LoopConfig, dtype: torch.dtype = torch.float32) -> Loop:
    policy = TinyLearner(world.policy.to(dtype))
    return Loop(policy, policy.engine, questions, world.verify, config=config)


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock says."""
    return {name: value for name, value in record.items() if not name.startswith(("seconds/", "peak_mb/"))}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_what_it_trains(world: TinyWorld, questions: list[str], method: str) -> None:
    loop = make(world, questions, small(method))
    before = {name: dict(model.state_dict()) for name, model in loop._models().items()}
    history = loop.run(2)
    assert [record["step"] for record in history] == [1, 2]
    for record in history:
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
        assert record["answers"] == 24
        assert {"seconds/rollout", "seconds/old", "seconds/advantages", "seconds/policy"} <= set(record)
        assert ("rm_loss" in record) == (loop.config.reward != "none")
        assert (record["dist_candidates_per_token"] > 0) == (loop.config.reward != "none")
    moved = {
        name: any(not torch.equal(old[key], value) for key, value in model.state_dict().items())
        for (name, model), old in zip(loop._models().items(), before.values(), strict=True)
    }
    assert moved == {name: name != "reference" for name in before}
    assert ("reference" in moved) == (loop.config.reference == "fixed")


@pytest.mark.parametrize("reference", ["behaviour", "fixed"])
def test_a_step_is_its_plain_transcription(world: TinyWorld, questions: list[str], reference: str) -> None:
    """Two policy updates on each of two batches."""
    config = small(reference=reference, updates=2)
    loop = make(world, questions, config, torch.float64)
    policy = copy.deepcopy(loop.policy)
    rollouts = loop._rollouts()
    loop.run(1)
    batches = [rollouts, loop._rollouts()]
    record = loop.run(2)[-1]

    def logits(model: LanguageModel, batch: Rollouts) -> Tensor:
        return model.outputs(batch.prompts, batch.answers).logits()

    expected = transcribed(batches, logits, policy, fixed_reference=reference == "fixed")[-1]
    assert record["loss"] == pytest.approx(expected["losses"][-1], rel=1e-5, abs=1e-9)
    assert record["gradient_norm"] == pytest.approx(expected["norms"][-1], rel=1e-4)
    assert record["sigma_v"] == pytest.approx(expected["sigma_v"], rel=1e-6)
    assert record["rm_loss"] == pytest.approx(expected["rm_loss"], rel=1e-6)


@pytest.mark.parametrize("method", ["grpo", "distrl_ipvrm", "prime"])
def test_resuming_is_bit_equal(world: TinyWorld, questions: list[str], method: str, tmp_path: Path) -> None:
    config = small(method)
    whole = make(world, questions, config)
    expected = whole.run(4)
    make(world, questions, config).run(2, directory=tmp_path)
    again = make(world, questions, config)
    found = again.run(4, directory=tmp_path)
    assert [numbers(record) for record in found] == [numbers(record) for record in expected]
    for name, model in whole._models().items():
        for key, value in model.state_dict().items():
            assert torch.equal(again._models()[name].state_dict()[key], value), (name, key)
    finished = make(world, questions, config)
    assert len(finished.run(4, directory=tmp_path)) == 4  # nothing left to do
    with pytest.raises(ValueError, match="belongs to another configuration"):
        make(world, questions, replace(config, seed=1)).run(4, directory=tmp_path)
    (tmp_path / "distrl.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint of a loop"):
        make(world, questions, config).run(4, directory=tmp_path)


def test_steps_are_reported(world: TinyWorld, questions: list[str]) -> None:
    seen: list[tuple[int, float]] = []
    loop = make(world, questions, small("grpo"))
    loop.run(2, on_step=lambda step, record: seen.append((step, record["outcome"])))
    assert seen == [(1, loop.history[0]["outcome"]), (2, loop.history[1]["outcome"])]


def test_tensorboard(world: TinyWorld, questions: list[str], tmp_path: Path) -> None:
    from prmfast.distrl import tensorboard_logger

    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loop = make(world, questions, small("grpo"))
    loop.run(2, on_step=tensorboard_logger(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("outcome")] == pytest.approx([r["outcome"] for r in loop.history])


class TestDegenerate:
    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_grpo_on_equal_outcomes_changes_nothing_and_says_so(
        self, world: TinyWorld, questions: list[str], value: float, caplog: pytest.LogCaptureFixture
    ) -> None:
        policy = TinyLearner(world.policy)
        loop = Loop(policy, policy.engine, questions, lambda *_: value, config=small("grpo"))
        before = dict(policy.state_dict())
        with caplog.at_level(logging.WARNING, "prmfast.distrl"):
            (record,) = loop.run(1)
        assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
        assert record["reasons"] == [f"no group of 6 has outcomes that differ, all {value:g}: outcome part 0"]
        assert "every advantage is 0: so is the gradient" in caplog.messages

    @pytest.mark.parametrize("method", METHODS)
    def test_unknown_rewards(self, world: TinyWorld, questions: list[str], method: str) -> None:
        policy = TinyLearner(world.policy)
        for reward in (lambda *_: math.nan, lambda q, a: math.nan if q == questions[0] else float(world.verify(q, a))):
            loop = Loop(policy, policy.engine, questions, reward, config=small(method, prompts=40))
            (record,) = loop.run(1)
            assert any("outcome is NaN" in reason for reason in record["reasons"])
            assert all(math.isfinite(v) for v in record.values() if isinstance(v, float))
            assert all(tensor.isfinite().all() for tensor in policy.state_dict().values())

    @pytest.mark.parametrize("case", ["right", "wrong", "one token", "no candidates"])
    def test_distrl_stays_finite(
        self, world: TinyWorld, questions: list[str], case: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        value = {"right": 1.0, "wrong": 0.0}.get(case)
        policy = TinyLearner(world.policy)
        reward = world.verify if value is None else lambda *_: value
        loop = Loop(policy, policy.engine, questions, reward, config=small(p_min=1.0 if "no" in case else 0.1))
        if case == "one token":
            whole = loop._rollouts()
            short = replace(whole, answers=tuple(answer[:1] for answer in whole.answers))
            loop._rollouts = lambda: short  # type: ignore[method-assign]
        with caplog.at_level(logging.WARNING, "prmfast.distrl"):
            (record,) = loop.run(1)
        assert all(math.isfinite(v) for v in record.values() if isinstance(v, float))
        assert all(tensor.isfinite().all() for tensor in policy.state_dict().values())
        assert record["gradient_norm"] > 0 or "every advantage is 0" in caplog.text
        if value is not None:
            assert f"no group of 6 has outcomes that differ, all {value:g}: outcome part 0" in record["reasons"]

    def test_nothing_kept(self, world: TinyWorld, questions: list[str]) -> None:
        policy = TinyLearner(world.policy)
        loop = Loop(policy, policy.engine, questions, lambda *_: 1.0, config=small(mixed_only=True))
        (record,) = loop.run(1)
        assert record["tokens"] == 0
        assert record["reasons"] == [
            "no prompt has outcomes that differ: nothing is kept",
            "no token was kept: the policy stays as it is",
        ]

    def test_a_gradient_that_is_no_number_moves_nothing(
        self, world: TinyWorld, questions: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        loop = make(world, questions, small("grpo"))
        before = dict(loop.policy.state_dict())
        with caplog.at_level(logging.WARNING, "prmfast.distrl"):
            own = loop._rollouts()
            _, norm = loop._descend("policy", loop.policy, own, lambda theta: theta.states[:, 3:].sum() * math.nan)
        assert math.isnan(norm)
        assert all(torch.equal(before[name], tensor) for name, tensor in loop.policy.state_dict().items())
        assert "the gradient norm of the policy is nan" in caplog.text


class TestRollouts:
    def test_answers_are_drawn_and_verified(self, world: TinyWorld, questions: list[str]) -> None:
        found = draw(world.engine, questions[:3], [2, 1, 3], world.verify, first_seed=8)
        assert found.group.tolist() == [0, 0, 1, 2, 2, 2]
        assert found.prompts == tuple(questions[i] for i in found.group)
        single = world.engine.sample([questions[2]], [9])[0]
        assert found.answers[4] == single.token_ids
        assert found.outcome[4] == world.verify(questions[2], single.text)
        assert found.token_ids[found.offsets[4] : found.offsets[5]].tolist() == list(single.token_ids)
        with pytest.raises(ValueError, match="reward must be finite or NaN, got inf"):
            draw(world.engine, questions[:1], [1], lambda *_: math.inf, first_seed=0)

    def test_oversampled_prompts_that_teach_come_first(self) -> None:
        group = torch.arange(5).repeat_interleave(2)
        outcome = torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 0, 0, 1])
        finished = torch.tensor([True] * 6 + [True, False] + [True, True])
        rows = Rollouts(tuple("ab" * 5), ((1,),) * 10, group, outcome, finished)
        kept, reasons = choose(rows, prompts=3, mixed_only=False)
        assert kept.group.tolist() == [1, 1, 4, 4, 0, 0]
        assert reasons == ("1 of 3 kept prompts teach nothing (accuracy or length outside the limits)",)
        kept, reasons = choose(rows, prompts=2, mixed_only=True)
        assert kept.group.tolist() == [1, 1, 4, 4]
        assert reasons == ()

    def test_oversampling_in_the_loop(self, world: TinyWorld, questions: list[str]) -> None:
        (record,) = make(world, questions, small("grpo", oversample=4.0)).run(1)
        assert record["answers"] == 24
        assert record["reasons"] == []  # six of the 24 prompts had outcomes that differ


def test_adaptive_counts(world: TinyWorld, questions: list[str]) -> None:
    """Hopeless and certain prompts get the fewest answers; the total stays."""
    asked: list[Sequence[str]] = []

    def quantiles(prompts: Sequence[str]) -> Tensor:
        asked.append(prompts)
        return torch.tensor([0.0, 0.05, 0.1, 0.5, 1.0, 1.0])[:, None].expand(6, 3)

    policy = TinyLearner(world.policy)
    config = small("grpo", adaptive=True, max_samples=12)
    loop = Loop(policy, policy.engine, questions, world.verify, config=config, quantiles=quantiles)
    counts = torch.bincount(loop._rollouts().group)
    assert int(counts.sum()) == 24
    assert counts[[0, 4, 5]].tolist() == [2, 2, 2]
    assert int(counts[1:4].min()) > 2
    record = loop.run(1)[-1]
    assert record["answers"] == 24
    assert len(asked[0]) == 6
    with pytest.raises(ValueError, match=r"quantiles must be given where config\.adaptive is on and only there"):
        make(world, questions, config)
    with pytest.raises(ValueError, match="oversample must be 1 where adaptive is on, got 2"):
        small("grpo", adaptive=True, oversample=2.0)
    with pytest.raises(ValueError, match="min_samples <= samples <= max_samples must hold, got 2 <= 4 <= 3"):
        small("grpo", adaptive=True, max_samples=3)


@pytest.mark.parametrize("method", ["distrl_ipvrm", "distrl_released", "prime"])
def test_passes_change_nothing(world: TinyWorld, questions: list[str], method: str) -> None:
    whole = make(world, questions, small(method, updates=2), torch.float64)
    pieces = make(world, questions, small(method, updates=2, answers_per_pass=5), torch.float64)
    for own, other in zip(pieces.run(2), whole.run(2), strict=True):
        for name, value in numbers(other).items():
            assert own[name] == pytest.approx(value, rel=1e-7, abs=1e-9), name
    for own_, other_ in zip(pieces.policy.parameters(), whole.policy.parameters(), strict=True):
        torch.testing.assert_close(own_, other_, rtol=0, atol=1e-6)  # Adam's first steps divide by gradients near 0


class TestModels:
    def test_hugging_face_model_gives_the_tiny_logits(self, world: TinyWorld, questions: list[str]) -> None:
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(TinyWorld.policy_directory()).eval()
        theirs, ours = HuggingFaceModel(model, world.tokenizer()), TinyLearner(world.policy)
        drawn = draw(world.engine, questions[:5], [2] * 5, world.verify, first_seed=1)
        answers = (*drawn.answers[:-1], ())  # an empty answer has no row
        with torch.no_grad():
            expected, found = (
                ours.outputs(drawn.prompts, answers).logits(),
                theirs.outputs(drawn.prompts, answers).logits(),
            )
        known = expected.isfinite()
        assert found.shape == expected.shape == (int(drawn.length[:-1].sum()), found.shape[1])
        torch.testing.assert_close(found[known], expected[known], rtol=1e-4, atol=1e-4)
        assert known.float().mean() > 0.9

    def test_the_loop_trains_a_hugging_face_model(self, world: TinyWorld, questions: list[str]) -> None:
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(TinyWorld.policy_directory())
        engine = TransformersEngine(model, world.tokenizer(), max_new_tokens=12)
        before = model.state_dict()["model.norm.weight"].clone()
        config = small(prompts=2, samples=3, answers_per_pass=4)
        short = [question for question in questions if question.split()[5] == "_"]
        loop = Loop(HuggingFaceModel(model, world.tokenizer()), lambda: engine, short, world.verify, config=config)
        record = loop.run(1)[-1]
        assert math.isfinite(record["loss"])
        assert not torch.equal(before, model.state_dict()["model.norm.weight"])

    def test_the_first_update_takes_a_normalizer_that_is_known(
        self, world: TinyWorld, questions: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Known where the hidden states are those of sampling, bit by bit: in the first update, not with dropout."""
        transformers = pytest.importorskip("transformers")
        short = [question for question in questions if question.split()[5] == "_"]
        config, told = small(prompts=2, samples=3, updates=2), list[bool]()
        loss = Outputs.loss

        def listened(self: Outputs, *arguments: Any, on_policy: bool, **options: Any) -> Any:
            told.append(on_policy)
            return loss(self, *arguments, on_policy=on_policy and use, **options)

        monkeypatch.setattr(Outputs, "loss", listened)

        def record(dropout: float = 0.0) -> dict[str, Any]:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                TinyWorld.policy_directory(), attention_dropout=dropout
            )
            engine = TransformersEngine(model, world.tokenizer(), max_new_tokens=12)
            model.train()  # the engine has switched dropout off
            loop = Loop(HuggingFaceModel(model, world.tokenizer()), lambda: engine, short, world.verify, config=config)
            return numbers(loop.run(1)[-1])

        use = True
        taken = record()
        use = False
        computed = record()
        assert told == [True, False] * 2
        for name, value in computed.items():
            assert taken[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        told.clear()
        record(dropout=0.1)
        assert told == [False, False]

    def test_learner_is_what_the_decoder_samples_from(self, world: TinyWorld, questions: list[str]) -> None:
        learner = TinyLearner(world.policy)
        assert learner.engine().sample(questions[:2], [0, 1]) == world.engine.sample(questions[:2], [0, 1])
        assert learner.outputs(["x"], [()]).states.shape == (0, world.policy.config.vocab_size)
        other = TinyLearner(world.policy)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.01)
        learner.load_state_dict(other.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(learner.parameters(), other.parameters(), strict=True))

    def test_errors(self, world: TinyWorld) -> None:
        transformers = pytest.importorskip("transformers")
        with pytest.raises(TypeError, match="model must be a transformers causal LM with an output layer, got Linear"):
            HuggingFaceModel(torch.nn.Linear(2, 2), world.tokenizer())
        model = transformers.AutoModelForCausalLM.from_pretrained(TinyWorld.policy_directory())
        with pytest.raises(ValueError, match=r"prompts\[0\] must have at least one token, got none"):
            HuggingFaceModel(model, world.tokenizer()).outputs([""], [(3,)])


def test_configurations_are_checked(world: TinyWorld) -> None:
    for change, message in (
        ({"reward": "orm"}, "reward must be 'none' or 'ipvrm' or 'implicit', got 'orm'"),
        ({"reference": "old"}, "reference must be 'behaviour' or 'fixed', got 'old'"),
        ({"samples": 0}, "samples must be >= 1, got 0"),
        ({"policy_rate": 0.0}, "policy_rate must be > 0 and finite, got 0"),
        ({"oversample": 0.5}, "oversample must be >= 1 and finite, got 0"),
        ({"reward": "none"}, r"loss\.alpha must be 0 where reward is 'none', got 0\.1"),
    ):
        with pytest.raises(ValueError, match=message):
            LoopConfig(**change)  # type: ignore[arg-type]
    assert LoopConfig.grpo(loss=LossRule(alpha=0.0, clip_high=0.2)).loss.clip_high == 0.2
    policy = TinyLearner(world.policy)
    for name, config in (("reward_model", LoopConfig.grpo(prompts=1)), ("reference", LoopConfig(prompts=1))):
        with pytest.raises(ValueError, match=f"{name} must be None where config"):
            Loop(policy, policy.engine, ["x"], world.verify, config=config, **{name: policy})
    count = len(list(policy.parameters()))
    with pytest.raises(ValueError, match=f"reward_model must train no parameter of the policy, got {count} of them"):
        Loop(policy, policy.engine, ["x"], world.verify, config=LoopConfig.distrl_ipvrm(prompts=1), reward_model=policy)
    with pytest.raises(ValueError, match=r"questions must be at least 64 \(prompts \* oversample\), got 1"):
        make(world, ["x"], LoopConfig.grpo(oversample=2.0))


def test_phases_add_up() -> None:
    phases = Phases()
    for _ in range(2):
        with phases("a"):
            torch.zeros(4_000_000).sum()
    found = phases.metrics()
    assert found["seconds/a"] > 0
    assert found.get("peak_mb/a", 17.0) > 16  # the tensor alone, where the kernel counts
