"""DistRLTrainer on TRL's own trainer and a real model: the equations, resumption, degenerate batches, refusals."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prmfast import _trl
from prmfast._threads import one_thread
from prmfast.distrl import HuggingFaceModel, Loop, LoopConfig
from prmfast.distrl.rollouts import Rollouts
from prmfast.distrl.trl import CHECKPOINT_NAME, DistRLConfig, DistRLTrainer
from prmfast.tiny import TinyWorld
from tests.distrl.transcription import transcribed

GROUP = 4


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CI", "true")  # TRL sends no usage statistics
    with one_thread():
        yield


@pytest.fixture(scope="module")
def world() -> TinyWorld:
    return TinyWorld.load()


@pytest.fixture(scope="module")
def tokenizer(world: TinyWorld) -> Any:
    return AutoTokenizer.from_pretrained(world.tokenizer_directory())


@pytest.fixture(scope="module")
def prompts(world: TinyWorld) -> list[str]:
    return world.questions(16, seed=3, split="train", k_range=(2, 4))


class Recorder:
    """A verifier by the parity of the token ids, which says what it was asked."""

    __name__ = "parity"

    def __init__(self, value: Any = None) -> None:
        self.seen: list[tuple[list[str], list[list[int]], list[Any]]] = []
        self.value = value

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[Any]:
        rewards = [float(sum(ids) % 2) if self.value is None else self.value(i) for i, ids in enumerate(completion_ids)]
        self.seen.append((prompts, completion_ids, rewards))
        return rewards

    def rollouts(self) -> list[Rollouts]:
        made = []
        for prompts, ids, rewards in self.seen:
            group = torch.arange(len(ids)) // GROUP
            answers = tuple(map(tuple, ids))
            made.append(Rollouts(tuple(prompts), answers, group, torch.tensor(rewards), torch.ones(len(ids)) > 0))
        return made


def config(folder: Path, made: Any = DistRLConfig, **changes: Any) -> DistRLConfig:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": GROUP,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "rm_learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 5,
    }
    args: DistRLConfig = made(str(folder), **(options | changes))
    return args


def trainer(
    world: TinyWorld,
    tokenizer: Any,
    prompts: list[str],
    args: DistRLConfig,
    reward: Any = None,
    model: Any = None,
    **options: Any,
) -> DistRLTrainer:
    model = model or AutoModelForCausalLM.from_pretrained(world.policy_directory())
    data = Dataset.from_dict({"prompt": prompts})
    return DistRLTrainer(model, reward or Recorder(), args, train_dataset=data, processing_class=tokenizer, **options)


def double(world: TinyWorld) -> Any:
    """The tiny policy in float64: Adam's first steps divide gradients near 0 by themselves, rounding included."""
    return AutoModelForCausalLM.from_pretrained(world.policy_directory()).double()


def logged(run: DistRLTrainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def one_by_one(tokenizer: Any) -> Any:
    """Logits of answers without any padding."""

    def logits(model: Any, batch: Rollouts) -> Tensor:
        rows = []
        for prompt, answer in zip(batch.prompts, batch.answers, strict=True):
            start = tokenizer(prompt)["input_ids"]
            rows.append(model(torch.tensor([start + list(answer)])).logits[0, len(start) - 1 : -1])
        return torch.cat(rows)

    return logits


@pytest.mark.parametrize("case", ["behaviour", "fixed", "released"])
def test_loop_trainer_and_transcription_agree(
    world: TinyWorld, tokenizer: Any, prompts: list[str], case: str, tmp_path: Path
) -> None:
    """Two batches with two updates each, gradient accumulation, a temperature, answers of different lengths:
    the same losses to 1e-5 and gradient norms to 1e-4.

    Prompts have one length: transformers computes rotary angles in float32, padding shifts them, and Adam's first steps
    make that rounding large. What padding does to the outputs is tested below.
    """
    reference = "fixed" if case == "fixed" else "behaviour"
    sizes: dict[str, Any] = {"temperature": 1.4, "num_iterations": 2, "max_steps": 4, "max_completion_length": 18}
    clips = {"dist_clip_low": 0.01, "dist_clip_high": 0.02}  # so that a small step meets them
    made = DistRLConfig.released if case == "released" else DistRLConfig
    own = {"epsilon": 0.01, "epsilon_high": 0.02, "dist_p_min": 0.03, "learning_rate": 1e-4, "rm_learning_rate": 1e-2}
    args = config(tmp_path, made, rm_reference=reference, **sizes, **clips, **own)
    recorder = Recorder()
    run = trainer(world, tokenizer, prompts, args, recorder, double(world))
    run.train()
    batches = recorder.rollouts()
    assert len(batches) == 2
    assert any(len({len(answer) for answer in batch.answers}) > 1 for batch in batches)
    assert min(logged(run, "distrl/dist_candidates_per_token")) > 1
    assert max(logged(run, "distrl/dist_clip_fraction")) > 0.1

    method = LoopConfig.distrl_released if case == "released" else LoopConfig.distrl_ipvrm
    settings = method(policy_rate=1e-4, reward_rate=1e-2, prompts=2, samples=GROUP, updates=2, answers_per_pass=3)
    rule = replace(settings.loss, clip_low=0.01, clip_high=0.02, **clips)
    settings = replace(settings, reference=reference, temperature=1.4, p_min=0.03, loss=rule)
    policy = HuggingFaceModel(double(world), tokenizer)
    loop = Loop(policy, world.policy, ["", ""], recorder, config=settings)
    for i, batch in enumerate(batches):
        loop._rollouts = lambda batch=batch: batch  # type: ignore[method-assign,misc]
        record = loop.advance()
        assert logged(run, "loss")[2 * i + 1] == pytest.approx(record["loss"], rel=1e-5, abs=1e-5)
        assert logged(run, "grad_norm")[2 * i + 1] == pytest.approx(record["gradient_norm"], rel=1e-4)
        for name in ("rm_loss", "sigma_v", "rm_pairwise_accuracy", "td_outcome_correlation"):
            assert logged(run, f"distrl/{name}")[i] == pytest.approx(record[name], rel=1e-4, abs=1e-5), name
    if case == "released":
        return
    options: dict[str, Any] = {"temperature": 1.4, "p_min": 0.03, "rates": (1e-4, 1e-2), "clip": (0.01, 0.02)}
    options["fixed_reference"] = reference == "fixed"
    expected = transcribed(batches, one_by_one(tokenizer), double(world), **options)
    assert logged(run, "loss") == pytest.approx([v for e in expected for v in e["losses"]], rel=1e-5, abs=1e-5)
    assert logged(run, "grad_norm") == pytest.approx([v for e in expected for v in e["norms"]], rel=1e-4)
    assert [r["loss"] for r in loop.history] == pytest.approx([e["losses"][1] for e in expected], rel=1e-5, abs=1e-5)
    assert [r["gradient_norm"] for r in loop.history] == pytest.approx([e["norms"][1] for e in expected], rel=1e-4)


def test_padding_on_both_sides_changes_nothing(world: TinyWorld, tokenizer: Any, prompts: list[str]) -> None:
    from prmfast.distrl.trl import _Rows

    starts = [tokenizer(prompt.replace("_ ", "", i))["input_ids"] for i, prompt in enumerate(prompts[:3])]
    answers = [[5, 6, 7, 8], [9], [4, 11]]
    width, longest = max(map(len, starts)), max(map(len, answers))
    output = {
        "prompt_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids in starts]),
        "prompt_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in starts]),
        "completion_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids in answers]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in answers]),
    }
    mask = output["completion_mask"].bool()
    mask[0, 1] = False  # a tool's token: seen, but not ours
    model = double(world)
    rows = _Rows(model, output=output, mask=mask, autocast=contextlib.nullcontext)
    with torch.no_grad():
        found = rows.outputs(range(3), answers).logits()
        alone = [
            model(torch.tensor([start + answer])).logits[0, len(start) - 1 : -1]
            for start, answer in zip(starts, answers, strict=True)
        ]
    expected = torch.cat([alone[0][[0, 2, 3]], *alone[1:]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class TestDegenerate:
    @pytest.mark.parametrize(
        ("value", "changes", "reason"),
        [
            (lambda _: 1.0, {}, "no group of 2 has outcomes that differ, all 1"),
            (lambda _: 0.0, {}, "no group of 2 has outcomes that differ, all 0"),
            (None, {"max_completion_length": 1}, ""),
            (None, {"dist_p_min": 1.0, "temperature": 3.0}, "no candidates: the distribution-level part is 0"),
            (lambda _: None, {}, "outcome is NaN or infinite in 8 of 8 sequences"),
            (lambda i: None if i % 3 == 0 else float(i % 2), {}, "outcome is NaN or infinite in 3 of 8 sequences"),
            (None, {"max_completion_length": 2, "mask_truncated_completions": True}, "no valid token"),
            (lambda _: 1.0, {"rm_loss": "implicit", "rm_dlw": True, "rm_beta": 0.05}, "every advantage is 0"),
        ],
        ids=["right", "wrong", "one token", "no candidates", "unknown", "some unknown", "no token", "nothing learnt"],
    )
    def test_nothing_turns_nan_and_an_update_of_zero_is_explained(
        self,
        world: TinyWorld,
        tokenizer: Any,
        prompts: list[str],
        value: Any,
        changes: dict[str, Any],
        reason: str,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        run = trainer(world, tokenizer, prompts, config(tmp_path, max_steps=2, **changes), Recorder(value))
        with caplog.at_level(logging.WARNING, "prmfast.distrl"):
            run.train()
        said = " | ".join(record.getMessage() for record in caplog.records if record.name == "prmfast.distrl")
        assert reason in said
        for model in (run.model, run.reward_model):
            assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        losses, norms = logged(run, "loss"), logged(run, "grad_norm")
        assert len(losses) == 2
        assert all(map(math.isfinite, losses + norms))
        if 0.0 in norms:
            assert "every advantage is 0" in said or "no valid token" in said

    def test_a_gradient_that_is_no_number_leaves_the_reward_model(
        self, world: TinyWorld, tokenizer: Any, prompts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = trainer(world, tokenizer, prompts, config(tmp_path, max_steps=1))
        before = copy.deepcopy(run.reward_model.state_dict())
        handle = run.reward_model.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
        with caplog.at_level(logging.WARNING, "prmfast.distrl"):
            run.train()
        handle.remove()
        assert "the gradient norm of the reward model is nan" in caplog.text
        assert all(torch.equal(before[name], value) for name, value in run.reward_model.state_dict().items())


def test_a_resumed_run_is_the_whole_run(world: TinyWorld, tokenizer: Any, prompts: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "rm_reference": "fixed"}
    whole = trainer(world, tokenizer, prompts, config(tmp_path / "whole", max_steps=4, **options))
    whole.train()
    trainer(world, tokenizer, prompts, config(tmp_path / "part", max_steps=2, **options)).train()
    rest = trainer(world, tokenizer, prompts, config(tmp_path / "part", max_steps=4, **options))
    rest.train(resume_from_checkpoint=True)
    assert logged(rest, "loss") == logged(whole, "loss")
    for name in ("model", "reward_model", "reference"):
        mine, other = getattr(rest, name).state_dict(), getattr(whole, name).state_dict()
        assert all(torch.equal(mine[key], value) for key, value in other.items()), name
    again = trainer(world, tokenizer, prompts, config(tmp_path / "part", max_steps=6, save_strategy="no"))
    with pytest.raises(ValueError, match=r"belongs to another rm_reference than 'behaviour'"):
        again.train(resume_from_checkpoint=True)
    (tmp_path / "part" / "checkpoint-4" / CHECKPOINT_NAME).unlink()
    with pytest.raises(ValueError, match=r"distrl\.pt is missing: the checkpoint was written by another trainer"):
        again.train(resume_from_checkpoint=True)


def test_evaluation_teaches_nothing(world: TinyWorld, tokenizer: Any, prompts: list[str], tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": prompts[:2]})
    args = config(tmp_path, per_device_eval_batch_size=8)
    run = trainer(world, tokenizer, prompts, args, eval_dataset=data)
    before = copy.deepcopy(run.reward_model.state_dict())
    found = run.evaluate()
    assert math.isfinite(found["eval_loss"])
    assert "eval_distrl/dist_mass" in found
    assert "eval_distrl/rm_loss" not in found
    assert all(torch.equal(before[name], value) for name, value in run.reward_model.state_dict().items())


def test_adapters_are_trained(world: TinyWorld, tokenizer: Any, prompts: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = trainer(world, tokenizer, prompts, config(tmp_path, max_steps=2), peft_config=adapter)
    before = [p.detach().clone() for p in run.reward_model.parameters()]
    run.train()
    changed = {
        name
        for (name, now), old in zip(run.reward_model.named_parameters(), before, strict=True)
        if not torch.equal(now, old)
    }
    assert changed
    assert all("lora_" in name for name in changed)
    assert logged(run, "grad_norm")[1] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "cispo"}, "loss_type must be 'grpo' or 'bnpo' or 'dr_grpo' or 'dapo' for token-level"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be 'token' for token-level"),
        ({"scale_rewards": "batch"}, "scale_rewards must be 'group' for token-level advantages, got 'batch'"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold must be None for token-level"),
        ({"use_vllm": True}, "vllm_importance_sampling_correction must be False where use_vllm is on, got True"),
        ({"dist_p_min": 0.0}, r"dist_p_min must be > 0 and <= 1, got 0\.0"),
        ({"rm_beta": 0.0}, r"rm_beta must be > 0 and finite, got 0\.0"),
        ({"dist_alpha": -1.0}, r"dist_alpha must be >= 0 and finite, got -1\.0"),
        ({"rm_reference": "old"}, "rm_reference must be 'behaviour' or 'fixed', got 'old'"),
        ({"variant": "eq14"}, "variant must be 'paper' or 'released', got 'eq14'"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_what_cannot_be_right_is_refused(world: TinyWorld, tokenizer: Any, prompts: list[str], tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    args = config(tmp_path, max_steps=1)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="model must have no learned position embeddings, got GPT2LMHeadModel"):
        trainer(world, tokenizer, prompts, args, model=gpt2)
    capped = AutoModelForCausalLM.from_pretrained(world.policy_directory())
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"reward_model: model must have no soft cap and no scale.*softcapping = 30"):
        trainer(world, tokenizer, prompts, args, reward_model=capped)
    both = AutoModelForCausalLM.from_pretrained(world.policy_directory())
    with pytest.raises(ValueError, match=r"reward_model must train no parameter of the policy, got \d+ of them"):
        trainer(world, tokenizer, prompts, args, model=both, reward_model=both)
    with pytest.raises(ValueError, match="reference must be None where rm_reference is 'behaviour', got a model"):
        trainer(world, tokenizer, prompts, args, reference=capped)
    with pytest.raises(ValueError, match="rm_outcome must be >= 0 and < 1, got 1"):
        trainer(world, tokenizer, prompts, config(tmp_path, rm_outcome=1))
    halves = trainer(world, tokenizer, prompts, args, Recorder(lambda _: 0.5))
    with pytest.raises(ValueError, match=r"reward_funcs\[0\] \(parity\) must give 0, 1 or None.*got 0\.5"):
        halves.train()


def test_other_versions_of_trl_are_named() -> None:
    _trl.check_version("1.16.3", "this")
    for version in ("1.15.2", "1.17.0", "2.0.0"):
        with pytest.raises(RuntimeError, match=rf"this needs TRL >=1\.16,<1\.17, found {version}; install"):
            _trl.check_version(version, "this")
