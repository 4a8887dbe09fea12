from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="training needs the extra prmfast[train]: no transformers")
pytest.importorskip("accelerate", reason="training needs the extra prmfast[train]: no accelerate")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prmfast.prm.data import OutcomeExample, PairExample
from prmfast.prm.data.conversation import Message
from prmfast.prm.train import ImplicitConfig, ImplicitTrainer
from prmfast.prm.train.implicit import AnswerModel, ImplicitObjective, answer_logprobs
from prmfast.prm.train.implicit_rows import collate_answers
from tests.prm.models import CHATML, SIZES, byte_level
from tests.prm.train.toy import At, losses

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def outcomes(count: int = 24) -> list[OutcomeExample]:
    """Right answers are made of a, wrong ones of b."""
    return [
        OutcomeExample((Message("user", f"Q{i}"), Message("assistant", "ab"[i % 2] * (3 + i % 5))), float(i % 2 == 0))
        for i in range(count)
    ]


def pairs(count: int = 12) -> list[PairExample]:
    return [PairExample((Message("user", f"Q{i}"),), "a" * (3 + i % 5), "b" * (3 + i % 4)) for i in range(count)]


def language_model(**options: Any) -> tuple[Any, Any]:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = SIZES | {"initializer_range": 0.05} | options
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)), tokenizer


def implicit(folder: Path, data: Any = None, callbacks: Any = None, **options: Any) -> ImplicitTrainer:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "num_train_epochs": 5,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    model, tokenizer = language_model()
    args = ImplicitConfig(output_dir=str(folder), **(defaults | options))
    if data is None:
        data = pairs() if args.loss in ("dpo_rm", "q_rm") else outcomes()
    return ImplicitTrainer(model, args, data, processing_class=tokenizer, callbacks=callbacks)


@pytest.mark.parametrize("tied", [False, True])
def test_log_probabilities_are_those_of_the_logits(tmp_path: Path, tied: bool) -> None:
    model, _ = language_model(tie_word_embeddings=tied)
    rows = implicit(tmp_path).train_dataset
    found = answer_logprobs(AnswerModel(model), rows.answers[:5], batch_size=2)
    for answer, values in zip(rows.answers, found, strict=False):
        ids = torch.tensor([answer.token_ids])
        with torch.no_grad():
            whole = model.eval()(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(values, whole[torch.tensor(answer.mask[1:])], rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_logits() -> None:
    model, _ = language_model()
    ids = torch.tensor([[5, 9, 12, 7], [8, 8, 3, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]).bool()
    weights = torch.randn(4, generator=torch.Generator().manual_seed(1))
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    stored = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        stored.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = (AnswerModel(model)(ids, attention, mask)[mask] * weights).sum()
    vocabulary = model.config.vocab_size
    assert {shape for shape in stored if vocabulary in shape} <= {(vocabulary, 64), (64, vocabulary)}  # the weight
    total.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids, attention_mask=attention).logits.log_softmax(-1)
    chosen = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0][mask[:, 1:]]
    (chosen * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "ipvrm"},
        {"loss": "ipvrm", "weighting": "early"},
        {"loss": "ipvrm", "weighting": "late", "reduction": "token"},
        {"loss": "implicit_prm", "beta": 0.5},
        {"loss": "dpo_rm", "beta": 0.5},
        {"loss": "q_rm", "beta": 2.0},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_it_learns_which_answers_are_right(tmp_path: Path, options: dict[str, Any]) -> None:
    run = implicit(tmp_path, **options)
    before = run.evaluate(run.train_dataset)["eval_loss"]
    run.train()
    assert run.evaluate(run.train_dataset)["eval_loss"] < 0.5 * before
    found = run.predict(run.train_dataset)
    right = found.label_ids > 0.5
    assert found.predictions[right].min() > (0 if run.objective.pairs else found.predictions[~right].max())


def test_the_reference_is_kept_and_the_policy_saved_as_a_language_model(tmp_path: Path) -> None:
    run = implicit(tmp_path, max_steps=2)
    kept = (tmp_path / "train_reference.safetensors").read_bytes()
    first = torch.cat([answer.reference for answer in run.train_dataset.answers])
    batch = collate_answers([run.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        _, before = run.batch_loss(run.model.eval(), batch)
    assert float(before.abs().max()) < 1e-4  # the reference is the policy as it was given
    run.train()
    run.save_model()
    again = ImplicitTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path),
        run.args,
        outcomes(),
        processing_class=run.processing_class,
        reference=language_model()[0],
    )
    assert torch.equal(torch.cat([answer.reference for answer in again.train_dataset.answers]), first)
    assert (tmp_path / "train_reference.safetensors").read_bytes() == kept
    with torch.no_grad():
        _, trained = run.batch_loss(run.model.eval(), batch)
        _, loaded = again.batch_loss(again.model.eval(), batch)
    assert float(trained.abs().max()) > 1e-3
    torch.testing.assert_close(loaded, trained)


@pytest.mark.parametrize("loss", ["ipvrm", "dpo_rm"])
def test_a_stopped_run_goes_on_bit_for_bit_and_accumulation_is_one_batch(tmp_path: Path, loss: str) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "loss": loss}
    whole = implicit(tmp_path / "whole", **options)
    whole.train()

    def halt(control: Any) -> None:
        control.should_training_stop = True

    implicit(tmp_path / "part", callbacks=[At(3, halt)], **options).train()
    rest = implicit(tmp_path / "part", **options)
    rest.resume()
    assert losses(rest) == losses(whole)
    mine, other = rest.model.state_dict(), whole.model.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    options |= {"save_strategy": "no", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = implicit(tmp_path / "parts", **options)
    parts.train()
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "early", "late"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_loss_of_an_update_is_made_of_units(weighting: str, reduction: str) -> None:
    objective = ImplicitObjective("ipvrm", weighting, reduction, 10.0, 5.0)
    draw = torch.Generator().manual_seed(0)
    ratio = torch.randn(4, 6, generator=draw)
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [0]])
    labels = torch.tensor([1.0, 0.0, 1.0, -100.0])
    parts = [
        objective(ratio[i : i + 1], mask[i : i + 1], labels[i : i + 1])
        * objective.units(mask[i : i + 1], labels[i : i + 1])
        for i in range(4)
    ]
    expected = objective(ratio, mask, labels)
    torch.testing.assert_close((sum(parts) / objective.units(mask, labels)).float(), expected)


def test_the_wrong_kind_of_example_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"examples\[0\] must be a PairExample, got OutcomeExample"):
        implicit(tmp_path, data=outcomes(), loss="dpo_rm")
    with pytest.raises(ValueError, match="loss must be 'ipvrm' or"):
        implicit(tmp_path, loss="pqm")
