"""`PRMTrainer`: transformers' Trainer for heads on step rows, equal for any sharing of an update among processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from prmfast.prm.adapter import PRMAdapter, PRMError
from prmfast.prm.data import Example, read_examples
from prmfast.prm.heads import StepHead, ValueHead
from prmfast.prm.train.batches import LengthBuckets, StepCollator
from prmfast.prm.train.checkpoints import last_checkpoint
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


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler which epoch begins, also after a resumption."""

    def __init__(self, trainer: PRMTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._trainer.sampler is not None:
            self._trainer.sampler.epoch = int(state.epoch)


class PRMTrainer(Trainer):  # type: ignore[misc]
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
        self.sampler: LengthBuckets | None = None
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
        self.label_names = ["labels"]
        self.model_accepts_loss_kwargs = True  # the loss is divided by the units of the whole update, not by batches
        self.add_callback(_Epochs(self))

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
                _examples(data),
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

    def resume(self) -> Any:
        """``train`` from the last whole checkpoint in ``args.output_dir``, from the beginning where there is none."""
        found = last_checkpoint(self.args.output_dir, processes=self.args.world_size)
        return self.train(resume_from_checkpoint=None if found is None else str(found))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This process's share of the mean loss of the update, times the processes that gradients are averaged over."""
        labels = inputs["labels"]
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = self.objective(logits, labels)
        if num_items_in_batch is not None:
            total = torch.as_tensor(num_items_in_batch, device=loss.device).clamp_min(1)
            loss = loss * self.objective.units(labels) / total * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of one update and the units of all processes' batches."""
        batches = list(islice(epoch_iterator, num_batches))
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Tensor | None:
        if not batch_samples:
            return None
        units = sum((self.objective.units(batch["labels"]) for batch in batch_samples), start=torch.tensor(0))
        return cast(Tensor, self.accelerator.gather(units.to(device)).sum())

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBuckets:
        rows = cast(StepRows, train_dataset if train_dataset is not None else self.train_dataset)
        args = self.args
        update = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        self.sampler = LengthBuckets(rows.lengths, update, seed=seed)
        return self.sampler

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """PRMError unless a checkpoint has every tensor that is trained; frozen ones are not saved."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        wrong = sorted(trained & set(load_result.missing_keys)) or list(load_result.unexpected_keys)
        if wrong:
            raise PRMError(f"the checkpoint in {self.args.output_dir} is another model's: {wrong[0]!r} is not in both")

    def _save_state(self, output_dir: str | None, state_dict: Any) -> None:
        """Tensors, tokenizer and arguments."""
        super()._save(output_dir, state_dict)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self._save_state(output_dir, state_dict)
        if self.args.should_save:
            config = copy.deepcopy(self.model.config)
            config.architectures = ["ValueHeadPRM"]
            config.save_pretrained(output_dir or self.args.output_dir)


def _examples(data: Any) -> Iterable[Example]:
    """Examples of a file, of rows, or as they are."""
    if isinstance(data, (str, os.PathLike)):
        return read_examples(data)
    items = list(data)
    if all(isinstance(item, Example) for item in items):
        return items
    return read_examples(items)
