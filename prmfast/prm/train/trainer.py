"""`PRMTrainer`: transformers' Trainer for heads on step rows, equal for any sharing of an update among processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainingArguments

from prmfast.prm.adapter import PRMAdapter
from prmfast.prm.data import Example
from prmfast.prm.heads import StepHead, ValueHead
from prmfast.prm.train.base import UpdateMeanTrainer, as_examples
from prmfast.prm.train.batches import StepCollator
from prmfast.prm.train.model import StepModel, disable_dropout, load_backbone
from prmfast.prm.train.objective import StepObjective
from prmfast.prm.train.rows import StepRows
from prmfast.prm.value_head import ValueHeadPRM

Data = str | os.PathLike[str] | Iterable[Example | Mapping[str, Any]] | StepRows


@dataclass
class PRMConfig(TrainingArguments):  # type: ignore[misc]
    """`transformers.TrainingArguments` and what a PRM adds; the names are those of the PRMConfig that TRL had.

    Args:
        loss: "pqm", "bce", "mse" or "orm". variant, zeta, normalization: of `pqm_loss`.
        max_length: tokens of a chain; see `StepRows`. None: no limit.
        disable_dropout: trains without dropout.
        train_on_last_step_only: labels of all steps but the last are not used.
    """

    learning_rate: float = 1e-5
    remove_unused_columns: bool | None = False
    loss: str = "pqm"
    variant: str = "pqm"
    zeta: float = 4.0
    normalization: str = "paper"
    max_length: int | None = 1024
    disable_dropout: bool = True
    train_on_last_step_only: bool = False


class PRMTrainer(UpdateMeanTrainer):
    """Trains a value head and its decoder on step labels ([Q]: PQM, and BCE, MSE and ORM beside it).

    The loss of an update is the mean over all its units (`StepObjective`), whatever the accumulation steps and the
    processes: two processes train like one. Batches are of like length, their order follows from seed and epoch, and a
    run that is resumed goes on bit for bit (CPU). What it saves, `AutoPRM.from_pretrained` loads.

    Args:
        model: a folder or hub id of a language model, a decoder without head (``AutoModel``), or a `StepModel`.
        args: a `PRMConfig`.
        train_dataset, eval_dataset: a file or rows for `read_examples`, examples, or `StepRows`. ``eval_loss`` is the
            mean over the batches, weighted with their rows.
        processing_class: the tokenizer; needed unless ``model`` is a name.
        adapter: the template; the default is `ValueHeadPRM`, the one that `AutoPRM` chooses for such a checkpoint.
        options: of `transformers.Trainer` (callbacks, compute_metrics, optimizers, ...).
    """

    def __init__(
        self,
        model: Any,
        args: PRMConfig,
        train_dataset: Data | None = None,
        eval_dataset: Data | None = None,
        processing_class: Any = None,
        *,
        adapter: PRMAdapter | None = None,
        **options: Any,
    ) -> None:
        self.adapter = adapter or ValueHeadPRM()
        self.objective = self._objective(args)
        if isinstance(model, (str, os.PathLike)):
            model, processing_class = load_backbone(os.fspath(model), self.adapter)
        if processing_class is None:
            raise ValueError("processing_class must be the tokenizer unless model is a name, got None")
        self.adapter.check(model.config, processing_class)
        if not isinstance(model, StepModel):
            model = self._model(model, args)
        if args.disable_dropout:
            disable_dropout(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=StepCollator(),
            train_dataset=self._rows(train_dataset, args, processing_class),
            eval_dataset=self._rows(eval_dataset, args, processing_class),
            processing_class=processing_class,
            **options,
        )

    def _objective(self, args: PRMConfig) -> StepObjective:
        return StepObjective(args.loss, args.variant, args.zeta, args.normalization)

    def _model(self, backbone: Any, args: PRMConfig) -> StepModel:
        head: StepHead = self.adapter.head(backbone.config, None)
        if not isinstance(head, ValueHead):
            raise TypeError(f"adapter must be a value head's (ValueHeadPRM), got {type(self.adapter).__name__}")
        return StepModel(backbone, head)

    def _rows(self, data: Data | None, args: PRMConfig, tokenizer: Any) -> StepRows | None:
        if data is None:
            return None
        if not isinstance(data, StepRows):
            data = StepRows(
                as_examples(data),
                self.adapter,
                tokenizer,
                max_length=args.max_length,
                last_step_only=args.train_on_last_step_only,
                whole=args.loss == "orm",
            )
        if len(data) == 0:
            raise ValueError(f"a data set must have a chain of at most max_length={args.max_length} tokens, got none")
        self.objective.check([data[i]["labels"] for i in range(len(data))])
        return data

    def batch_loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The objective's mean and the logits [B, H, k]."""
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"})
        return self.objective(logits, inputs["labels"]), logits

    def batch_units(self, inputs: dict[str, Tensor]) -> Tensor:
        """The objective's units."""
        return self.objective.units(inputs["labels"])

    def _save_state(self, output_dir: str | None, state_dict: Any) -> None:
        """Tensors, tokenizer and arguments."""
        super()._save(output_dir, state_dict)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self._save_state(output_dir, state_dict)
        if self.args.should_save:
            config = copy.deepcopy(self.model.config)
            config.architectures = ["ValueHeadPRM"]
            config.save_pretrained(output_dir or self.args.output_dir)
