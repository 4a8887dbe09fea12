"""`PRMTrainer`: transformers' Trainer for heads on step rows, equal for any sharing of an update among processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from prmfast.prm.adapter import PRMAdapter
from prmfast.prm.data import Example
from prmfast.prm.heads import StepHead, ValueHead
from prmfast.prm.step_separator import StepSeparatorPRM
from prmfast.prm.train.base import UpdateMeanTrainer, as_examples
from prmfast.prm.train.batches import StepCollator
from prmfast.prm.train.model import StepModel, disable_dropout, load_backbone
from prmfast.prm.train.objective import StepObjective
from prmfast.prm.train.rows import RowLimits, StepRows
from prmfast.prm.value_head import ValueHeadPRM

Data = str | os.PathLike[str] | Iterable[Example | Mapping[str, Any]] | StepRows


@dataclass
class PRMConfig(TrainingArguments):  # type: ignore[misc]
    r"""`transformers.TrainingArguments` and what a PRM adds: the fields and defaults of TRL's PRMConfig, and the loss.

    Args:
        loss: "pqm", "bce" (TRL's cross entropy of two classes), "mse" or "orm". variant, zeta, normalization: of
            `pqm_loss`.
        max_length, max_prompt_length, max_completion_length: tokens of a chain, of its prompt, cut from the beginning,
            and of its steps with their separators, cut at the end; see `RowLimits`. None: no limit.
        disable_dropout: trains without dropout.
        step_separator: put behind every step, whose label stands at its last token (`StepSeparatorPRM`). None: PQM's
            template with its step token (`ValueHeadPRM`). Not used where `PRMTrainer` is given an adapter.
        train_on_last_step_only: labels of all steps but the last are not used in training.
        dataset_num_proc: processes that tokenise; None: one.
    """

    learning_rate: float = 1e-5
    remove_unused_columns: bool | None = False
    loss: str = "pqm"
    variant: str = "pqm"
    zeta: float = 4.0
    normalization: str = "paper"
    logging_steps: float = 10
    max_length: int | None = 1024
    max_prompt_length: int | None = 512
    max_completion_length: int | None = None
    disable_dropout: bool = True
    step_separator: str | None = "\n"
    train_on_last_step_only: bool = False
    dataset_num_proc: int | None = None


class PRMTrainer(UpdateMeanTrainer):
    """Trains a value head and its decoder on step labels ([Q]: PQM, and BCE, MSE and ORM beside it).

    The loss of an update is the mean over all its units (`StepObjective`), whatever the accumulation steps and the
    processes: two processes train like one. Batches are of like length, their order follows from seed and epoch, and a
    run that is resumed goes on bit for bit (CPU). What it saves, `AutoPRM.from_pretrained` loads.

    Args:
        model: a folder or hub id of a language model, a `StepModel`, or a transformers model, whose decoder is taken;
            a token classifier's head of one or two classes becomes the value head, other heads are left.
        args: a `PRMConfig`.
        train_dataset, eval_dataset: a file or rows for `read_examples`, examples, or `StepRows`. ``eval_loss`` is the
            mean over the batches, weighted with their rows.
        processing_class: the tokenizer; needed unless ``model`` is a name.
        adapter: the template; the default follows from ``args.step_separator``, and `AutoPRM` finds it again.
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
        self.adapter = adapter or _template(args.step_separator)
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
            eval_dataset=self._rows(eval_dataset, args, processing_class, evaluation=True),
            processing_class=processing_class,
            **options,
        )

    def _objective(self, args: PRMConfig) -> StepObjective:
        return StepObjective(args.loss, args.variant, args.zeta, args.normalization)

    def _model(self, backbone: Any, args: PRMConfig) -> StepModel:
        head: StepHead = self.adapter.head(backbone.config, None)
        if not isinstance(head, ValueHead):
            raise TypeError(f"adapter must be a value head's (ValueHeadPRM), got {type(self.adapter).__name__}")
        decoder = backbone.base_model if isinstance(backbone, PreTrainedModel) else backbone
        if decoder is not backbone:
            _take_classifier(backbone, head)
        return StepModel(decoder, head)

    def _rows(self, data: Data | None, args: PRMConfig, tokenizer: Any, *, evaluation: bool = False) -> StepRows | None:
        if data is None:
            return None
        if not isinstance(data, StepRows):
            data = StepRows(
                as_examples(data),
                self.adapter,
                tokenizer,
                limits=RowLimits(args.max_length, args.max_prompt_length, args.max_completion_length),
                last_step_only=args.train_on_last_step_only and not evaluation,
                whole=args.loss == "orm",
                processes=args.dataset_num_proc,
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
            config.architectures = [self.adapter.architectures[0]]
            if isinstance(self.adapter, StepSeparatorPRM):
                config.prm_step_separator = self.adapter.separator
            config.save_pretrained(output_dir or self.args.output_dir)


def _template(step_separator: str | None) -> PRMAdapter:
    return ValueHeadPRM() if step_separator is None else StepSeparatorPRM(step_separator)


@torch.no_grad()
def _take_classifier(model: Any, head: ValueHead) -> None:
    """Copies a token classifier's logit, or of two classes the difference of both: its log odds of a right step."""
    layer = getattr(model, "score", getattr(model, "classifier", None))
    if not isinstance(layer, nn.Linear) or layer.out_features > 2:
        return
    for name, mine in (("weight", head.summary.weight), ("bias", head.summary.bias)):
        theirs = getattr(layer, name)
        if theirs is None:
            mine.zero_()
        else:
            mine.copy_((theirs[-1:] - theirs[:1] if layer.out_features == 2 else theirs).reshape(mine.shape))
