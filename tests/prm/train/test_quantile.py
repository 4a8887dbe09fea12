from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="training needs the extra prmfast[train]: no transformers")
pytest.importorskip("accelerate", reason="training needs the extra prmfast[train]: no accelerate")
pytest.importorskip("peft", reason="LoRA needs the extra prmfast[train]: no peft")

from prmfast.prm import AutoPRM, PRMError
from prmfast.prm.data import PrefixExample
from prmfast.prm.train import QuantileConfig, QuantileTrainer, StepCollator, load_quantile_prm
from tests.prm.models import save
from tests.prm.train.toy import At, losses

STEPS = {"qwen": "{0}\n\n{1}", "pqm": "Step 1: {0}\nStep 2: {1}", "shepherd": "{0}\n\n{1}"}


def prefixes(kind: str) -> list[PrefixExample]:
    """Prefixes whose last step says how often they end right."""
    return [
        PrefixExample(f"Q{i}", STEPS[kind].format("x", "ab"[i % 2] * 6), (0.1, 0.9)[i % 2] if i % 4 < 2 else 0.5)
        for i in range(16)
    ]


def quantile_trainer(base: Path, folder: Path, kind: str, **options: Any) -> QuantileTrainer:
    callbacks = options.pop("callbacks", None)
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "num_train_epochs": 6,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "lora_r": 4,
    }
    torch.manual_seed(0)
    args = QuantileConfig(output_dir=str(folder), **(defaults | options))
    return QuantileTrainer(str(base), args, prefixes(kind), callbacks=callbacks)


@pytest.mark.parametrize("kind", ["qwen", "pqm", "shepherd"])
def test_every_quantile_begins_as_the_base_probability(tmp_path: Path, kind: str) -> None:
    save(kind, tmp_path / "base")
    options = {"adapter": "math-shepherd"} if kind == "shepherd" else {}
    base = AutoPRM.from_pretrained(tmp_path / "base", **options)
    answers = [example.prefix for example in prefixes(kind)[:4]]
    expected = [one.scores for one in base.judge([f"Q{i}" for i in range(4)], answers)]
    args = QuantileConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], levels=[0.05, 0.25, 0.5, 0.95])
    run = QuantileTrainer(base, args, prefixes(kind))
    batch = StepCollator()([run.train_dataset[i] for i in range(4)])
    batch.pop("labels")
    with torch.no_grad():
        quantiles = run.model.eval()(**batch).sigmoid()
    assert quantiles.shape == (4, 2, 4)
    torch.testing.assert_close(quantiles, torch.tensor(expected)[..., None].expand(4, 2, 4), rtol=1e-5, atol=1e-6)


def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path: Path) -> None:
    save("qwen", tmp_path / "base")
    run = quantile_trainer(tmp_path / "base", tmp_path / "run", "qwen")
    frozen = {name: value.clone() for name, value in run.model.named_parameters() if not value.requires_grad}
    assert any("q_proj" in name for name in frozen)
    before = run.evaluate(run.train_dataset)["eval_loss"]
    run.train()
    assert run.evaluate(run.train_dataset)["eval_loss"] < 0.6 * before
    assert all(torch.equal(value, frozen[name]) for name, value in run.model.named_parameters() if name in frozen)


def test_the_saved_quantiles_load_again(tmp_path: Path) -> None:
    save("qwen", tmp_path / "base")
    run = quantile_trainer(tmp_path / "base", tmp_path / "run", "qwen", max_steps=3)
    run.train()
    run.save_model()
    assert (tmp_path / "run" / "model.safetensors").stat().st_size < 200_000  # of LoRA and head alone
    prm = load_quantile_prm(tmp_path / "run", batch_size=3)
    examples = prefixes("qwen")[:5]
    found = prm.step_quantiles([e.question for e in examples], [e.prefix for e in examples])
    batch = StepCollator()([run.train_dataset[i] for i in range(5)])
    batch.pop("labels")
    with torch.no_grad():
        expected = run.model.eval()(**batch).sigmoid()
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-5)
    assert prm.quantile_levels == (0.1, 0.5, 0.9)
    scores = prm.judge([examples[0].question], [examples[0].prefix])[0].scores
    assert scores == pytest.approx(found[0][:, 1].tolist(), abs=1e-6)
    save("pqm", tmp_path / "other")
    with pytest.raises(PRMError, match="does not fit"):
        load_quantile_prm(tmp_path / "run", base=str(tmp_path / "other"))
    with pytest.raises(PRMError, match=r"has no quantile_prm\.json"):
        load_quantile_prm(tmp_path / "base")


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    save("qwen", tmp_path / "base")
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "lora_dropout": 0.2}
    options["disable_dropout"] = False
    whole = quantile_trainer(tmp_path / "base", tmp_path / "whole", "qwen", **options)
    whole.train()

    def halt(control: Any) -> None:
        control.should_training_stop = True

    quantile_trainer(tmp_path / "base", tmp_path / "part", "qwen", callbacks=[At(3, halt)], **options).train()
    rest = quantile_trainer(tmp_path / "base", tmp_path / "part", "qwen", **options)
    rest.resume()
    assert losses(rest) == losses(whole)
    mine, other = rest.model.state_dict(), whole.model.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


@pytest.mark.parametrize("levels", [[], [0.5, 0.1], [0.0, 0.5], [0.5, 1.0]])
def test_bad_levels_are_named(tmp_path: Path, levels: list[float]) -> None:
    with pytest.raises(ValueError, match="levels must be increasing numbers"):
        QuantileConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], levels=levels)
