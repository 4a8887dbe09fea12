"""A tiny decoder and a set of chains in which a letter says whether a step is right."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel, TrainerCallback

from prmfast.prm.data import StepExample
from prmfast.prm.train import PRMConfig, PRMTrainer
from prmfast.prm.value_head import ValueHeadPRM
from tests.prm.models import SIZES, byte_level


def chains(count: int = 48, seed: int = 0) -> list[StepExample]:
    draw = random.Random(seed)
    made = []
    for i in range(count):
        labels = tuple(float(draw.random() < 0.6) for _ in range(draw.randint(1, 4)))
        made.append(StepExample(f"Q{i % 7}" * (1 + i % 3), tuple("ab"[label == 1] * 6 for label in labels), labels))
    return made


def backbone(seed: int = 0, dropout: float = 0.0) -> tuple[Any, Any]:
    tokenizer = byte_level(("<|endoftext|>", "[PRM]"))
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), attention_dropout=dropout, **(SIZES | {"initializer_range": 0.05}))
    return LlamaModel(config), tokenizer


def config(folder: Path, **options: Any) -> PRMConfig:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "seed": 3,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PRMConfig(output_dir=str(folder), **(defaults | options))


def trainer(
    folder: Path,
    *,
    dropout: float = 0.0,
    data: Any = None,
    callbacks: Any = None,
    adapter: Any = None,
    **options: Any,
) -> PRMTrainer:
    model, tokenizer = backbone(dropout=dropout)
    return PRMTrainer(
        model,
        config(folder, disable_dropout=dropout == 0, **options),
        chains() if data is None else data,
        processing_class=tokenizer,
        adapter=adapter or ValueHeadPRM(prompt="train"),  # the shorter one
        callbacks=callbacks,
    )


class At(TrainerCallback):
    """Calls ``act(control)`` at the end of one step."""

    def __init__(self, step: int, act: Any) -> None:
        self._step, self._act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            self._act(control)


def losses(run: PRMTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
