"""A base PRM's probability becomes quantiles of the success probability: `QuantileHead` and LoRA ([U])."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prmfast._files import write_json
from prmfast.engines.base import check_judge_inputs
from prmfast.prm.adapter import PRMError
from prmfast.prm.auto import AutoPRM
from prmfast.prm.heads import QuantileHead
from prmfast.prm.train.model import StepModel
from prmfast.prm.train.objective import StepObjective
from prmfast.prm.train.trainer import Data, PRMConfig, PRMTrainer
from prmfast.prm.transformers_prm import TransformersPRM

_DESCRIPTION = "quantile_prm.json"
_WEIGHTS = "model.safetensors"


@dataclass
class QuantileConfig(PRMConfig):
    """`PRMConfig` for quantiles; ``loss`` and what belongs to it, and ``step_separator``, are not used.

    Args:
        levels: of the quantiles, increasing, each in (0, 1).
        lora_r, lora_alpha, lora_dropout: of peft's LoraConfig. lora_targets: names of its target modules.
        lora_layers: numbers of the layers; None: all.
    """

    max_prompt_length: int | None = None
    levels: list[float] = field(default_factory=lambda: [0.1, 0.5, 0.9])
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    lora_layers: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if not self.levels or not rising or not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"levels must be increasing numbers in (0, 1), at least one, got {self.levels}")


class QuantileTrainer(PRMTrainer):
    """Trains LoRA weights and a `QuantileHead` with the pinball loss; the base PRM's other weights stay.

    Before training every quantile is the base PRM's probability. Everything else is as in `PRMTrainer`; what it saves
    are the trained weights alone, for `load_quantile_prm`.

    Args:
        model: a folder or hub id for `AutoPRM`, or a `TransformersPRM`, whose model peft then wraps in place.
        args: a `QuantileConfig`. train_dataset, eval_dataset: success rates at steps, of prefixes or of outcomes.
        base: the name under which `load_quantile_prm` finds the base PRM; the default is the name that was loaded.
        options: of `transformers.Trainer`.
    """

    def __init__(
        self,
        model: Any,
        args: QuantileConfig,
        train_dataset: Data | None = None,
        eval_dataset: Data | None = None,
        *,
        base: str | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, (str, os.PathLike)):
            base = base or os.fspath(model)
            model = AutoPRM.from_pretrained(model)
        if not isinstance(model, TransformersPRM):
            raise TypeError(f"model must be a name or a TransformersPRM, got {type(model).__name__}")
        self.description = {
            "base": base or model.prm_id,
            "levels": list(args.levels),
            "lora": {
                "r": args.lora_r,
                "lora_alpha": args.lora_alpha,
                "lora_dropout": args.lora_dropout,
                "target_modules": list(args.lora_targets),
                "layers_to_transform": args.lora_layers,
            },
        }
        super().__init__(
            _quantile_model(model, self.description),
            args,
            train_dataset,
            eval_dataset,
            model.tokenizer,
            adapter=model.adapter,
            **options,
        )

    def _objective(self, args: PRMConfig) -> StepObjective:
        if not isinstance(args, QuantileConfig):
            raise TypeError(f"args must be a QuantileConfig, got {type(args).__name__}")
        return StepObjective(levels=tuple(args.levels))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The trainable tensors and how to put them onto the base PRM."""
        wanted = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        whole = self.model.state_dict() if state_dict is None else state_dict
        self._save_state(output_dir, {name: value for name, value in whole.items() if name in wanted})
        if self.args.should_save:
            write_json(Path(output_dir or self.args.output_dir) / _DESCRIPTION, self.description)


class QuantilePRM(TransformersPRM):
    """A PRM whose head gives quantiles; its scores are their median.

    `judge` leaves `StepScores.quantiles` to a calibrator: those stand at mid levels, these at ``quantile_levels``.
    """

    quantile_levels: tuple[float, ...]

    def step_quantiles(self, questions: Sequence[str], answers: Sequence[str | None]) -> list[Tensor]:
        """Quantiles [steps, M] of every (question, answer) pair, None the empty answer; float32, not sorted.

        ValueError for unequal lengths and as in `judge`.
        """
        check_judge_inputs(questions, answers)
        pairs = list(zip(questions, answers, strict=True))
        chains = self._judge(pairs, [f"answers[{i}]" for i in range(len(pairs))])
        device = next(self.head.parameters()).device
        with torch.no_grad():
            return [self.head(chain.hidden.to(device)).sigmoid().float().cpu() for chain in chains]


def load_quantile_prm(directory: str | os.PathLike[str], *, base: str | None = None, **options: Any) -> QuantilePRM:
    """The PRM that `QuantileTrainer` saved, with its LoRA weights merged.

    base: folder or hub id of the base PRM, where it is not the one that training named. options: of
    `AutoPRM.from_pretrained`. PRMError where the tensors are not those of this base.
    """
    from safetensors.torch import load_file

    folder = Path(directory)
    try:
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PRMError(f"{folder} has no {_DESCRIPTION}: QuantileTrainer did not save it") from error
    prm = AutoPRM.from_pretrained(base or description["base"], **options)
    model = _quantile_model(prm, description)
    tensors = load_file(folder / _WEIGHTS)
    report = model.load_state_dict(tensors, strict=False)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = sorted(trainable & set(report.missing_keys)) or report.unexpected_keys
    if missing:
        raise PRMError(f"{folder} does not fit {base or description['base']}: tensor {missing[0]!r} is not in both")
    made = QuantilePRM(
        model.backbone.merge_and_unload(),
        model.head,
        prm.tokenizer,
        prm.adapter,
        prm_id=folder.resolve().name,
        batch_size=prm.batch_size,
    )
    made.quantile_levels = tuple(description["levels"])
    return made


def _quantile_model(prm: TransformersPRM, description: dict[str, Any]) -> StepModel:
    """The PRM's decoder in LoRA and a quantile head that begins as the PRM's own."""
    from peft import LoraConfig, get_peft_model

    head = QuantileHead.from_head(prm.head, len(description["levels"]))
    return StepModel(get_peft_model(prm.model, LoraConfig(**description["lora"])), head.requires_grad_(True))
