"""What every trainer here shares: the mean over a whole update, batches by seed and epoch, resumption."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from prmfast.prm.adapter import PRMError
from prmfast.prm.data import Example, read_examples
from prmfast.prm.train.batches import LengthBuckets
from prmfast.prm.train.checkpoints import last_checkpoint


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler which epoch begins, also after a resumption."""

    def __init__(self, trainer: UpdateMeanTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._trainer.sampler is not None:
            self._trainer.sampler.epoch = int(state.epoch)


class UpdateMeanTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with a loss that is one mean over the units of an update, however it is shared out.

    A subclass gives `batch_loss`, a mean over the units of one batch, and their number, `batch_units`. Its data sets
    have ``lengths`` and an empty row behind the last one.
    """

    def __init__(self, **options: Any) -> None:
        self.sampler: LengthBuckets | None = None
        super().__init__(**options)
        self.label_names = ["labels"]
        self.model_accepts_loss_kwargs = True  # the loss is divided by the units of the whole update, not by batches
        self.add_callback(_Epochs(self))

    def batch_loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(mean loss over the units of a batch, what the model said of it)."""
        raise NotImplementedError

    def batch_units(self, inputs: dict[str, Tensor]) -> Tensor:
        """Number of units of a batch, a scalar."""
        raise NotImplementedError

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
        loss, logits = self.batch_loss(model, inputs)
        if num_items_in_batch is not None:
            total = torch.as_tensor(num_items_in_batch, device=loss.device)
            share = torch.where(total > 0, self.batch_units(inputs) / torch.where(total > 0, total, 1), 0.0)
            loss = loss * share.to(loss.dtype) * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of one update and the units of all processes' batches."""
        batches = list(islice(epoch_iterator, num_batches))
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Tensor | None:
        if not batch_samples:
            return None
        units = torch.stack([self.batch_units(batch) for batch in batch_samples]).sum()
        return cast(Tensor, self.accelerator.gather(units.to(device)).sum())

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBuckets:
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        args = self.args
        update = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        self.sampler = LengthBuckets(rows.lengths, update, seed=seed)
        return self.sampler

    def _trained(self) -> Any:
        """The module whose tensors a checkpoint has."""
        return self.model

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """PRMError unless a checkpoint has every tensor that is trained; frozen ones are not saved."""
        trained = {name for name, parameter in self._trained().named_parameters() if parameter.requires_grad}
        wrong = sorted(trained & set(load_result.missing_keys)) or list(load_result.unexpected_keys)
        if wrong:
            raise PRMError(f"the checkpoint in {self.args.output_dir} is another model's: {wrong[0]!r} is not in both")


def as_examples(data: Any) -> Iterable[Example]:
    """Examples of a file, of rows, or as they are."""
    if isinstance(data, (str, os.PathLike)):
        return read_examples(data)
    items = list(data)
    if all(isinstance(item, Example) for item in items):
        return items
    return read_examples(items)
